//! Auxiliary KV outlives the scorer that computed it: real scorers on the tiny model, a real store, loopback.

use bytes::Bytes;
use cacheclip_aux_scorer::Options;
use cacheclip_rpc::v1::cache_client::CacheClient;
use cacheclip_rpc::v1::scorer_client::ScorerClient;
use cacheclip_rpc::v1::{
    DeleteDocumentRequest, Hold, HolderDeletion, PrepareRequest, ScoreChunk, ScoreRequest, ScoreResponse,
    StatRequest, Tier,
};
use cacheclip_service::{ConnectOptions, Running, connect};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tonic::transport::Channel;

/// No test waits longer than this for anything.
const PATIENCE: Duration = Duration::from_secs(60);
const TEXTS: [&str; 3] = [
    "Report from Westhaven. Belmon keeps the sunny bell near the library.",
    "Report from Northmoor. Casrin carries Marvin's token near the school.",
    "Report from Eastmill. Marvin carries the sweet mirror near the island.",
];

async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what).await.expect("in time")
}

fn chunks(text: bool) -> Vec<ScoreChunk> {
    let chunk = |(n, it): (u8, &str)| ScoreChunk {
        digest: Bytes::from(vec![n; 32]),
        text: text.then(|| it.to_owned()),
    };
    (1..).zip(TEXTS).map(chunk).collect()
}

struct Scorer {
    running: Running,
    client: ScorerClient<Channel>,
}

impl Scorer {
    /// A scorer with cold RAM.
    async fn start(stores: &[String], load_timeout_seconds: f64) -> Self {
        let model_dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny/aux");
        let options =
            Options { model_dir, stores: stores.to_vec(), load_timeout_seconds, ..Options::default() };
        let running = soon(cacheclip_aux_scorer::start(options)).await.expect("a scorer starts");
        let channel = connect(&running.endpoint(), &ConnectOptions::default()).expect("a sound endpoint");
        Self { running, client: ScorerClient::new(channel) }
    }

    async fn score(&self, text: bool) -> ScoreResponse {
        let question = "\nQuestion: what does Casrin carry?\nAnswer: Casrin's".to_owned();
        let request = ScoreRequest { chunks: chunks(text), question, ..Default::default() };
        soon(self.client.clone().score(request)).await.expect("an answer").into_inner()
    }

    /// How many were computed, and how many were there; the indices whose text is needed.
    async fn prepare(&self, text: bool) -> (u32, u32, Vec<u32>) {
        self.prepare_for(chunks(text), None).await
    }

    /// The same of some chunks, for a document.
    async fn prepare_for(&self, chunks: Vec<ScoreChunk>, document: Option<u8>) -> (u32, u32, Vec<u32>) {
        let hold = document.map(|n| Hold { document: vec![n; 32].into(), ttl_seconds: 0 });
        let request = PrepareRequest { chunks, hold };
        let reply = soon(self.client.clone().prepare(request)).await.expect("an answer").into_inner();
        (reply.computed, reply.cached, reply.need_text)
    }

    async fn delete(&self, document: u8) -> HolderDeletion {
        let request = DeleteDocumentRequest { document: vec![document; 32].into(), ..Default::default() };
        soon(self.client.clone().delete_document(request)).await.expect("an answer").into_inner()
    }
}

async fn store(data: &Path, listen: &str) -> Running {
    let mut options = cacheclip_cache_store::Options { data_dir: data.join("store"), ..Default::default() };
    options.service.listen = listen.to_owned();
    cacheclip_cache_store::start(options).await.expect("a store starts")
}

async fn objects(store: &Running) -> u64 {
    let channel = connect(&store.endpoint(), &ConnectOptions::default()).expect("a sound endpoint");
    soon(CacheClient::new(channel).stat(StatRequest {})).await.expect("an answer").into_inner().objects
}

