//! What a clock, a crash in between and a failing disk do to claims and deletions; what clients see of them is in
//! `tests/lifecycle.rs`.

use crate::catalogue::Record;
use crate::clock::Clock;
use crate::core::{Core, Doomed};
use crate::journal::{Claim, Journal, NEVER, Weight};
use crate::options::Options;
use crate::testing::{self, Chunk};
use crate::upload::{Announced, Outcome, Writer};
use cacheclip_chunk::{ChunkKey, DocumentId, LayoutId};
use cacheclip_rpc::v1::MissReason;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

const LAYOUT: LayoutId = LayoutId::from_bytes([1; 32]);
const DOCUMENT: DocumentId = DocumentId::from_bytes([9; 32]);
/// Well after any file was written.
const NOON: u64 = 4_000_000_000;

struct Test {
    dir: TempDir,
    time: Arc<AtomicU64>,
}

impl Test {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), time: Arc::new(AtomicU64::new(NOON)) }
    }

    async fn open(&self, change: impl FnOnce(&mut Options)) -> Arc<Core> {
        let mut options = testing::options(self.dir.path());
        change(&mut options);
        Core::open_at(&options, Clock::manual(Arc::clone(&self.time))).await.unwrap()
    }

    fn at(&self, seconds: u64) {
        self.time.store(NOON + seconds, Ordering::Relaxed);
    }
}

fn put(core: &Core, chunk: &Chunk, writer: Writer) -> Outcome {
    let (frames, received) = mpsc::channel(1);
    frames.try_send(chunk.bytes.clone()).unwrap();
    drop(frames);
    let announced = Announced { layout: LAYOUT, key: chunk.key, bytes: chunk.bytes.len() as u64 };
    // Frames are waited for where no runtime is.
    let receive = || core.receive(announced, writer, received, &CancellationToken::new());
    thread::scope(|scope| scope.spawn(receive).join()).unwrap().unwrap()
}

/// A writer that begins now, for a document or for none.
fn writer(core: &Core, claim: Option<Claim>) -> Writer {
    Writer { claim, begun: core.began(0) }
}

fn claim(until: u64) -> Option<Claim> {
    Some(Claim { document: DOCUMENT, until })
}

fn stored(core: &Core, chunk: &Chunk, claim: Option<Claim>) {
    assert!(matches!(put(core, chunk, writer(core, claim)), Outcome::Stored(_)));
}

fn reason(core: &Core, chunk: &Chunk) -> Option<MissReason> {
    core.catalogue.lock().find(LAYOUT, &chunk.key).err()
}

fn file(dir: &Path, chunk: &Chunk) -> bool {
    testing::path(dir, &chunk.key).exists()
}

#[tokio::test]
async fn what_has_expired_is_not_served_and_then_removed() {
    let test = Test::new();
    let core = test.open(|options| options.ttl_seconds = 1000).await;
    let chunks: Vec<Chunk> = (0..4).map(testing::chunk).collect();
    stored(&core, &chunks[0], claim(NOON + 10));
    stored(&core, &chunks[1], claim(NEVER));
    stored(&core, &chunks[2], claim(NOON + 10));
    stored(&core, &chunks[3], None);
    test.at(9);
    assert!(!core.sweep().unwrap());
    assert!(chunks.iter().all(|chunk| reason(&core, chunk).is_none()));
    // Comes again in time.
    assert!(matches!(put(&core, &chunks[2], writer(&core, claim(NOON + 30))), Outcome::Existed(_)));
    test.at(10);
    assert_eq!(reason(&core, &chunks[0]), Some(MissReason::Expired));
    assert!(file(test.dir.path(), &chunks[0]), "it is not served though it is not swept");
    core.sweep().unwrap();
    assert!(!file(test.dir.path(), &chunks[0]));
    assert_eq!(reason(&core, &chunks[0]), Some(MissReason::Expired));
    assert_eq!(core.stat().disk_used_bytes, chunks[1..].iter().map(|it| it.bytes.len() as u64).sum::<u64>());
    assert!([1, 2, 3].iter().all(|&n| reason(&core, &chunks[n]).is_none()));

    test.at(1000);
    core.sweep().unwrap();
    assert_eq!(
        core.stat().objects,
        1,
        "what nobody claims lives for its time, what is claimed for ever stays"
    );
    assert!(reason(&core, &chunks[1]).is_none());
    stored(&core, &chunks[0], None);
    assert!(reason(&core, &chunks[0]).is_none(), "what expired may come back");
}

