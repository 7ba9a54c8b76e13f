//! What a store promises of documents, deletion, pins and time, over a real port and real files.
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

mod common;
#[path = "index/process.rs"]
#[allow(dead_code, reason = "others ask a process for more")]
mod process;

use bytes::Bytes;
use cacheclip_cache_store::{Clock, Options, start_at};
use cacheclip_chunk::ChunkKey;
use cacheclip_rpc::convert::id_bytes;
use cacheclip_rpc::status::invalid_field;
use cacheclip_rpc::v1::put_response::Outcome;
use cacheclip_rpc::v1::{
    DeleteDocumentRequest, DeleteDocumentResponse, GetRequest, Hold, HoldRequest, LookupRequest, MissReason,
    PinRequest, PutHead, Tier, TierDeletion, UnpinRequest, kv_frame,
};
use cacheclip_service::{ConnectOptions, connect, telemetry};
use common::{Calls, LAYOUT, TestStore, bytes_on_disk, container, key, options};
use process::Process;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

const NOON: u64 = 4_000_000_000;

/// A document's claim for so many seconds; 0: for ever.
fn hold(document: u8, ttl_seconds: u64) -> Hold {
    Hold { document: Bytes::from(vec![document; 32]), ttl_seconds }
}

fn ids(numbers: &[u32]) -> Vec<Bytes> {
    numbers.iter().map(|n| id_bytes(key(*n).as_bytes())).collect()
}

fn layout() -> Bytes {
    id_bytes(LAYOUT.as_bytes())
}

/// What is asked of documents and pins.
trait Lifecycle: Calls {
    async fn bring(&self, n: u32, hold: Option<Hold>, generation: u64) -> Outcome {
        let bytes = container(n, 20);
        let (key, len) = (id_bytes(key(n).as_bytes()), bytes.len() as u64);
        let head = PutHead { layout: layout(), key, bytes: len, hold, generation };
        self.put_under(head, bytes).await.unwrap().outcome()
    }

    async fn claim(&self, numbers: &[u32], hold: Hold) -> u64 {
        let request =
            HoldRequest { layout: layout(), keys: ids(numbers), hold: Some(hold), ..HoldRequest::default() };
        self.client().hold(request).await.unwrap().into_inner().generation
    }

    async fn delete_document(&self, document: u8) -> DeleteDocumentResponse {
        self.delete_with(document, &[]).await
    }

    async fn delete_with(&self, document: u8, further: &[u32]) -> DeleteDocumentResponse {
        let request = DeleteDocumentRequest { document: Bytes::from(vec![document; 32]), keys: ids(further) };
        self.client().delete_document(request).await.unwrap().into_inner()
    }

    async fn pin(&self, numbers: &[u32], seconds: u64) -> u32 {
        let request = PinRequest { layout: layout(), keys: ids(numbers), seconds };
        self.client().pin(request).await.unwrap().into_inner().keys
    }

    async fn generation(&self) -> u64 {
        let request = LookupRequest { layout: layout(), keys: ids(&[99]), elsewhere: false };
        self.client().lookup(request).await.unwrap().into_inner().generation
    }

    async fn here(&self, n: u32) -> bool {
        self.lookup(LAYOUT, &[key(n)]).await[0].found
    }
}

impl<T: Calls> Lifecycle for T {}

fn went(tier: Tier, objects: u32) -> TierDeletion {
    TierDeletion { tier: tier.into(), objects, bytes: u64::from(objects) * container(0, 20).len() as u64 }
}

/// A store by a clock that the test sets.
async fn start(options: Options, time: &Arc<AtomicU64>) -> TestStore {
    let data = options.data_dir.clone();
    let running = start_at(options, Clock::manual(Arc::clone(time))).await.unwrap();
    let channel = connect(&running.endpoint(), &ConnectOptions::default()).unwrap();
    TestStore { running, client: cacheclip_rpc::v1::cache_client::CacheClient::new(channel), data }
}

