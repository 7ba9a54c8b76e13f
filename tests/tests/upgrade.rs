//! What the fleet promises while parts of it differ: processes of two ages side by side.

use cacheclip_bench::{Family, world};
use cacheclip_tests::ask::{ask, client, ingest, request};
use cacheclip_tests::comes_about;
use cacheclip_tests::process::Process;
use std::path::{Path, PathBuf};
use tonic::Code;

/// The small primary model behind another anchor.
fn with_another_anchor(dir: &Path) -> PathBuf {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tiny/primary");
    let copy = dir.join("another-anchor");
    std::fs::create_dir(&copy).expect("a directory");
    for entry in std::fs::read_dir(model).expect("the small model") {
        let entry = entry.expect("an entry");
        std::fs::copy(entry.path(), copy.join(entry.file_name())).expect("a copy");
    }
    let changed = r#"{"anchor": "These are the papers.", "joiner": "\n", "stop": ["\n"]}"#;
    std::fs::write(copy.join("prompt.json"), changed).expect("a prompt format");
    copy
}

#[tokio::test]
async fn a_worker_with_another_anchor_never_answers_for_the_gateways_keys() {
    let dir = tempfile::tempdir().expect("a directory");
    let data = format!("data_dir={}", dir.path().join("store").display());
    let mut store = Process::service("cacheclip-cache-store", dir.path(), &[data]);
    let stores = format!("stores=[\"{}\"]", store.endpoint());
    let other = format!("model_dir={}", with_another_anchor(dir.path()).display());
    let mut fitting = Process::service(
        "cacheclip-gpu-worker",
        dir.path(),
        &[stores.clone(), "ram_bytes=1".into(), "loading=\"always\"".into()],
    );
    let mut differing = Process::service("cacheclip-gpu-worker", dir.path(), &[stores.clone(), other]);
    let mut scorer = Process::service("cacheclip-aux-scorer", dir.path(), &[stores]);
    let settings = [
        format!("workers=[\"{}\",\"{}\"]", differing.endpoint(), fitting.endpoint()),
        format!("scorers=[\"{}\"]", scorer.endpoint()),
    ];
    let mut gateway = Process::service("cacheclip-gateway", dir.path(), &settings);
    for process in [&mut store, &mut fitting, &mut differing, &mut scorer, &mut gateway] {
        process.ready().await;
    }

    let corpus = world::generate(41, 4, 8, &Family::ALL);
    let texts: Vec<&str> = corpus.documents.iter().map(|document| document.text.as_str()).collect();
    let mut caller = client(&gateway.endpoint());
    let computed = ingest(&mut caller, &texts).await.expect("ingested by the worker that fits");
    assert_eq!(computed as usize, texts.len());
    let mut asked = 0;
    let refused = comes_about(async || {
        for question in &corpus.questions {
            let chunks: Vec<&str> = question.chunks.iter().map(|&index| texts[index]).collect();
            let answer = ask(&mut caller, request(&chunks, &question.text)).await.expect("an answer");
            assert_eq!(answer.hits(), chunks.len(), "of what was ingested");
            asked += 1;
        }
        differing.sum("cacheclip_rpc_requests_total", &["code=\"FAILED_PRECONDITION\""]).await > 0.0
    });
    assert!(refused.await, "{asked} requests and none was routed to the differing worker");
    assert_eq!(differing.sum("cacheclip_recomputed_tokens_total", &[]).await, 0.0, "which computed nothing");

    fitting.kill();
    let last = &corpus.questions[0];
    let chunks: Vec<&str> = last.chunks.iter().map(|&index| texts[index]).collect();
    let refused = ask(&mut caller, request(&chunks, &last.text)).await.expect_err("nobody is left who may");
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
}
