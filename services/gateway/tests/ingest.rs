//! What a gateway promises about ingest and about what it says of itself.

mod support;

use cacheclip_rpc::status::invalid_field;
use cacheclip_rpc::v1;
use support::{Fleet, MAX_TOKENS, MODEL, ask, chunk, soon};
use tonic::{Code, Status};

fn document(name: &str, texts: &[&str]) -> v1::IngestRequest {
    v1::IngestRequest {
        document: name.into(),
        chunks: texts.iter().map(|text| chunk(text)).collect(),
        ..Default::default()
    }
}

/// All progress until the stream ends, and how it ended.
async fn ingest(
    fleet: &Fleet,
    documents: Vec<v1::IngestRequest>,
) -> (Vec<v1::IngestProgress>, Result<(), Status>) {
    let mut client = fleet.client.clone();
    let read = async {
        let mut stream = client.ingest(tokio_stream::iter(documents)).await.expect("a stream").into_inner();
        let mut all = Vec::new();
        loop {
            match stream.message().await {
                Ok(Some(progress)) => all.push(progress),
                Ok(None) => return (all, Ok(())),
                Err(status) => return (all, Err(status)),
            }
        }
    };
    soon(read).await
}

#[tokio::test]
async fn documents_are_computed_in_bounded_batches_with_progress_for_each() {
    let fleet = Fleet::with(|options| options.ingest_batch = 2).await;
    let documents =
        vec![document("one", &["first", "second", "third"]), document("two", &["first", "fourth"])];
    let (progress, ended) = ingest(&fleet, documents).await;
    ended.expect("a clean end");
    let seen: Vec<_> =
        progress.iter().map(|p| (p.document.as_str(), p.chunks_done, p.chunks_computed)).collect();
    assert_eq!(
        seen,
        [("one", 2, 2), ("one", 3, 3), ("two", 2, 1)],
        "what was stored already is not counted as computed"
    );
    assert!(progress[0].tokens > 0 && progress[1].tokens > progress[0].tokens);
    assert_eq!(fleet.fake.state().precomputed, [2, 1, 2]);
}

#[tokio::test]
async fn ingest_makes_scorer_and_worker_know_what_a_question_will_need() {
    let fleet = Fleet::start().await;
    let (_, ended) = ingest(&fleet, vec![document("one", &["first", "second"])]).await;
    ended.expect("a clean end");
    fleet.generate(ask(&["second", "first"])).await.expect("an answer");
    let state = fleet.fake.state();
    assert_eq!(state.prepared.len(), 2, "digests, then texts");
    assert_eq!(state.asked.len(), 1, "the scorer needs no text any more");
    assert!(state.asked[0].chunks.iter().all(|chunk| chunk.text.is_none()));
}

#[tokio::test]
async fn ingest_goes_on_without_a_scorer() {
    let mut fleet = Fleet::start().await;
    drop(fleet.scorer.take());
    let (progress, ended) = ingest(&fleet, vec![document("one", &["first"])]).await;
    ended.expect("a clean end");
    assert_eq!(progress[0].chunks_done, 1);
}

#[tokio::test]
async fn a_bad_document_is_named_by_its_place_and_none_of_it_is_computed() {
    let fleet = Fleet::start().await;
    let long = "word ".repeat(MAX_TOKENS as usize);
    let cases = [
        ("documents[1].chunks[1].text", document("bad", &["fine", ""])),
        ("documents[1].chunks", document("bad", &[])),
        ("documents[1].chunks[0].text", document("bad", &[&long])),
        ("documents[1].model", v1::IngestRequest { model: "other".into(), ..document("bad", &["fine"]) }),
    ];
    for (field, bad) in cases {
        fleet.fake.state().precomputed.clear();
        let (progress, ended) = ingest(&fleet, vec![document("good", &["good"]), bad]).await;
        let refused = ended.expect_err(field);
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
        assert_eq!(invalid_field(&refused).as_deref(), Some(field), "{refused}");
        assert_eq!(progress.len(), 1, "{field}: the good document is done");
        assert_eq!(fleet.fake.state().precomputed, [1], "{field}");
    }
}

#[tokio::test]
async fn capabilities_say_what_a_caller_may_rely_on() {
    let fleet = Fleet::start().await;
    let said =
        soon(fleet.client.clone().get_capabilities(v1::GetCapabilitiesRequest {})).await.expect("an answer");
    let said = said.into_inner();
    assert_eq!((said.proto.as_str(), said.key_spec), ("cacheclip.v1", 1));
    assert_eq!(said.policies, ["cacheclip", "cacheclip-paper", "stale", "full"]);
    let model = &said.models[0];
    assert_eq!((model.name.as_str(), model.max_tokens), (MODEL, MAX_TOKENS));
    assert_eq!(model.layout.as_ref().expect("a layout").id.len(), 32);
}

#[tokio::test]
async fn hit_rate_is_two_token_counters() {
    let fleet = Fleet::start().await;
    fleet.generate(ask(&["first"])).await.expect("an answer");
    // Counters are the process's own: other tests of this binary may have moved them too.
    let metrics = cacheclip_service::telemetry::render();
    for name in ["cacheclip_lookup_requested_tokens_total", "cacheclip_lookup_hit_tokens_total"] {
        let line = metrics.lines().find(|line| line.starts_with(name)).expect(name);
        let value: u64 = line.rsplit(' ').next().and_then(|value| value.parse().ok()).expect(line);
        assert!(value > 0, "{line}");
    }
    assert!(metrics.contains("cacheclip_gateway_ttft_seconds_bucket"), "{metrics}");
    assert!(metrics.contains("cacheclip_scorer_fallback_total{reason=\"timeout\"}"), "{metrics}");
}
