//! What is promised about deleting a document: it goes from stores, workers and scorers, what another one shares with it
//! stays, nobody deletes what is not theirs, and who was away is named until it has caught up.

mod support;

use cacheclip_bench::{Family, world};
use cacheclip_rpc::v1::{
    DeleteIngestedRequest, DeletionReceipt, GenerateRequest, IngestRequest, MissReason, Tier, TierDeletion,
};
use cacheclip_tests::ask::{ask, client, ingest, request};
use cacheclip_tests::fleet::{Fleet, Shape};
use cacheclip_tests::process::binary;
use cacheclip_tests::until;
use support::{Answer, TestFleet, chunk, containers, corpus, data, over, soon};
use tonic::{Request, Status};

fn document(name: &str, texts: &[&str]) -> IngestRequest {
    IngestRequest {
        document: name.to_owned(),
        chunks: texts.iter().map(|text| chunk(text)).collect(),
        ..Default::default()
    }
}

async fn delete(fleet: &TestFleet, tenant: &str, name: &str) -> Result<DeletionReceipt, Status> {
    let named = DeleteIngestedRequest { document: name.to_owned(), ..Default::default() };
    let mut request = Request::new(named);
    request.metadata_mut().insert("x-tenant", tenant.parse().expect("ASCII"));
    soon(fleet.client().delete_document(request)).await.map(tonic::Response::into_inner)
}

fn gone(receipt: &DeletionReceipt, tier: Tier) -> u32 {
    receipt.tiers.iter().find(|it| it.tier() == tier).map_or(0, |it: &TierDeletion| it.objects)
}

/// Chunks that workers of this process looked up with this outcome.
fn counted(label: &str) -> f64 {
    let metrics = cacheclip_service::telemetry::render();
    let lookups = metrics.lines().filter(|line| line.starts_with("cacheclip_chunk_lookups_total{"));
    lookups
        .filter(|line| line.contains(label))
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        .sum()
}

