//! What a store with a bucket promises its clients: over a real port, real files, and a directory as bucket.
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

mod common;

use bytes::Bytes;
use cacheclip_cache_store::verify::{Finding, Listing};
use cacheclip_cache_store::{Options, open};
use cacheclip_chunk::Head;
use cacheclip_rpc::v1::put_response::Outcome;
use cacheclip_rpc::v1::{
    DeleteDocumentRequest, DeleteRequest, Hold, MissReason, PutHead, Tier, TierDeletion,
};
use common::{Calls, LAYOUT, TestStore, assemble, bytes_on_disk, container, key, layer, options};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tonic::Code;

const PATIENCE: Duration = Duration::from_secs(30);

/// Waits for a condition, with a deadline that a busy machine keeps too.
async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds().await {
        assert!(Instant::now() < deadline, "not within a minute: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn url(dir: &Path) -> String {
    format!("file://{}/bucket", dir.display())
}

/// A store of these numbered containers on disk, and all of them in its bucket.
fn with_bucket(dir: &Path, objects: u64) -> Options {
    let disk_bytes = objects * container(0, 20).len() as u64;
    Options { disk_bytes, bucket: Some(url(dir)), ..options(dir) }
}

/// The same with an empty disk.
fn elsewhere(dir: &Path) -> Options {
    Options { data_dir: dir.join("another"), ..with_bucket(dir, 10) }
}

fn in_bucket(dir: &Path, n: u32) -> PathBuf {
    let name = key(n).to_string();
    dir.join("bucket/store").join(&name[..2]).join(format!("{name}.kv"))
}

async fn uploaded(store: &TestStore, objects: u64) {
    until("everything is uploaded", async || store.stat().await.bucket_objects == objects).await;
}

async fn filled(options: Options, numbers: std::ops::Range<u32>) -> TestStore {
    let store = TestStore::start(options).await;
    for n in numbers {
        assert_eq!(store.put(container(n, 20)).await, Outcome::Stored);
        uploaded(&store, u64::from(n) + 1).await;
    }
    store
}

async fn tier(store: &TestStore, n: u32) -> Tier {
    let entries = store.lookup(LAYOUT, &[key(n)]).await;
    assert!(entries[0].found, "{n}");
    entries[0].tier()
}

#[tokio::test]
async fn what_left_the_disk_is_served_from_the_bucket_byte_for_byte() {
    let dir = tempfile::tempdir().unwrap();
    let store = filled(with_bucket(dir.path(), 2), 0..5).await;
    assert_eq!((store.stat().await.objects, store.stat().await.bucket_objects), (2, 5));
    assert_eq!(store.stat().await.bucket_used_bytes, 5 * container(0, 20).len() as u64);
    assert_eq!((tier(&store, 0).await, tier(&store, 4).await), (Tier::StoreBucket, Tier::StoreDisk));
    assert!(!store.file(0).exists());
    assert_eq!(fs::read(in_bucket(dir.path(), 0)).unwrap(), container(0, 20));

    let keys = [0, 4, 1].map(key);
    let arrived = assemble(&store.get_layers(LAYOUT, &keys, 1, 3).await, 3);
    assert_eq!(arrived[0].tier, Tier::StoreBucket);
    for (chunk, n) in [(0, 0), (1, 4), (2, 1)] {
        assert_eq!((arrived[chunk].missing, &arrived[chunk].segments[&2]), (None, &layer(n, 2, 20)));
    }
    for n in 0..5 {
        assert_eq!(store.get(n).await.unwrap(), container(n, 20));
    }
    let stat = store.stat().await;
    assert_eq!((stat.objects, stat.disk_used_bytes), (2, bytes_on_disk(&store.data)), "the cap holds");
}

#[tokio::test]
async fn a_store_with_an_empty_disk_finds_what_its_bucket_has() {
    let dir = tempfile::tempdir().unwrap();
    let store = filled(with_bucket(dir.path(), 10), 0..3).await;
    // Another node's objects are not this one's.
    let other = Options { node: "other".into(), ..elsewhere(dir.path()) };
    let store = store.restart(other).await;
    assert_eq!(store.stat().await.bucket_objects, 0);
    let store = store.restart(elsewhere(dir.path())).await;
    assert_eq!((store.stat().await.objects, store.stat().await.bucket_objects), (0, 3));
    assert_eq!(tier(&store, 1).await, Tier::StoreBucket);
    let entry = store.lookup(LAYOUT, &[key(1)]).await.remove(0);
    assert_eq!(entry.container_hash[..], Head::parse(&container(1, 20)).unwrap().hash().as_bytes()[..]);
    for n in 0..3 {
        assert_eq!(store.get(n).await.unwrap(), container(n, 20));
    }
    // What is there already is not uploaded again.
    let written = fs::metadata(in_bucket(dir.path(), 1)).unwrap().modified().unwrap();
    let store = store.restart(elsewhere(dir.path())).await;
    assert_eq!((store.stat().await.objects, store.stat().await.bucket_objects), (3, 3));
    assert_eq!(fs::metadata(in_bucket(dir.path(), 1)).unwrap().modified().unwrap(), written);
    // What a bucket lost comes there again.
    fs::remove_file(in_bucket(dir.path(), 2)).unwrap();
    let store = store.restart(elsewhere(dir.path())).await;
    uploaded(&store, 3).await;
    assert_eq!(fs::read(in_bucket(dir.path(), 2)).unwrap(), container(2, 20));
}

#[tokio::test]
async fn a_deleted_document_is_gone_from_the_bucket_and_does_not_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let store = TestStore::start(with_bucket(dir.path(), 2)).await;
    let document = Bytes::from(vec![1; 32]);
    for n in 0..4 {
        let bytes = container(n, 20);
        let head = PutHead {
            layout: Bytes::copy_from_slice(LAYOUT.as_bytes()),
            key: Bytes::copy_from_slice(key(n).as_bytes()),
            bytes: bytes.len() as u64,
            hold: (n < 3).then(|| Hold { document: document.clone(), ttl_seconds: 0 }),
            generation: 0,
        };
        assert_eq!(store.put_under(head, bytes).await.unwrap().outcome(), Outcome::Stored);
        uploaded(&store, u64::from(n) + 1).await;
    }
    let request = DeleteDocumentRequest { document: document.clone(), keys: Vec::new() };
    let receipt = store.client.clone().delete_document(request).await.unwrap().into_inner();
    let size = container(0, 20).len() as u64;
    let went = |tier, objects| TierDeletion::of(tier, objects, objects as u64 * size);
    let expected = [went(Tier::StoreDisk, 1), went(Tier::StoreRam, 0), went(Tier::StoreBucket, 3)];
    assert_eq!(receipt.tiers, expected);
    for n in 0..3 {
        assert!(!in_bucket(dir.path(), n).exists());
        assert_eq!(store.get(n).await, Err(MissReason::Deleted));
    }
    assert!(in_bucket(dir.path(), 3).exists());
    let deleted = store.delete(LAYOUT, &[key(3), key(7)]).await;
    assert_eq!((deleted.objects, deleted.bytes), (1, size));
    assert_eq!((bytes_on_disk(&store.data), store.stat().await.bucket_objects), (0, 0));
    for options in [with_bucket(dir.path(), 2), elsewhere(dir.path())] {
        let again = TestStore::start(Options { data_dir: options.data_dir.join("again"), ..options }).await;
        assert_eq!(again.stat().await.bucket_objects, 0);
        again.running.drain().await;
    }
}