#[tokio::test]
async fn an_expired_object_that_is_put_again_is_a_new_one() {
    let test = Test::new();
    let core = test.open(|_| ()).await;
    let chunk = testing::chunk(1);
    stored(&core, &chunk, claim(NOON + 10));
    test.at(20);
    stored(&core, &chunk, None);
    assert!(reason(&core, &chunk).is_none());
    test.at(5000);
    core.sweep().unwrap();
    drop(core);
    let core = test.open(|_| ()).await;
    assert!(reason(&core, &chunk).is_none(), "the old claim is forgotten");
}

#[tokio::test]
async fn what_expires_while_the_store_is_away_is_not_served_after_it() {
    let test = Test::new();
    let core = test.open(|_| ()).await;
    let chunk = testing::chunk(1);
    stored(&core, &chunk, claim(NOON + 10));
    drop(core);
    test.at(10);
    let core = test.open(|_| ()).await;
    assert_eq!(reason(&core, &chunk), Some(MissReason::Expired));
    core.sweep().unwrap();
    assert!(!file(test.dir.path(), &chunk));
}

#[tokio::test]
async fn a_deletion_that_a_crash_interrupted_is_finished_before_anything_is_served() {
    let test = Test::new();
    let core = test.open(|_| ()).await;
    let (chunk, other) = (testing::chunk(1), testing::chunk(2));
    stored(&core, &chunk, claim(NEVER));
    stored(&core, &other, None);
    let lock = core.disk.lock();
    drop(core);
    {
        // All that happens before the first file goes.
        let journal = Journal::open(&test.dir.path().join("journal.redb"), lock).unwrap();
        let weigh = |_: Option<LayoutId>, _: &ChunkKey| Some(Weight { disk: Some(7), ..Weight::default() });
        journal.delete_document(DOCUMENT, &[], NOON, weigh).unwrap();
    }
    assert!(file(test.dir.path(), &chunk));
    let core = test.open(|_| ()).await;
    assert!(!file(test.dir.path(), &chunk));
    assert_eq!((reason(&core, &chunk), reason(&core, &other)), (Some(MissReason::Deleted), None));
    assert!(core.journal.doomed().unwrap().is_empty());
    let again = core.delete_document(DOCUMENT, &[]).unwrap();
    assert_eq!((again.disk.bytes, &again.keys[..]), (7, &[chunk.key][..]), "the caller may ask again");
    // Nothing of it is left that would take what comes now.
    stored(&core, &chunk, claim(NEVER));
    drop(core);
    let core = test.open(|_| ()).await;
    assert!(reason(&core, &chunk).is_none());
}

#[tokio::test]
async fn a_file_that_cannot_be_removed_is_not_served_and_goes_later() {
    let test = Test::new();
    let core = test.open(|_| ()).await;
    let chunk = testing::chunk(1);
    stored(&core, &chunk, None);
    // A folder under the file's name cannot be removed as a file can, whoever tries.
    let path = testing::path(test.dir.path(), &chunk.key);
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    assert!(core.delete(LAYOUT, &[chunk.key]).is_err(), "not acknowledged");
    assert_eq!(reason(&core, &chunk), Some(MissReason::Deleted));
    assert_eq!(core.stat().disk_used_bytes, chunk.bytes.len() as u64, "bytes count until the file is gone");
    assert!(core.sweep().is_err());
    fs::remove_dir(&path).unwrap();
    core.sweep().unwrap();
    assert_eq!(core.stat().disk_used_bytes, 0);
    assert!(core.journal.doomed().unwrap().is_empty());
}

#[tokio::test]
async fn a_put_first_finishes_a_deletion_of_its_key() {
    let test = Test::new();
    let core = test.open(|_| ()).await;
    let chunk = testing::chunk(1);
    stored(&core, &chunk, None);
    let record = Record::from(&chunk.head);
    core.journal.delete(&[chunk.key], NOON).unwrap();
    // As a deletion leaves it whose file did not go.
    core.catalogue.lock().take(&chunk.key, MissReason::Deleted);
    core.doomed.lock().insert(chunk.key, Doomed { bytes: record.bytes, in_bucket: false });
    stored(&core, &chunk, None);
    assert_eq!(core.stat().disk_used_bytes, record.bytes);
    drop(core);
    let core = test.open(|_| ()).await;
    assert!(reason(&core, &chunk).is_none(), "the deletion is over and takes nothing more");
}

