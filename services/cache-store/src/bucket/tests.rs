//! What a bucket that hangs, refuses or is damaged does to a store; what clients see of one that works is in
//! `tests/bucket.rs`.

mod remote;

use super::{Bucket, Objects};
use crate::clock::Clock;
use crate::core::Core;
use crate::journal::Claim;
use crate::options::Options;
use crate::testing::{self, Chunk};
use crate::upload::{Announced, Failed, Outcome, Writer};
use cacheclip_chunk::{DocumentId, LayoutId};
use cacheclip_rpc::v1::{MissReason, Tier};
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt as _};
use remote::Remote;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

const LAYOUT: LayoutId = LayoutId::from_bytes([1; 32]);
const DOCUMENT: DocumentId = DocumentId::from_bytes([9; 32]);
/// Well after any file was written.
const NOON: u64 = 4_000_000_000;
/// Longer than any test.
const FAR: Duration = Duration::from_secs(3600);
const READERS: usize = 8;

/// A data directory, a bucket and a clock; stores come and go.
struct Test {
    dir: TempDir,
    remote: Arc<Remote>,
    time: Arc<AtomicU64>,
    timeout: Duration,
}

impl Test {
    fn new() -> Self {
        let time = Arc::new(AtomicU64::new(NOON));
        Self { dir: tempfile::tempdir().unwrap(), remote: Arc::default(), time, timeout: FAR }
    }

    /// A store, whose bucket has been asked what it holds.
    async fn open(&self, change: impl FnOnce(&mut Options)) -> Arc<Core> {
        let mut options = testing::options(self.dir.path());
        change(&mut options);
        let remote = Arc::clone(&self.remote) as Arc<dyn ObjectStore>;
        let objects = Objects::of(remote, Path::from("node"), self.timeout);
        let bucket = Bucket::over(objects, options.bucket_queue);
        let clock = Clock::manual(Arc::clone(&self.time));
        let core = Core::open_with(&options, clock, Some(bucket)).await.unwrap();
        let (listed, asked) = oneshot::channel();
        tokio::spawn(super::run(Arc::downgrade(&core), core.closed.clone(), FAR, listed));
        asked.await.unwrap();
        core
    }

    /// The same without a disk.
    async fn open_elsewhere(&mut self, change: impl FnOnce(&mut Options)) -> Arc<Core> {
        self.dir = tempfile::tempdir().unwrap();
        self.open(change).await
    }

    fn at(&self, seconds: u64) {
        self.time.store(NOON + seconds, Ordering::Relaxed);
    }
}

/// Room for one chunk.
fn narrow(options: &mut Options) {
    options.disk_bytes = testing::chunk(1).bytes.len() as u64;
    options.ram_bytes = 0;
}