#[tokio::test]
async fn a_damaged_object_of_the_bucket_costs_one_chunk() {
    let dir = tempfile::tempdir().unwrap();
    let store = filled(with_bucket(dir.path(), 10), 0..3).await;
    let store = store.restart(elsewhere(dir.path())).await;
    let entry = Head::parse(&container(1, 20)).unwrap().segments()[1];
    let mut bytes = container(1, 20).to_vec();
    bytes[entry.offset as usize + 3] ^= 0x40;
    fs::write(in_bucket(dir.path(), 1), bytes).unwrap();
    let arrived = assemble(&store.get_layers(LAYOUT, &[0, 1, 2].map(key), 0, 0).await, 3);
    let missing: Vec<_> = arrived.iter().map(|chunk| chunk.missing).collect();
    assert_eq!(missing, [None, Some(MissReason::Corrupt), None]);
    assert_eq!(store.reason(1).await, MissReason::Corrupt);
    assert!(!in_bucket(dir.path(), 1).exists());
    assert_eq!(store.stat().await.bucket_objects, 2);
    // It was computed anew.
    assert_eq!(store.put(container(1, 20)).await, Outcome::Stored);
    uploaded(&store, 3).await;
    assert_eq!(fs::read(in_bucket(dir.path(), 1)).unwrap(), container(1, 20));
}

#[tokio::test]
async fn a_bucket_that_cannot_be_reached_costs_misses_and_holds_up_deletions_only() {
    let dir = tempfile::tempdir().unwrap();
    let quick = Options { sweep_seconds: 0.05, bucket_timeout_seconds: 0.2, ..with_bucket(dir.path(), 2) };
    let store = filled(quick, 0..3).await;
    let (bucket, away) = (dir.path().join("bucket"), dir.path().join("away"));
    fs::rename(&bucket, &away).unwrap();
    fs::write(&bucket, b"no folder").unwrap();

    assert_eq!(store.get(0).await, Err(MissReason::Timeout));
    assert_eq!(tier(&store, 0).await, Tier::StoreBucket);
    assert_eq!(store.get(2).await.unwrap(), container(2, 20));
    assert_eq!(store.put(container(5, 20)).await, Outcome::Stored);
    let request = DeleteRequest {
        layout: Bytes::copy_from_slice(LAYOUT.as_bytes()),
        keys: vec![Bytes::copy_from_slice(key(2).as_bytes())],
    };
    let status = store.client.clone().delete(request).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    assert!(status.message().contains("bucket"), "{status}");
    assert_eq!(store.get(2).await, Err(MissReason::Deleted), "out of service at once");

    fs::remove_file(&bucket).unwrap();
    fs::rename(&away, &bucket).unwrap();
    until("the deletion is completed", async || !in_bucket(dir.path(), 2).exists()).await;
    until("what was put meanwhile is uploaded", async || in_bucket(dir.path(), 5).exists()).await;
    until("what was missing is served", async || store.get(0).await == Ok(container(0, 20))).await;
    assert_eq!(store.put(container(2, 20)).await, Outcome::Stored);
}