#[tokio::test]
async fn deletion_takes_damaged_copies_too() {
    let test = Test::new();
    let chunk = testing::chunk(1);
    let path = testing::lay(test.dir.path(), &chunk);
    testing::flip(&path, 60);
    let core = test.open(|_| ()).await;
    assert_eq!(core.stat().quarantined, 1);
    core.delete(LAYOUT, &[chunk.key]).unwrap();
    assert_eq!((core.stat().quarantined, core.stat().disk_used_bytes), (0, 0));
    assert_eq!(fs::read_dir(test.dir.path().join("quarantine")).unwrap().count(), 0);
}

#[tokio::test]
async fn a_write_under_way_ends_with_its_document() {
    let test = Test::new();
    let core = test.open(|_| ()).await;
    let chunks: Vec<Chunk> = (0..3).map(testing::chunk).collect();
    // Nothing of the document has come yet.
    let before = writer(&core, claim(NEVER));
    core.delete_document(DOCUMENT, &[]).unwrap();
    assert_eq!(put(&core, &chunks[0], before), Outcome::Deleted);
    // Its first frames have come when it is deleted.
    let (begun, announced) = (writer(&core, claim(NEVER)), &chunks[1]);
    let (frames, received) = mpsc::channel(1);
    let receiving = {
        let (core, bytes) = (Arc::clone(&core), announced.bytes.len() as u64);
        let announced = Announced { layout: LAYOUT, key: announced.key, bytes };
        tokio::task::spawn_blocking(move || {
            core.receive(announced, begun, received, &CancellationToken::new())
        })
    };
    let half = announced.bytes.len() / 2;
    frames.send(announced.bytes.slice(..half)).await.unwrap();
    // Room for one frame: the first has been taken when the second fits.
    frames.send(announced.bytes.slice(half..half + 1)).await.unwrap();
    core.delete_document(DOCUMENT, &[]).unwrap();
    frames.send(announced.bytes.slice(half + 1..)).await.unwrap();
    drop(frames);
    assert_eq!(receiving.await.unwrap().unwrap(), Outcome::Deleted);
    assert_eq!(core.stat().objects, 0);
    assert_eq!(core.stat().disk_used_bytes, 0);
    // Brought anew.
    stored(&core, &chunks[1], claim(NEVER));
    assert_eq!(core.delete_document(DOCUMENT, &[]).unwrap().disk.objects, 1);
}

#[tokio::test]
async fn pins_hold_against_pressure_and_end_with_their_time() {
    let test = Test::new();
    let size = testing::chunk(0).bytes.len() as u64;
    let core = test.open(|options| options.disk_bytes = 2 * size).await;
    let chunks: Vec<Chunk> = (0..4).map(testing::chunk).collect();
    stored(&core, &chunks[0], None);
    stored(&core, &chunks[1], None);
    let pinned = core.pin(LAYOUT, &[chunks[0].key, chunks[3].key], 60).unwrap();
    assert_eq!((pinned, core.stat().pinned_bytes), (1, size), "only what is here");
    stored(&core, &chunks[2], None);
    assert_eq!(reason(&core, &chunks[1]), Some(MissReason::Evicted));
    assert_eq!(core.pin(LAYOUT, &[chunks[2].key], 30).unwrap(), 1);
    assert_eq!(put(&core, &chunks[3], writer(&core, None)), Outcome::NoRoom, "all that is here is pinned");
    drop(core);
    let core = test.open(|options| options.disk_bytes = 2 * size).await;
    assert_eq!(core.stat().pinned_bytes, 2 * size);
    test.at(30);
    stored(&core, &chunks[3], None);
    assert_eq!(reason(&core, &chunks[2]), Some(MissReason::Evicted), "its pin has ended");
    assert_eq!(core.unpin(LAYOUT, &[chunks[0].key, chunks[3].key]).unwrap(), 1);
    stored(&core, &chunks[1], None);
    assert_eq!(reason(&core, &chunks[0]), Some(MissReason::Evicted));
}

#[tokio::test]
async fn a_pin_keeps_nothing_from_deletion() {
    let test = Test::new();
    let core = test.open(|_| ()).await;
    let chunk = testing::chunk(1);
    stored(&core, &chunk, None);
    core.pin(LAYOUT, &[chunk.key], 60).unwrap();
    assert_eq!(core.delete(LAYOUT, &[chunk.key]).unwrap().0, 1);
    stored(&core, &chunk, None);
    assert_eq!(core.stat().pinned_bytes, 0, "nor does it come back with the chunk");
}