async fn until(what: &str, holds: impl AsyncFn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds().await {
        assert!(Instant::now() < deadline, "not within a minute: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

async fn uploaded(core: &Core, objects: u64) {
    until("what was put is in the bucket", async || core.stat().bucket_objects == objects).await;
}

/// Work on a thread that may block.
async fn at<T: Send + 'static>(core: &Arc<Core>, work: impl FnOnce(&Core) -> T + Send + 'static) -> T {
    let core = Arc::clone(core);
    tokio::task::spawn_blocking(move || work(&core)).await.unwrap()
}

async fn put_for(core: &Arc<Core>, chunk: &Chunk, claim: Option<Claim>) -> Result<Outcome, Failed> {
    let (frames, received) = mpsc::channel(1);
    frames.try_send(chunk.bytes.clone()).unwrap();
    drop(frames);
    let announced = Announced { layout: LAYOUT, key: chunk.key, bytes: chunk.bytes.len() as u64 };
    let writer = Writer { claim, begun: core.began(0) };
    at(core, move |core| core.receive(announced, writer, received, &CancellationToken::new())).await
}

async fn put(core: &Arc<Core>, chunk: &Chunk) {
    let outcome = put_for(core, chunk, None).await.unwrap();
    assert!(matches!(outcome, Outcome::Stored(_)), "{outcome:?}");
}

/// All of an object, and from where.
fn read(core: &Core, chunk: &Chunk) -> Result<Tier, MissReason> {
    let opened = core.open_object(LAYOUT, &chunk.key, &(0..0))?;
    for (index, entry) in opened.object.head.segments().iter().enumerate() {
        let stored = core.segment(&opened.object, index)?;
        assert_eq!(stored[..], chunk.bytes[entry.offset as usize..][..entry.stored_len as usize]);
    }
    Ok(opened.tier)
}

async fn get(core: &Arc<Core>, chunk: &Chunk) -> Result<Tier, MissReason> {
    let chunk = chunk.clone();
    at(core, move |core| read(core, &chunk)).await
}

async fn delete(core: &Arc<Core>, chunk: &Chunk) -> std::io::Result<(u32, u64)> {
    let key = chunk.key;
    at(core, move |core| core.delete(LAYOUT, &[key])).await
}

fn missing(core: &Core, chunk: &Chunk) -> Option<MissReason> {
    core.locate(LAYOUT, &chunk.key).err()
}

/// One chunk in the bucket alone, another one on disk.
async fn demoted(core: &Arc<Core>) -> (Chunk, Chunk) {
    let (first, second) = (testing::chunk(1), testing::chunk(2));
    put(core, &first).await;
    uploaded(core, 1).await;
    put(core, &second).await;
    uploaded(core, 2).await;
    assert_eq!(core.locate(LAYOUT, &first.key).unwrap().1, Tier::StoreBucket);
    assert!(!testing::path(core.disk.root(), &first.key).exists());
    (first, second)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_left_the_disk_comes_back_when_it_is_read_by_one_fetch_for_all_who_read_it() {
    let test = Test::new();
    let core = test.open(narrow).await;
    let (first, second) = demoted(&core).await;
    test.remote.gets.set(false);
    let before = test.remote.gets.arrived();
    let readers: Vec<_> = (0..READERS)
        .map(|_| {
            let (core, chunk) = (Arc::clone(&core), first.clone());
            tokio::task::spawn_blocking(move || read(&core, &chunk))
        })
        .collect();
    let id = (first.key, first.head.hash());
    let bucket = core.bucket.as_ref().unwrap();
    until("all readers wait", async || bucket.fetches.aboard(&id) == READERS).await;
    test.remote.gets.set(true);
    for reader in readers {
        assert_eq!(reader.await.unwrap(), Ok(Tier::StoreBucket));
    }
    assert_eq!(test.remote.gets.arrived() - before, 1);
    assert_eq!(get(&core, &first).await, Ok(Tier::StoreDisk));
    // It took the other one's room, which is no loss.
    assert_eq!(get(&core, &second).await, Ok(Tier::StoreBucket));
    assert_eq!(core.stat().disk_used_bytes, second.bytes.len() as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_waits_for_the_upload_of_its_object_and_removes_it() {
    let test = Test::new();
    let core = test.open(|_| {}).await;
    let chunk = testing::chunk(1);
    test.remote.puts.set(false);
    put(&core, &chunk).await;
    until("the upload is under way", async || test.remote.puts.arrived() == 1).await;
    let deleting = {
        let (core, chunk) = (Arc::clone(&core), chunk.clone());
        tokio::spawn(async move { delete(&core, &chunk).await })
    };
    until("it is out of service", async || missing(&core, &chunk) == Some(MissReason::Deleted)).await;
    assert!(!deleting.is_finished(), "the upload could still bring it back");
    test.remote.puts.set(true);
    assert_eq!(deleting.await.unwrap().unwrap().0, 1);
    assert!(!test.remote.has(&chunk).await);
    assert!(core.journal.doomed().unwrap().is_empty());
    // Whoever computes it anew may bring it.
    put(&core, &chunk).await;
    uploaded(&core, 1).await;
    assert!(test.remote.has(&chunk).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_that_the_bucket_refuses_is_not_complete_and_its_key_stays_out_of_service() {
    let mut test = Test::new();
    let core = test.open(|_| {}).await;
    let chunk = testing::chunk(1);
    put(&core, &chunk).await;
    uploaded(&core, 1).await;
    test.remote.down(true);
    let error = delete(&core, &chunk).await.unwrap_err();
    assert!(error.to_string().contains("bucket"), "{error}");
    assert_eq!(missing(&core, &chunk), Some(MissReason::Deleted));
    assert!(!testing::path(test.dir.path(), &chunk.key).exists(), "the disk waits for nobody");
    put_for(&core, &chunk, None).await.unwrap_err();
    assert!(at(&core, Core::sweep).await.is_err());
    // Not by a restart either, and not because the bucket has it.
    drop(core);
    let core = test.open(|_| {}).await;
    assert_eq!(missing(&core, &chunk), Some(MissReason::Deleted));
    test.remote.down(false);
    drop(core);
    let core = test.open(|_| {}).await;
    assert!(test.remote.has(&chunk).await && core.stat().bucket_objects == 0);
    assert_eq!(missing(&core, &chunk), Some(MissReason::Deleted));
    assert!(!at(&core, Core::sweep).await.unwrap());
    assert!(!test.remote.has(&chunk).await);
    put(&core, &chunk).await;
    // Nor is it forgotten with the disk.
    uploaded(&core, 1).await;
    delete(&core, &chunk).await.unwrap();
    drop(core);
    let core = test.open_elsewhere(|_| {}).await;
    assert_eq!(missing(&core, &chunk), Some(MissReason::NeverSeen));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_deleted_while_the_bucket_was_in_no_configuration_does_not_come_back() {
    let test = Test::new();
    let core = test.open(|_| {}).await;
    let (gone, left) = (testing::chunk(1), testing::chunk(2));
    put(&core, &gone).await;
    put(&core, &left).await;
    uploaded(&core, 2).await;
    drop(core);
    let without = testing::options(test.dir.path());
    let core = Core::open_at(&without, Clock::manual(Arc::clone(&test.time))).await.unwrap();
    delete(&core, &gone).await.unwrap();
    drop(core);
    let core = test.open(|_| {}).await;
    assert_eq!(missing(&core, &gone), Some(MissReason::Deleted));
    assert!(!test.remote.has(&gone).await && test.remote.has(&left).await);
    assert_eq!(core.stat().bucket_objects, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_that_refuses_or_hangs_costs_misses_and_nothing_else() {
    let mut test = Test::new();
    test.timeout = Duration::from_millis(50);
    let core = test.open(narrow).await;
    let (first, second) = demoted(&core).await;
    for hangs in [false, true] {
        test.remote.down(!hangs);
        test.remote.gets.set(!hangs);
        assert_eq!(get(&core, &first).await, Err(MissReason::Timeout), "hangs: {hangs}");
        assert_eq!(missing(&core, &first), None, "it is there, and known");
        assert_eq!(get(&core, &second).await, Ok(Tier::StoreDisk));
        test.remote.down(false);
        test.remote.gets.set(true);
        let (core, first) = (&core, &first);
        until("it is served again", async || get(core, first).await.is_ok()).await;
        until("so is the other", async || get(core, &second).await.is_ok()).await;
    }
    // Puts wait for nobody, and are uploaded later.
    test.remote.down(true);
    let third = testing::chunk(3);
    put(&core, &third).await;
    assert_eq!(get(&core, &third).await, Ok(Tier::StoreDisk));
    drop(core);
    test.remote.down(false);
    let core = test.open(narrow).await;
    uploaded(&core, 3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_starts_without_its_bucket_serves_its_disk_and_forgets_nothing() {
    let test = Test::new();
    let core = test.open(narrow).await;
    let (first, second) = demoted(&core).await;
    let claim = Claim { document: DOCUMENT, until: NOON + 100 };
    at(&core, move |core| core.hold(LAYOUT, &[first.key], claim, core.began(0))).await.unwrap();
    drop(core);
    test.remote.down(true);
    test.at(100);
    let core = test.open(narrow).await;
    assert_eq!(get(&core, &second).await, Ok(Tier::StoreDisk));
    let first = testing::chunk(1);
    assert_eq!(missing(&core, &first), Some(MissReason::NeverSeen));
    assert!(!at(&core, Core::sweep).await.unwrap(), "there is nothing to remove that is known");
    drop(core);
    // Its time is over, and that is not forgotten though its claim had ended before the bucket was listed.
    test.remote.down(false);
    let core = test.open(narrow).await;
    assert_eq!(missing(&core, &first), Some(MissReason::Expired));
    at(&core, Core::sweep).await.unwrap();
    assert!(!test.remote.has(&first).await && test.remote.has(&second).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_expires_goes_from_the_bucket_too() {
    let mut test = Test::new();
    let core = test.open(|_| {}).await;
    let chunk = testing::chunk(1);
    let claim = Some(Claim { document: DOCUMENT, until: NOON + 100 });
    put_for(&core, &chunk, claim).await.unwrap();
    uploaded(&core, 1).await;
    test.at(100);
    test.remote.down(true);
    assert!(at(&core, Core::sweep).await.is_err(), "the sweeper tries again");
    assert!(!testing::path(test.dir.path(), &chunk.key).exists());
    assert_eq!(get(&core, &chunk).await, Err(MissReason::Expired));
    test.remote.down(false);
    at(&core, Core::sweep).await.unwrap();
    assert!(!test.remote.has(&chunk).await);
    assert_eq!((core.stat().bucket_objects, missing(&core, &chunk)), (0, Some(MissReason::Expired)));

    // Renewed before it was swept, it stays, and its copy with it.
    test.at(0);
    put_for(&core, &chunk, claim).await.unwrap();
    uploaded(&core, 1).await;
    test.at(100);
    let longer = Claim { document: DOCUMENT, until: NOON + 200 };
    assert_eq!(put_for(&core, &chunk, Some(longer)).await.unwrap(), Outcome::Existed(chunk.head.hash()));
    at(&core, Core::sweep).await.unwrap();
    assert!(test.remote.has(&chunk).await && missing(&core, &chunk).is_none());
    drop(core);
    let core = test.open_elsewhere(|options| options.ttl_seconds = 1).await;
    assert_eq!(missing(&core, &chunk), Some(MissReason::Expired), "the other disk had its claim");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_finds_no_room_in_the_queue_is_uploaded_later_if_it_is_still_on_disk() {
    let test = Test::new();
    let core = test.open(|options| options.bucket_queue = 2).await;
    test.remote.puts.set(false);
    let chunks: Vec<Chunk> = (0..super::UPLOADS as u32 + 4).map(testing::chunk).collect();
    for (n, chunk) in chunks.iter().enumerate() {
        put(&core, chunk).await;
        let begun = (n + 1).min(super::UPLOADS);
        until("uploads have begun", async || test.remote.puts.arrived() == begun).await;
    }
    let bucket = core.bucket.as_ref().unwrap();
    assert_eq!(bucket.uploads.waiting(), 2);
    test.remote.puts.set(true);
    uploaded(&core, super::UPLOADS as u64 + 2).await;
    assert!(!test.remote.has(&chunks[super::UPLOADS + 3]).await);
    core.offer_all();
    uploaded(&core, chunks.len() as u64).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_evicted_before_it_was_uploaded_is_gone_unless_the_upload_was_under_way() {
    let test = Test::new();
    let core = test.open(narrow).await;
    test.remote.down(true);
    let (first, second) = (testing::chunk(1), testing::chunk(2));
    put(&core, &first).await;
    until("its upload has failed", async || core.bucket.as_ref().unwrap().uploads.is_idle()).await;
    test.remote.down(false);
    test.remote.puts.set(false);
    put(&core, &second).await;
    assert_eq!(missing(&core, &first), Some(MissReason::Evicted));
    until("the upload is under way", async || test.remote.puts.arrived() >= 2).await;
    put(&core, &testing::chunk(3)).await;
    test.remote.puts.set(true);
    until("it arrived", async || test.remote.has(&second).await).await;
    until("it is served", async || get(&core, &second).await.is_ok()).await;
    // What may be there of the first is removed.
    at(&core, Core::sweep).await.unwrap();
    assert!(!test.remote.has(&first).await);
    assert_eq!(missing(&core, &first), Some(MissReason::Evicted));
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_in_the_bucket_costs_one_chunk_which_is_removed_and_may_come_again() {
    let mut test = Test::new();
    let core = test.open(|_| {}).await;
    let chunks: Vec<Chunk> = (0..4).map(testing::chunk).collect();
    for chunk in &chunks {
        put(&core, chunk).await;
    }
    uploaded(&core, 4).await;
    drop(core);
    let at = chunks[1].head.segments()[2].offset as usize;
    test.remote.damage(&chunks[1], |bytes| bytes[at + 9] ^= 1).await;
    test.remote.damage(&chunks[2], |bytes| bytes[60] ^= 1).await;
    let other = test.remote.inner.get(&Remote::path(&chunks[0])).await.unwrap().bytes().await.unwrap();
    test.remote.damage(&chunks[3], |bytes| *bytes = other.to_vec()).await;
    let core = test.open_elsewhere(|_| {}).await;
    // What a head tells is found at once, the rest when it is read.
    for chunk in &chunks[2..] {
        assert_eq!(missing(&core, chunk), Some(MissReason::Corrupt));
    }
    assert_eq!(get(&core, &chunks[0]).await, Ok(Tier::StoreBucket));
    assert_eq!(get(&core, &chunks[1]).await, Err(MissReason::Corrupt));
    assert_eq!(missing(&core, &chunks[1]), Some(MissReason::Corrupt));
    assert_eq!(test.remote.names().await, [format!("{}.kv", chunks[0].key)]);
    put(&core, &chunks[1]).await;
    uploaded(&core, 2).await;
    drop(core);
    let core = test.open_elsewhere(|_| {}).await;
    assert_eq!(get(&core, &chunks[1]).await, Ok(Tier::StoreBucket));
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_on_disk_costs_nothing_where_the_bucket_has_a_copy() {
    let test = Test::new();
    let core = test.open(|options| options.ram_bytes = 0).await;
    let chunk = testing::chunk(1);
    put(&core, &chunk).await;
    uploaded(&core, 1).await;
    let opened = core.open_object(LAYOUT, &chunk.key, &(0..0)).unwrap();
    testing::flip(&testing::path(test.dir.path(), &chunk.key), chunk.head.segments()[1].offset + 3);
    let stored = at(&core, move |core| core.segment(&opened.object, 1)).await.unwrap();
    assert!(chunk.head.verify_segment(1, &stored).is_ok());
    assert_eq!((core.stat().objects, core.stat().quarantined), (1, 1));
    assert_eq!(get(&core, &chunk).await, Ok(Tier::StoreDisk));
}

#[tokio::test]
async fn a_large_object_goes_in_parts_and_one_that_nobody_wants_is_not_completed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("large");
    let bytes: Vec<u8> = (0..20u32 << 20).map(|n| (n >> 7) as u8).collect();
    std::fs::write(&path, &bytes).unwrap();
    let key = testing::chunk(1).key;
    let url = format!("file://{}/bucket", dir.path().display());
    for url in [url.as_str(), "memory:///"] {
        let objects = Objects::open(url, FAR).unwrap().below("node");
        let send = async |wanted: &dyn Fn() -> bool| {
            let file = std::fs::File::open(&path).unwrap();
            objects.send(&key, file, bytes.len() as u64, wanted).await.unwrap()
        };
        let asked = AtomicUsize::new(0);
        assert!(!send(&|| asked.fetch_add(1, Ordering::SeqCst) < 2).await);
        assert!(objects.list().await.unwrap().is_empty());
        assert!(send(&|| true).await);
        let (objects, expected) = (objects.clone(), bytes.clone());
        let came = tokio::task::spawn_blocking(move || {
            let mut frames = objects.fetch(&key).unwrap();
            let mut came = Vec::new();
            while let Some(frame) = frames.next().unwrap() {
                came.extend_from_slice(&frame);
            }
            came == expected
        });
        assert!(came.await.unwrap(), "{url}");
    }
}
