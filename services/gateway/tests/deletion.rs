//! What a gateway promises about documents: who is told whose they are, and who is asked to forget them.

mod support;

use cacheclip_rpc::status::invalid_field;
use cacheclip_rpc::v1;
use std::collections::BTreeSet;
use support::{Fake, Fleet, ask, chunk, options, soon, start_scorer, start_worker};
use tonic::{Code, Request, Status};

fn document(name: &str, salt: &str, ttl_seconds: u64) -> v1::IngestRequest {
    v1::IngestRequest {
        document: name.into(),
        salt: salt.into(),
        ttl_seconds,
        chunks: vec![chunk("first")],
        ..Default::default()
    }
}

fn from<T>(tenant: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("x-tenant", tenant.parse().expect("ASCII"));
    request
}

async fn ingest(
    fleet: &Fleet,
    tenant: &str,
    document: v1::IngestRequest,
) -> Result<v1::IngestProgress, Status> {
    let mut client = fleet.client.clone();
    soon(async {
        let request = from(tenant, tokio_stream::iter([document]));
        let mut stream = client.ingest(request).await?.into_inner();
        let mut last = v1::IngestProgress::default();
        while let Some(progress) = stream.message().await? {
            last = progress;
        }
        Ok(last)
    })
    .await
}

async fn delete(fleet: &Fleet, tenant: &str, name: &str, salt: &str) -> Result<v1::DeletionReceipt, Status> {
    let request =
        v1::DeleteIngestedRequest { document: name.into(), salt: salt.into(), ..Default::default() };
    soon(fleet.client.clone().delete_document(from(tenant, request))).await.map(tonic::Response::into_inner)
}

#[tokio::test]
async fn worker_and_scorer_are_told_the_same_document_and_when_it_expires() {
    let fleet = Fleet::start().await;
    ingest(&fleet, "acme", document("handbook", "", 60)).await.expect("ingested");
    let told = fleet.fake.state().holds.clone();
    let who: BTreeSet<_> = told.iter().map(|(who, _)| *who).collect();
    assert_eq!(who, BTreeSet::from(["scorer", "worker"]));
    let holds: Vec<&v1::Hold> = told.iter().map(|(_, hold)| hold.as_ref().expect("a hold")).collect();
    assert!(holds.iter().all(|hold| *hold == holds[0]), "{holds:?}");
    assert_eq!((holds[0].document.len(), holds[0].ttl_seconds), (32, 60));
    fleet.fake.state().holds.clear();
    ingest(&fleet, "acme", document("", "", 0)).await.expect("ingested");
    assert!(fleet.fake.state().holds.iter().all(|(_, hold)| hold.is_none()), "it belongs to no document");
}

#[tokio::test]
async fn a_deletion_asks_every_worker_and_every_scorer_about_the_document_of_the_caller() {
    let fake = Fake::default();
    let workers = [start_worker(&fake, "127.0.0.1:0").await, start_worker(&fake, "127.0.0.1:0").await];
    let scorers = [start_scorer(&fake).await, start_scorer(&fake).await];
    let mut options = options(&workers[0], Some(&scorers[0]));
    options.workers.push(workers[1].endpoint());
    options.scorers.push(scorers[1].endpoint());
    let fleet = Fleet::with_options(options, fake).await.keeping(workers.into_iter().chain(scorers));
    ingest(&fleet, "acme", document("handbook", "", 0)).await.expect("ingested");
    let ingested = fleet.fake.state().holds[0].1.clone().expect("a hold").document.to_vec();

    let receipt = delete(&fleet, "acme", "handbook", "").await.expect("a receipt");
    let mut asked = fleet.fake.state().deleted.clone();
    asked.sort();
    let expected = ["scorer", "scorer", "worker", "worker"].map(|who| (who, ingested.clone()));
    assert_eq!(asked, expected);
    assert_eq!((receipt.document.as_str(), receipt.generation, receipt.kept), ("handbook", 7, 1));
    assert_eq!(
        receipt.tiers,
        [
            v1::TierDeletion::of(v1::Tier::WorkerRam, 2, 20),
            v1::TierDeletion::of(v1::Tier::StoreDisk, 4, 40),
            v1::TierDeletion::of(v1::Tier::ScorerRam, 2, 20),
        ],
        "every one asked the same stores"
    );
    assert!(receipt.pending.is_empty());

    // Neither another tenant nor another salt means this document.
    for (tenant, salt) in [("other", ""), ("acme", "s")] {
        fleet.fake.state().deleted.clear();
        delete(&fleet, tenant, "handbook", salt).await.expect("a receipt");
        let asked = fleet.fake.state().deleted.clone();
        assert!(asked.len() == 4 && asked.iter().all(|(_, named)| *named != ingested), "{tenant} {salt}");
    }
}

#[tokio::test]
async fn who_is_away_is_pending_and_the_others_are_asked_all_the_same() {
    let mut fleet = Fleet::start().await;
    let scorer = fleet.scorer.take().expect("it runs");
    let name = format!("scorer {}", scorer.endpoint());
    scorer.drain().await;
    let receipt = delete(&fleet, "acme", "handbook", "").await.expect("a receipt");
    assert_eq!(receipt.pending, [name]);
    let asked: Vec<_> = fleet.fake.state().deleted.iter().map(|(who, _)| *who).collect();
    assert_eq!(asked, ["worker"]);
    let metrics = cacheclip_service::telemetry::render();
    assert!(metrics.contains("cacheclip_gateway_deletions_total{result=\"pending\"}"), "{metrics}");
}

#[tokio::test]
async fn chunks_that_no_scorer_prepared_are_told_to_whoever_ingests_them() {
    let mut fleet = Fleet::start().await;
    let progress = ingest(&fleet, "acme", document("handbook", "", 0)).await.expect("ingested");
    assert_eq!((progress.chunks_done, progress.chunks_unprepared), (1, 0));
    fleet.scorer.take().expect("it runs").drain().await;
    let progress = ingest(&fleet, "acme", document("handbook", "", 0)).await.expect("ingested");
    assert_eq!((progress.chunks_done, progress.chunks_unprepared), (1, 1));
}

#[tokio::test]
async fn a_deletion_that_names_no_document_is_refused_and_asks_nobody() {
    let fleet = Fleet::start().await;
    fleet.generate(ask(&["first"])).await.expect("the fleet works");
    let refused = delete(&fleet, "acme", "", "").await.expect_err("no name");
    assert_eq!(
        (refused.code(), invalid_field(&refused).as_deref()),
        (Code::InvalidArgument, Some("document"))
    );
    let long = "d".repeat(5000);
    let refused = delete(&fleet, "acme", &long, "").await.expect_err("too long");
    assert_eq!(invalid_field(&refused).as_deref(), Some("document"));
    let refused = delete(&fleet, "acme", "handbook", &long).await.expect_err("too long");
    assert_eq!(invalid_field(&refused).as_deref(), Some("salt"));
    assert!(fleet.fake.state().deleted.is_empty());
    let refused = ingest(&fleet, "acme", document("", "", 60)).await.expect_err("nothing that could expire");
    assert_eq!(invalid_field(&refused).as_deref(), Some("documents[0].document"));
}