/// How each chunk was had: None for a hit.
fn missed(answer: &Answer) -> Vec<Option<MissReason>> {
    answer.chunks().iter().map(|chunk| (!chunk.hit).then(|| chunk.reason())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_document_is_gone_everywhere_and_what_another_one_shares_with_it_stays() {
    let data = data();
    let fleet = TestFleet::start(data.path()).await;
    let corpus = corpus(201, 1);
    let text = |at: usize| corpus.documents[at].text.as_str();
    let (shared, own, others) = (text(0), text(1), text(2));
    let documents = vec![document("one", &[shared, own]), document("two", &[shared, others])];
    let ingested = fleet.ingest(documents).await.expect("an ingest");
    assert!(ingested.iter().all(|progress| progress.chunks_unprepared == 0), "{ingested:?}");
    let question = over(&corpus, &corpus.questions[0]);
    let ask = GenerateRequest { chunks: [shared, own, others].map(chunk).to_vec(), ..question };
    let before = fleet.answer(ask.clone()).await;
    assert!(before.all_hit(), "{:?}", before.explain());
    let keys = before.keys();

    let receipt = delete(&fleet, "default", "one").await.expect("a receipt");
    assert_eq!((receipt.document.as_str(), &receipt.pending), ("one", &vec![]));
    assert!(receipt.generation > 0);
    // Its own chunk, of both models; the shared one stays, of both models.
    assert_eq!((gone(&receipt, Tier::StoreDisk), receipt.kept), (2, 2), "{receipt:?}");
    assert_eq!((gone(&receipt, Tier::WorkerRam), gone(&receipt, Tier::ScorerRam)), (1, 1), "{receipt:?}");
    let stored = containers(data.path());
    let here: Vec<bool> = keys.iter().map(|key| stored.contains_key(key)).collect();
    assert_eq!(here, [true, false, true], "the file of its own chunk is gone");
    let again = delete(&fleet, "default", "one").await.expect("a receipt");
    for tier in [Tier::StoreDisk, Tier::StoreRam] {
        assert_eq!(gone(&again, tier), gone(&receipt, tier), "asking again says the same of the stores");
    }
    assert_eq!((again.kept, &again.pending), (receipt.kept, &vec![]));
    assert_eq!(
        (gone(&again, Tier::WorkerRam), gone(&again, Tier::ScorerRam)),
        (0, 0),
        "RAM has forgotten it"
    );

    let misses = counted("reason=\"deleted\"");
    let after = fleet.answer(ask).await;
    assert_eq!(missed(&after), [None, Some(MissReason::Deleted), None]);
    // Counters are the process's own: other tests of this binary may have moved them too.
    assert!(counted("reason=\"deleted\"") > misses, "the worker counts it by its reason");
    assert_eq!(after.text(), before.text(), "a miss gives the answer that a hit gave");
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_cannot_delete_what_another_one_ingested() {
    let data = data();
    let fleet = TestFleet::start(data.path()).await;
    let corpus = corpus(202, 1);
    let texts: Vec<&str> = corpus.documents.iter().map(|document| document.text.as_str()).collect();
    fleet.ingest(vec![document("handbook", &texts)]).await.expect("an ingest");
    let receipt = delete(&fleet, "someone-else", "handbook").await.expect("a receipt");
    assert!(receipt.tiers.iter().all(|tier| tier.objects == 0), "{receipt:?}");
    assert_eq!((receipt.kept, &receipt.pending), (0, &vec![]), "it says nothing about anybody else's");
    let answer = fleet.answer(over(&corpus, &corpus.questions[0])).await;
    assert!(answer.all_hit(), "{:?}", answer.explain());
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_document_that_comes_again_after_its_deletion_is_there_again() {
    let data = data();
    let fleet = TestFleet::start(data.path()).await;
    let corpus = corpus(203, 1);
    let texts: Vec<&str> = corpus.documents.iter().map(|document| document.text.as_str()).collect();
    let handbook = || vec![document("handbook", &texts)];
    fleet.ingest(handbook()).await.expect("an ingest");
    let first = delete(&fleet, "default", "handbook").await.expect("a receipt");
    assert_eq!(gone(&first, Tier::WorkerRam) as usize, texts.len());
    let again = fleet.ingest(handbook()).await.expect("an ingest");
    assert_eq!(again.last().expect("progress").chunks_computed as usize, texts.len());
    assert!(fleet.answer(over(&corpus, &corpus.questions[0])).await.all_hit());
    let second = delete(&fleet, "default", "handbook").await.expect("a receipt");
    for tier in [Tier::StoreDisk, Tier::WorkerRam, Tier::ScorerRam] {
        assert_eq!(gone(&second, tier), gone(&first, tier), "{tier:?}");
    }
    assert!(second.generation > first.generation, "a deletion of its own");
    assert!(fleet.answer(over(&corpus, &corpus.questions[0])).await.all_missed());
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_document_whose_time_is_over_is_a_miss_that_says_so() {
    let data = data();
    // A worker without RAM: every chunk is asked of the store.
    let fleet = TestFleet::with(data.path(), |options| options.worker.ram_bytes = 0).await;
    let corpus = corpus(204, 1);
    let texts: Vec<&str> = corpus.documents.iter().map(|document| document.text.as_str()).collect();
    let brief = IngestRequest { ttl_seconds: 1, ..document("brief", &texts) };
    fleet.ingest(vec![brief]).await.expect("an ingest");
    let expired = async || {
        let answer = fleet.answer(over(&corpus, &corpus.questions[0])).await;
        let reasons = missed(&answer).into_iter().flatten().collect::<Vec<_>>();
        assert!(reasons.iter().all(|reason| *reason == MissReason::Expired), "{reasons:?}");
        !reasons.is_empty()
    };
    until("the document expires", expired).await;
    assert!(counted("reason=\"expired\"") > 0.0);
    fleet.stop().await;
}

#[tokio::test]
async fn a_store_that_is_away_is_pending_until_it_is_back_and_asked_again() {
    let Some(mut fleet) = Fleet::start(Shape { worker_ram: 1 << 30, ..Shape::default() }).await else {
        return;
    };
    let corpus = world::generate(205, 4, 1, &Family::ALL);
    let texts: Vec<&str> = corpus.documents.iter().map(|document| document.text.as_str()).collect();
    // A store that a holder never heard of has no name to be pending by.
    until("every holder has heard all stores", async || {
        let mut heard = true;
        for holder in fleet.workers.iter().chain(&fleet.scorers) {
            heard &= holder.sum("cacheclip_client_live_stores", &[]).await == fleet.stores.len() as f64;
        }
        heard
    })
    .await;
    let mut gateway = client(&fleet.gateway.endpoint());
    ingest(&mut gateway, &texts).await.expect("ingested");
    let questions = request(&texts, &corpus.questions[0].text);
    let answer = ask(&mut gateway, questions.clone()).await.expect("an answer");
    assert_eq!(answer.hits(), texts.len());

    fleet.stores[1].kill();
    let (code, receipt) = run_delete(&fleet);
    assert_eq!((code, &receipt["pending"]), (3, &serde_json::json!(["store store-1"])), "{receipt}");
    fleet.stores[1].restart();
    fleet.stores[1].ready().await;
    let mut last = serde_json::Value::Null;
    until("nothing is pending", async || {
        let (code, receipt) = run_delete(&fleet);
        assert!([0, 3].contains(&code), "{code}: {receipt}");
        last = receipt;
        code == 0
    })
    .await;
    assert_eq!(last["document"], "test");
    let objects = |tier: &str| {
        let tiers = last["tiers"].as_array().expect("tiers");
        tiers.iter().find(|it| it["tier"] == tier).map_or(0, |it| it["objects"].as_u64().expect("a number"))
    };
    assert_eq!(objects("store_disk") as usize, 2 * texts.len(), "of both models, from both stores: {last}");
    let answer = ask(&mut gateway, questions).await.expect("an answer");
    for chunk in &answer.explain.chunks {
        assert!(!chunk.hit && chunk.reason() == MissReason::Deleted, "{chunk:?}");
    }
}

/// `cacheclip delete test --json`: its exit code and its receipt.
fn run_delete(fleet: &Fleet) -> (i32, serde_json::Value) {
    let gateway = fleet.gateway.endpoint();
    let ran = std::process::Command::new(binary("cacheclip"))
        .args(["delete", "test", "--json", "--gateway", &gateway])
        .output()
        .expect("cacheclip runs");
    let printed = serde_json::from_slice(&ran.stdout);
    let receipt = printed.unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&ran.stderr)));
    (ran.status.code().expect("an exit code"), receipt)
}