#[tokio::test]
async fn a_shared_chunk_lives_on_while_another_document_holds_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = TestStore::start(options(dir.path())).await;
    for n in [1, 2] {
        assert_eq!(store.bring(n, Some(hold(1, 0)), 0).await, Outcome::Stored);
    }
    assert_eq!(store.bring(2, Some(hold(2, 0)), 0).await, Outcome::Existed, "which is a claim as well");
    store.claim(&[3], hold(2, 0)).await;
    assert_eq!(store.bring(3, None, 0).await, Outcome::Stored, "claimed before it came");

    let first = store.delete_document(1).await;
    assert_eq!((&first.keys[..], first.kept), (&ids(&[1])[..], 1));
    assert!(!store.here(1).await && store.here(2).await && store.here(3).await);
    assert_eq!(store.get(2).await.unwrap(), container(2, 20));

    let second = store.delete_document(2).await;
    assert!(second.generation > first.generation);
    assert_eq!((&second.keys[..], second.kept), (&ids(&[2, 3])[..], 0));
    assert_eq!(store.reason(2).await, MissReason::Deleted);
    assert_eq!(bytes_on_disk(&store.data), 0);
}

#[tokio::test]
async fn a_deletion_has_a_receipt_that_is_told_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = TestStore::start(options(dir.path())).await;
    for n in [1, 2, 3] {
        store.bring(n, Some(hold(1, 0)), 0).await;
    }
    store.get(2).await.unwrap();
    let receipt = store.delete_document(1).await;
    assert_eq!(receipt.generation, store.generation().await);
    assert_eq!(receipt.tiers, [went(Tier::StoreDisk, 3), went(Tier::StoreRam, 1)]);
    assert_eq!(receipt.keys, ids(&[1, 2, 3]));
    assert_eq!(store.stat().await.ram_used_bytes, 0);

    let told = |again: DeleteDocumentResponse| (again.tiers, again.keys, again.kept);
    let again = store.delete_document(1).await;
    assert!(again.generation > receipt.generation, "what began in between is refused, too");
    assert_eq!(told(again), told(receipt.clone()));
    let store = store.restart(options(dir.path())).await;
    assert_eq!(told(store.delete_document(1).await), told(receipt));

    let unknown = store.delete_document(7).await;
    assert_eq!(unknown.tiers, [went(Tier::StoreDisk, 0), went(Tier::StoreRam, 0)]);
    assert!(unknown.keys.is_empty());
}

#[tokio::test]
async fn copies_without_a_claim_go_with_the_document_that_another_store_knows_them_by() {
    let dir = tempfile::tempdir().unwrap();
    let store = TestStore::start(options(dir.path())).await;
    store.bring(1, Some(hold(1, 0)), 0).await;
    store.bring(2, None, 0).await;
    store.bring(3, Some(hold(2, 0)), 0).await;
    assert_eq!(store.delete_document(1).await.keys, ids(&[1]));
    let more = store.delete_with(1, &[2, 3]).await;
    assert_eq!(more.tiers, [went(Tier::StoreDisk, 2), went(Tier::StoreRam, 0)], "those of before, too");
    assert_eq!((&more.keys[..], more.kept), (&ids(&[1, 2])[..], 0));
    assert!(!store.here(2).await && store.here(3).await, "what another document claims stays");
}

#[tokio::test]
async fn what_was_begun_before_a_deletion_does_not_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let store = TestStore::start(options(dir.path())).await;
    let begun = store.generation().await;
    assert!(begun > 0, "0 is for who does not know");
    store.bring(1, Some(hold(1, 0)), begun).await;
    store.delete_document(1).await;
    store.delete(LAYOUT, &[key(5)]).await;
    // Computed before, put after: by the document's key, by a key that had not come, by one that was not here.
    assert_eq!(store.bring(1, None, begun).await, Outcome::Deleted);
    assert_eq!(store.bring(2, Some(hold(1, 0)), begun).await, Outcome::Deleted);
    assert_eq!(store.bring(5, None, begun).await, Outcome::Deleted);
    assert_eq!((store.stat().await.objects, bytes_on_disk(&store.data)), (0, 0));
    // Nobody else is harmed, and neither is who computes it anew.
    assert_eq!(store.bring(2, Some(hold(2, 0)), begun).await, Outcome::Stored);
    let store = store.restart(options(dir.path())).await;
    assert_eq!(store.bring(1, None, begun).await, Outcome::Deleted, "a restart forgets no deletion");
    assert_eq!(store.reason(1).await, MissReason::Deleted);
    let now = store.generation().await;
    assert_eq!(store.bring(1, Some(hold(1, 0)), now).await, Outcome::Stored);
    assert_eq!(store.delete_document(1).await.keys, ids(&[1]));
}