async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition().await {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scorer_with_cold_ram_answers_from_the_store_without_text() {
    let data = tempfile::tempdir().expect("a directory");
    let store = store(data.path(), "127.0.0.1:0").await;
    let first = Scorer::start(&[store.endpoint()], 30.0).await;
    assert_eq!(first.score(false).await.need_text, [0, 1, 2], "nobody has seen these chunks");
    let computed = first.score(true).await;
    assert_eq!((&computed.need_text[..], &computed.cold[..]), (&[][..], &[0, 1, 2][..]));
    assert_eq!(computed.sets.len(), 3);
    let warm = first.score(false).await;
    assert_eq!((&warm.sets, &warm.cold[..]), (&computed.sets, &[][..]));
    until("what was computed is stored behind", async || objects(&store).await == 3).await;
    first.running.drain().await;

    let second = Scorer::start(&[store.endpoint()], 30.0).await;
    let loaded = second.score(false).await;
    assert_eq!(loaded.need_text, [0; 0], "no text is needed");
    assert_eq!(loaded.cold, [0, 1, 2], "and it is told that RAM had none of them");
    assert_eq!(loaded.sets, computed.sets, "stored KV is the KV that was computed");
    assert_eq!(second.score(false).await.cold, [0; 0], "from now on it is in RAM");

    let alone = Scorer::start(&[], 30.0).await;
    assert_eq!(alone.score(false).await.need_text, [0, 1, 2], "the control: without stores there is nothing");
    let expected = alone.score(true).await;
    assert_eq!((expected.sets, expected.cold), (computed.sets, computed.cold));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_ingest_prepares_is_stored_when_it_is_reported() {
    let data = tempfile::tempdir().expect("a directory");
    let running = store(data.path(), "127.0.0.1:0").await;
    let (seeds, address) = ([running.endpoint()], running.grpc().to_string());
    let first = Scorer::start(&seeds, 30.0).await;
    assert_eq!(first.prepare(false).await, (0, 0, vec![0, 1, 2]));
    assert_eq!(first.prepare(true).await, (3, 0, vec![]));
    assert_eq!(objects(&running).await, 3);
    assert_eq!(first.prepare(false).await, (0, 3, vec![]));
    let second = Scorer::start(&seeds, 30.0).await;
    assert_eq!(second.prepare(false).await, (0, 3, vec![]), "another scorer need not compute it again");
    assert_eq!(second.score(false).await.need_text, [0; 0]);

    // The store loses everything: what is in RAM is stored again.
    running.drain().await;
    std::fs::remove_dir_all(data.path().join("store")).expect("removed");
    let running = store(data.path(), &address).await;
    until("the chunks are stored again", async || {
        let prepared = first.prepare(false).await;
        assert_eq!(prepared, (0, 3, vec![]), "RAM has them");
        objects(&running).await == 3
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stores_that_are_dead_or_never_answer_cost_a_bounded_wait_and_no_score() {
    let closed =
        std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("its address");
    // The kernel accepts connections to it; nobody ever speaks there, as in a process that was stopped.
    let stopped = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let stopped_at = stopped.local_addr().expect("its address");
    for address in [closed, stopped_at] {
        let scorer = Scorer::start(&[format!("http://{address}")], 1.0).await;
        let began = Instant::now();
        assert_eq!(scorer.score(false).await.need_text, [0, 1, 2]);
        assert!(began.elapsed() < Duration::from_secs(10), "{address}: {:?}", began.elapsed());
        assert_eq!(scorer.score(true).await.sets.len(), 3);
        assert_eq!(scorer.prepare(true).await, (0, 3, vec![]), "what RAM has is not computed again");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_chunk_twice_is_computed_once() {
    let scorer = Scorer::start(&[], 1.0).await;
    let twice = |text: bool| {
        let one = chunks(text)[0].clone();
        vec![one.clone(), one]
    };
    let request = PrepareRequest { chunks: twice(true), hold: None };
    let reply = soon(scorer.client.clone().prepare(request)).await.expect("an answer").into_inner();
    assert_eq!((reply.computed, reply.cached), (1, 1));
    let request = ScoreRequest { chunks: twice(false), question: "what?".into(), ..Default::default() };
    let reply = soon(scorer.client.clone().score(request)).await.expect("an answer").into_inner();
    assert_eq!((reply.sets.len(), reply.cold.len()), (2, 0));
}

/// Chunks that went from a tier.
fn gone(deletion: &HolderDeletion, tier: Tier) -> u32 {
    deletion.tiers.iter().find(|it| it.tier() == tier).map_or(0, |it| it.objects)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_document_is_forgotten_with_the_stores_and_what_another_one_holds_is_not() {
    let data = tempfile::tempdir().expect("a directory");
    let store = store(data.path(), "127.0.0.1:0").await;
    let scorer = Scorer::start(&[store.endpoint()], 30.0).await;
    let (one, two) = (chunks(true)[..2].to_vec(), chunks(true)[1..].to_vec());
    assert_eq!(scorer.prepare_for(one, Some(1)).await, (2, 0, vec![]));
    // One of them is there already, and claimed all the same.
    assert_eq!(scorer.prepare_for(two, Some(2)).await, (1, 1, vec![]));
    let deletion = scorer.delete(1).await;
    assert_eq!((deletion.kept, &deletion.pending), (1, &vec![]), "{deletion:?}");
    assert_eq!((gone(&deletion, Tier::StoreDisk), gone(&deletion, Tier::ScorerRam)), (1, 1), "{deletion:?}");
    assert_eq!(objects(&store).await, 2);
    assert_eq!(scorer.score(false).await.need_text, [0], "neither RAM nor the store has the first");
    assert_eq!(scorer.score(true).await.sets.len(), 3, "with its text it is scored again");
    // Its claim on the second chunk is the last.
    let deletion = scorer.delete(2).await;
    assert_eq!((gone(&deletion, Tier::ScorerRam), deletion.kept), (2, 0), "{deletion:?}");
    assert_eq!(scorer.score(false).await.need_text, [1, 2]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_that_no_store_can_record_is_told_and_a_scorer_without_stores_forgets_everything() {
    let data = tempfile::tempdir().expect("a directory");
    let store = store(data.path(), "127.0.0.1:0").await;
    let scorer = Scorer::start(&[store.endpoint()], 5.0).await;
    scorer.score(true).await;
    store.drain().await;
    let hold = Some(Hold { document: vec![1; 32].into(), ttl_seconds: 0 });
    let request = PrepareRequest { chunks: chunks(true), hold };
    let refused = soon(scorer.client.clone().prepare(request)).await.expect_err("no store is there");
    assert_eq!(refused.code(), tonic::Code::Unavailable, "{refused}");
    assert!(refused.message().contains("claim"), "{refused}");
    assert_eq!(scorer.delete(1).await.pending.len(), 1, "the store may still have it");

    let alone = Scorer::start(&[], 5.0).await;
    alone.score(true).await;
    assert_eq!(gone(&alone.delete(1).await, Tier::ScorerRam), 3);
    assert_eq!(alone.score(false).await.need_text, [0, 1, 2]);
}
