//! The metrics contract: what k hits and m misses do to the counters, to the token.

use cacheclip_bench::{Family, world};
use cacheclip_tests::ask::{ask, client, ingest, request};
use cacheclip_tests::fleet::{Fleet, Shape};
use cacheclip_tests::until;
use std::collections::BTreeMap;

/// Counters by what they are called here: metric and labels.
const GATEWAY: [(&str, &str, &[&str]); 5] = [
    ("requested tokens", "cacheclip_lookup_requested_tokens_total", &[]),
    ("hit tokens", "cacheclip_lookup_hit_tokens_total", &[]),
    ("answers", "cacheclip_gateway_requests_total", &["policy=\"cacheclip\"", "code=\"OK\""]),
    ("first tokens", "cacheclip_gateway_ttft_seconds_count", &[]),
    ("fallbacks", "cacheclip_scorer_fallback_total", &[]),
];
const WORKER: [(&str, &str, &[&str]); 5] = [
    ("hits", "cacheclip_chunk_lookups_total", &["result=\"hit\""]),
    ("misses", "cacheclip_chunk_lookups_total", &["result=\"miss\""]),
    ("missed tokens", "cacheclip_recomputed_tokens_total", &["reason=\"miss\""]),
    ("selected tokens", "cacheclip_recomputed_tokens_total", &["reason=\"selected\""]),
    ("fallback tokens", "cacheclip_recomputed_tokens_total", &["reason=\"fallback\""]),
];

async fn read(fleet: &Fleet) -> BTreeMap<&'static str, f64> {
    let mut values = BTreeMap::new();
    for (what, name, labels) in GATEWAY {
        values.insert(what, fleet.gateway.sum(name, labels).await);
    }
    for (what, name, labels) in WORKER {
        values.insert(what, fleet.workers[0].sum(name, labels).await);
    }
    let mut objects = 0.0;
    for store in &fleet.stores {
        objects += store.sum("cacheclip_store_objects", &[]).await;
    }
    values.insert("objects", objects);
    values
}

#[tokio::test]
async fn k_hits_and_m_misses_move_the_counters_by_exactly_that() {
    let Some(fleet) = Fleet::start(Shape { workers: 1, ..Shape::default() }).await else { return };
    let corpus = world::generate(41, 2, 2, &Family::ALL);
    let texts: Vec<&str> = corpus.documents.iter().map(|document| document.text.as_str()).collect();
    let (known, unknown) = texts.split_at(5);
    let mut gateway = client(&fleet.gateway.endpoint());
    ingest(&mut gateway, known).await.expect("ingested");
    // The first request makes the prefix known, so that it does not blur the second one's counts.
    ask(&mut gateway, request(&known[..1], &corpus.questions[0].text)).await.expect("an answer");
    let objects = async || read(&fleet).await["objects"];
    until("five chunks, the prefix and their auxiliary KV are stored", || async { objects().await >= 11.0 })
        .await;

    let before = read(&fleet).await;
    let answer = ask(&mut gateway, request(&texts, &corpus.questions[1].text)).await.expect("an answer");
    let after = read(&fleet).await;
    let delta = |what: &str| after[what] - before[what];

    let (hit, missed): (Vec<_>, Vec<_>) = answer.explain.chunks.iter().partition(|chunk| chunk.hit);
    assert_eq!((hit.len(), missed.len()), (known.len(), unknown.len()));
    assert_eq!(delta("hits"), known.len() as f64);
    assert_eq!(delta("misses"), unknown.len() as f64);
    let tokens = |of: &[&cacheclip_rpc::v1::ChunkReport]| of.iter().map(|chunk| chunk.tokens).sum::<u32>();
    assert_eq!(delta("missed tokens"), f64::from(tokens(&missed)));
    assert_eq!(delta("hit tokens"), f64::from(answer.usage.cached_tokens));
    assert!(answer.usage.cached_tokens > tokens(&hit), "the prefix is a hit, too");
    assert_eq!(delta("requested tokens"), f64::from(answer.usage.cached_tokens + tokens(&missed)));
    assert_eq!(delta("selected tokens"), f64::from(answer.usage.recomputed_tokens));
    assert_eq!(delta("fallback tokens"), 0.0);
    assert_eq!((delta("answers"), delta("first tokens"), delta("fallbacks")), (1.0, 1.0, 0.0));
    let expected = before["objects"] + 2.0 * unknown.len() as f64;
    until("the missed chunks are stored, too", || async { objects().await == expected }).await;
}

#[tokio::test]
async fn every_service_exports_what_it_promises_and_the_names_that_autoscalers_read() {
    let Some(fleet) = Fleet::start(Shape { workers: 1, ..Shape::default() }).await else { return };
    let corpus = world::generate(42, 2, 1, &Family::ALL);
    let texts: Vec<&str> = corpus.documents.iter().map(|document| document.text.as_str()).collect();
    ask(&mut client(&fleet.gateway.endpoint()), request(&texts, &corpus.questions[0].text))
        .await
        .expect("an answer");
    let all = [
        ("gateway", &fleet.gateway),
        ("gpu-worker", &fleet.workers[0]),
        ("aux-scorer", &fleet.scorers[0]),
        ("cache-store", &fleet.stores[0]),
    ];
    for (part, process) in all {
        let page = cacheclip_tests::process::get(process.admin, "/metrics").await.expect("metrics");
        for metric in cacheclip::metrics::all() {
            let here = metric.exported_by.contains(part) || metric.exported_by.contains("every service");
            if here && metric.from_start {
                assert!(
                    page.contains(&format!("# TYPE {} {}", metric.name, metric.kind)),
                    "{part}: {}",
                    metric.name
                );
            }
        }
    }
    let worker = &fleet.workers[0];
    for gauge in ["vllm:num_requests_waiting", "vllm:num_requests_running", "vllm:kv_cache_usage_perc"] {
        assert_eq!(worker.metric(gauge).await, Some(0.0), "{gauge} of an idle worker");
    }
}