#[tokio::test]
async fn a_miss_says_at_which_generation_it_was_one() {
    let dir = tempfile::tempdir().unwrap();
    let store = TestStore::start(options(dir.path())).await;
    store.delete(LAYOUT, &[key(1)]).await;
    let generation = store.generation().await;
    let frames = store.get_layers(LAYOUT, &[key(1)], 0, 0).await;
    assert_eq!((frames.len(), frames[0].generation), (1, generation));
    assert!(matches!(frames[0].frame, Some(kv_frame::Frame::Missing(_))));
    let request = GetRequest { layout: layout(), key: id_bytes(key(1).as_bytes()) };
    let mut frames = store.client.clone().get(request).await.unwrap().into_inner();
    assert_eq!(frames.message().await.unwrap().unwrap().generation, generation);
    assert_eq!((store.members().await.generation, store.stat().await.generation), (generation, generation));
}

#[tokio::test]
async fn claims_pins_and_generation_survive_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let store = TestStore::start(options(dir.path())).await;
    for n in [1, 2] {
        store.bring(n, Some(hold(1, 0)), 0).await;
    }
    store.claim(&[2], hold(2, 0)).await;
    store.pin(&[1], 3600).await;
    store.delete(LAYOUT, &[key(9)]).await;
    let before = store.stat().await;
    assert_eq!(before.pinned_bytes, container(1, 20).len() as u64);
    let store = store.restart(options(dir.path())).await;
    assert_eq!(store.stat().await, before);
    let receipt = store.delete_document(1).await;
    assert_eq!((&receipt.keys[..], receipt.kept), (&ids(&[1])[..], 1), "a pin keeps nothing from deletion");
    assert_eq!(receipt.generation, before.generation + 1);
}

#[tokio::test]
async fn a_killed_store_has_forgotten_nothing_that_it_told() {
    let dir = tempfile::tempdir().unwrap();
    let begun = {
        let store = Process::start(dir.path(), "killed", &[]);
        let begun = store.generation().await;
        for n in [1, 2] {
            assert_eq!(store.bring(n, Some(hold(1, 0)), 0).await, Outcome::Stored);
        }
        store.claim(&[3], hold(2, 0)).await;
        assert_eq!(store.pin(&[2], 3600).await, 1);
        assert_eq!(store.delete(LAYOUT, &[key(1)]).await.objects, 1);
        begun
        // Dropping it kills it.
    };
    let store = Process::start(dir.path(), "killed", &[]);
    assert_eq!(store.bring(1, None, begun).await, Outcome::Deleted);
    assert!(store.stat().await.pinned_bytes > 0);
    assert_eq!(store.bring(3, None, 0).await, Outcome::Stored);
    assert_eq!(store.delete_document(2).await.keys, ids(&[3]));
    assert_eq!(store.delete_document(1).await.keys, ids(&[1, 2]));
}

#[tokio::test]
async fn what_has_expired_is_missing_for_that_reason() {
    let dir = tempfile::tempdir().unwrap();
    let time = Arc::new(AtomicU64::new(NOON));
    // The sweeper comes once, long after the test.
    let options = || Options { sweep_seconds: 3600.0, ttl_seconds: 500, ..options(dir.path()) };
    let store = start(options(), &time).await;
    store.bring(1, Some(hold(1, 100)), 0).await;
    store.bring(2, Some(hold(1, 100)), 0).await;
    store.bring(3, None, 0).await;
    store.get(1).await.unwrap();
    store.claim(&[2], hold(2, 200)).await;
    time.store(NOON + 100, Ordering::Relaxed);
    assert_eq!(store.reason(1).await, MissReason::Expired);
    assert_eq!(store.get(1).await, Err(MissReason::Expired), "RAM serves it no longer either");
    assert!(store.here(2).await, "another document's claim goes on");
    let store = {
        drop(store.client);
        store.running.drain().await;
        start(options(), &time).await
    };
    assert_eq!(store.reason(1).await, MissReason::Expired);
    // Ingest again renews, here or not.
    store.claim(&[2], hold(1, 400)).await;
    assert_eq!(store.bring(1, Some(hold(1, 400)), 0).await, Outcome::Existed, "renewed before it was swept");
    time.store(NOON + 499, Ordering::Relaxed);
    assert!(store.here(1).await && store.here(2).await);
    time.store(NOON + 500, Ordering::Relaxed);
    for n in [1, 2] {
        assert_eq!(store.reason(n).await, MissReason::Expired);
    }
    assert_eq!(store.bring(1, None, 0).await, Outcome::Stored, "what has expired is in nobody's way");
    assert!(store.here(1).await);
}