#[tokio::test]
async fn an_option_that_cannot_work_is_named() {
    let dir = tempfile::tempdir().unwrap();
    for (field, bucket, bucket_queue, bucket_timeout_seconds) in [
        ("bucket:", "not a url", 1, 1.0),
        ("bucket:", "ftp://host/path", 1, 1.0),
        ("bucket:", "gs://name/path", 1, 1.0),
        ("bucket_queue:", "memory:///", 0, 1.0),
        ("bucket_timeout_seconds:", "memory:///", 1, 0.0),
    ] {
        let options = Options {
            bucket: Some(bucket.into()),
            bucket_queue,
            bucket_timeout_seconds,
            ..options(dir.path())
        };
        let error = open(options).await.unwrap_err().to_string();
        assert!(
            error.starts_with(field) && error.contains(if field == "bucket:" { "s3://" } else { "above" }),
            "{error}"
        );
    }
    // Nothing is asked of it before it is used.
    let options = Options { bucket: Some("s3://name/prefix".into()), ..options(dir.path()) };
    open(options).await.unwrap();
}

#[tokio::test]
async fn a_bucket_in_memory_serves_as_long_as_its_process() {
    let dir = tempfile::tempdir().unwrap();
    let options = || Options { bucket: Some("memory:///".into()), ..with_bucket(dir.path(), 1) };
    let store = filled(options(), 0..3).await;
    for n in 0..3 {
        assert_eq!(store.get(n).await.unwrap(), container(n, 20));
    }
    let store = store.restart(options()).await;
    assert!(store.stat().await.bucket_objects <= 1);
    assert_eq!(store.get(2).await.unwrap(), container(2, 20));
}

#[tokio::test]
async fn verify_tells_the_damage_of_a_bucket_apart() {
    let dir = tempfile::tempdir().unwrap();
    let store = filled(with_bucket(dir.path(), 10), 0..4).await;
    let check = async |url: String| {
        let listing = Listing::bucket(&url, PATIENCE).await.unwrap();
        tokio::task::spawn_blocking(move || listing.check(&|_| {})).await.unwrap()
    };
    for url in [url(dir.path()), format!("{}/store", url(dir.path()))] {
        let report = check(url).await;
        assert_eq!((report.good, &report.findings[..]), (4, &[][..]));
        assert_eq!(report.bytes, 4 * container(0, 20).len() as u64);
        assert!(report.is_complete() && !report.is_damaged());
    }
    store.running.drain().await;

    let offset = Head::parse(&container(1, 20)).unwrap().segments()[2].offset as usize;
    let mut bytes = container(1, 20).to_vec();
    bytes[offset + 1] ^= 1;
    fs::write(in_bucket(dir.path(), 1), &bytes).unwrap();
    fs::write(in_bucket(dir.path(), 2), &container(2, 20)[..5000]).unwrap();
    fs::write(in_bucket(dir.path(), 3), container(0, 20)).unwrap();
    fs::write(dir.path().join("bucket/store/notes.txt"), b"?").unwrap();
    let report = check(url(dir.path())).await;
    assert!(report.is_damaged() && report.is_complete() && report.good == 1);
    let of = |path: PathBuf| {
        let path = path.strip_prefix(dir.path().join("bucket")).unwrap().to_owned();
        let found = report.findings.iter().filter(|it| it.path == path);
        found.map(|it| it.finding.clone()).collect::<Vec<_>>()
    };
    assert_eq!(of(in_bucket(dir.path(), 1)), [Finding::DamagedSegments { segments: vec![2] }]);
    assert!(
        matches!(&of(in_bucket(dir.path(), 2))[..], [Finding::DamagedContainer { why }] if why.contains("5000"))
    );
    assert_eq!(of(in_bucket(dir.path(), 3)), [Finding::OtherKey { holds: key(0).to_string() }]);
    assert_eq!(of(dir.path().join("bucket/store/notes.txt")), [Finding::ForeignName]);
    assert_eq!(report.findings.len(), 4);

    for url in [format!("file://{}/nothing", dir.path().display()), "ftp://x/y".into()] {
        let error = Listing::bucket(&url, PATIENCE).await.unwrap_err().to_string();
        assert!(error.contains("bucket") || error.contains("s3://"), "{error}");
    }
}