#[tokio::test]
async fn pinned_chunks_survive_pressure_and_probes_pin_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let size = container(0, 20).len() as u64;
    let options = Options { disk_bytes: 3 * size, ..options(dir.path()) };
    let store = TestStore::start(options).await;
    for n in 0..3 {
        store.bring(n, None, 0).await;
    }
    assert_eq!(store.pin(&[0, 1, 7], 3600).await, 2, "what is here");
    for n in 10..14 {
        assert_eq!(store.bring(n, None, 0).await, Outcome::Stored);
        store.lookup(LAYOUT, &[key(n)]).await;
    }
    assert!(store.here(0).await && store.here(1).await && store.here(13).await);
    assert_eq!(store.reason(12).await, MissReason::Evicted);
    assert_eq!(store.pin(&[13], 3600).await, 1);
    assert_eq!(store.bring(20, None, 0).await, Outcome::NoRoom);
    let request = UnpinRequest { layout: layout(), keys: ids(&[0, 20]) };
    assert_eq!(store.client.clone().unpin(request).await.unwrap().into_inner().keys, 1);
    assert_eq!(store.bring(20, None, 0).await, Outcome::Stored);
    assert_eq!(store.reason(0).await, MissReason::Evicted);
}

#[tokio::test]
async fn a_request_that_cannot_be_meant_names_its_field() {
    let dir = tempfile::tempdir().unwrap();
    let store = TestStore::start(options(dir.path())).await;
    let mut client = store.client.clone();
    let field = |status| invalid_field(&status);
    let pin = |seconds| PinRequest { layout: layout(), keys: ids(&[1]), seconds };
    for seconds in [0, 24 * 3600 + 1] {
        assert_eq!(field(client.pin(pin(seconds)).await.unwrap_err()).as_deref(), Some("seconds"));
    }
    let held = |hold| HoldRequest { layout: layout(), keys: ids(&[1]), hold, ..HoldRequest::default() };
    assert_eq!(field(client.hold(held(None)).await.unwrap_err()).as_deref(), Some("hold"));
    let short = Hold { document: Bytes::from_static(b"short"), ttl_seconds: 0 };
    let status = client.hold(held(Some(short))).await.unwrap_err();
    assert_eq!(field(status).as_deref(), Some("hold.document"));
    let status = client.delete_document(DeleteDocumentRequest::default()).await.unwrap_err();
    assert_eq!(field(status).as_deref(), Some("document"));
}

#[tokio::test]
async fn every_reason_for_a_miss_is_counted() {
    let dir = tempfile::tempdir().unwrap();
    let time = Arc::new(AtomicU64::new(NOON));
    let size = container(0, 20).len() as u64;
    let options = Options { disk_bytes: 3 * size, sweep_seconds: 3600.0, ..options(dir.path()) };
    let store = start(options, &time).await;
    let count = |reason: &str| -> f64 {
        let (text, series) =
            (telemetry::render(), format!("cacheclip_store_missing_chunks_total{{reason=\"{reason}\"}} "));
        let value = text.lines().find_map(|line| line.strip_prefix(&series)?.parse().ok());
        value.unwrap_or_else(|| panic!("{series} in {text}"))
    };
    let reasons =
        ["never_seen", "evicted", "expired", "deleted", "layout", "corrupt", "timeout", "unavailable"];
    let before = reasons.map(count);
    for n in 0..4 {
        store.bring(n, (n == 1).then(|| hold(1, 10)), 0).await;
    }
    store.delete(LAYOUT, &[key(2)]).await;
    std::fs::write(store.file(3), b"damage").unwrap();
    time.store(NOON + 10, Ordering::Relaxed);
    let keys: Vec<ChunkKey> = [50, 0, 1, 2, 3].map(key).to_vec();
    let missing = common::assemble(&store.get_layers(LAYOUT, &keys, 0, 0).await, keys.len());
    use MissReason::{Corrupt, Deleted, Evicted, Expired, NeverSeen};
    let told: Vec<_> = missing.iter().filter_map(|chunk| chunk.missing).collect();
    assert_eq!(told, [NeverSeen, Evicted, Expired, Deleted, Corrupt]);
    let other = cacheclip_chunk::LayoutId::from_bytes([7; 32]);
    store.bring(4, None, 0).await;
    store.get_layers(other, &[key(4)], 0, 0).await;
    // Other tests of this process may count at the same time.
    for (n, reason) in reasons.iter().enumerate().take(6) {
        assert!(count(reason) > before[n], "{reason}");
    }
}
