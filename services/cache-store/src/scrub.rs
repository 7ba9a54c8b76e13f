//! The scrubber: reads every object again, in turn and slowly, so that damage is found before a reader finds it.
//!
//! A pass takes the keys that are here at its start, reads each object's head and segments from the medium, compares
//! them with the container hash of the catalogue and the digests of the head, and looks at one segment of each object
//! in RAM. What comes during a pass was verified when it was put and gets its turn in the next.

use crate::core::Core;
use crate::disk;
use crate::metrics;
use crate::read::{Damage, check_head, check_segment};
use cacheclip_chunk::{ChunkKey, ContainerHash, Head};
use rustix::fs::{Advice, fadvise};
use std::fs::File;
use std::sync::Weak;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// From one pass's start to the next one's, at least: a small store is not read over and over.
const PASS_EVERY: Duration = Duration::from_secs(3600);

/// Goes over a store's objects, pass after pass, reading so many bytes per second, until the store is gone. Holds the
/// store only for the read of one segment at a time.
pub(crate) async fn run(store: Weak<Core>, closed: CancellationToken, bytes_per_second: u64) {
    if bytes_per_second == 0 {
        return;
    }
    let mut serial = 0;
    loop {
        let started = Instant::now();
        let Some(mut pass) = store.upgrade().map(|core| Pass::new(&core, serial)) else { return };
        loop {
            let began = Instant::now();
            let Some(core) = store.upgrade() else { return };
            let stepped = tokio::task::spawn_blocking(move || {
                let read = pass.step(&core);
                (pass, read)
            });
            let Ok((back, read)) = stepped.await else {
                return tracing::error!(
                    "the scrubber panicked: objects are not read again until the next start"
                );
            };
            pass = back;
            let Some(bytes) = read else { break };
            let due = Duration::from_secs_f64(bytes as f64 / bytes_per_second as f64);
            if !rest(&closed, due.saturating_sub(began.elapsed())).await {
                return;
            }
        }
        metrics::scrub_passed();
        serial += 1;
        if !rest(&closed, PASS_EVERY.saturating_sub(started.elapsed())).await {
            return;
        }
    }
}

/// Waits; false where the store closes meanwhile.
async fn rest(closed: &CancellationToken, time: Duration) -> bool {
    tokio::select! {
        biased;
        () = closed.cancelled() => false,
        () = tokio::time::sleep(time) => true,
    }
}

/// A whole pass at once. Blocking.
#[cfg(test)]
pub(crate) fn pass(core: &Core, serial: usize) -> u64 {
    let mut pass = Pass::new(core, serial);
    std::iter::from_fn(|| pass.step(core)).sum()
}

/// Where a pass is.
#[derive(Debug)]
struct Pass {
    /// How many there were before: which segments in RAM are looked at.
    serial: usize,
    keys: std::vec::IntoIter<ChunkKey>,
    object: Option<Object>,
}

/// An object whose head was good, and the segment that comes next.
#[derive(Debug)]
struct Object {
    file: File,
    head: Head,
    next: usize,
}

impl Pass {
    fn new(core: &Core, serial: usize) -> Self {
        let keys: Vec<ChunkKey> = core.catalogue.lock().records().map(|(key, _)| key).collect();
        Self { serial, keys: keys.into_iter(), object: None }
    }

    /// Reads one segment, or an object's head; how many bytes that were. None where the pass is over.
    fn step(&mut self, core: &Core) -> Option<u64> {
        let Some(object) = self.object.take() else {
            let key = self.keys.next()?;
            let (object, bytes) = self.begin(core, key);
            self.object = object;
            return Some(bytes);
        };
        let Some(entry) = object.head.segments().get(object.next) else {
            metrics::scrubbed_object();
            return Some(0);
        };
        let stored = uncached(&object.file, entry.offset, entry.stored_len as usize);
        let stored = stored.and_then(|stored| check_segment(&object.head, object.next, stored));
        metrics::scrubbed(entry.stored_len);
        let bytes = entry.stored_len;
        match stored {
            Ok(_) => self.object = Some(Object { next: object.next + 1, ..object }),
            Err(damage) => blame(core, &object.head.key(), object.head.hash(), damage),
        }
        Some(bytes)
    }

    fn begin(&self, core: &Core, key: ChunkKey) -> (Option<Object>, u64) {
        let Some(record) = core.catalogue.lock().on_disk(&key) else { return (None, 0) };
        let sampled = self.sample(core, &key);
        let read = || -> Result<Object, Damage> {
            let file = core.disk.open_object(&key)?;
            let head = check_head(&uncached(&file, 0, record.head_len)?, record.hash)?;
            Ok(Object { file, head, next: 0 })
        };
        let object = read();
        metrics::scrubbed(record.head_len as u64);
        let bytes = sampled + record.head_len as u64;
        match object {
            Ok(object) => (Some(object), bytes),
            Err(damage) => {
                blame(core, &key, record.hash, damage);
                (None, bytes)
            }
        }
    }

    /// Looks at one of an object's segments in RAM, another one in every pass; its bytes. A damaged one costs the
    /// object its place in RAM and nothing else: its file is a copy of its own.
    fn sample(&self, core: &Core, key: &ChunkKey) -> u64 {
        let Some(object) = core.ram.lock().peek(key).cloned() else { return 0 };
        let count = object.head.segments().len();
        let rotated = (0..count).map(|at| (at + self.serial) % count);
        let Some((index, stored)) = rotated.into_iter().find_map(|it| Some((it, object.segment(it)?))) else {
            return 0;
        };
        let bytes = stored.len() as u64;
        metrics::scrubbed(bytes);
        if let Err(why) = object.head.verify_segment(index, &stored) {
            metrics::verify_failed(metrics::AT_SCRUB_RAM);
            tracing::error!(%key, %why, "memory is damaged: the object leaves RAM; look at this machine's memory");
            core.ram.lock().remove_this(&object);
            core.gauge();
        }
        bytes
    }
}

/// Part of a file, from the medium rather than from the page cache, and leaving nothing there: a pass must find what
/// the medium has become, and must not push out what is read often. Objects that are served from the page cache only,
/// because RAM has no room for them, are read from disk once more after a pass.
fn uncached(file: &File, offset: u64, len: usize) -> Result<bytes::Bytes, Damage> {
    let drop_pages = || {
        // Advice; a file system that takes none has the pages read from its cache.
        let _ = fadvise(file, 0, None, Advice::DontNeed);
    };
    drop_pages();
    let read = disk::read_part(file, offset, len);
    drop_pages();
    Ok(read?)
}

fn blame(core: &Core, key: &ChunkKey, container: ContainerHash, damage: Damage) {
    core.miss(key, container, damage, metrics::AT_SCRUB);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::Options;
    use crate::ram::Resident;
    use crate::testing::{self, Chunk};
    use bytes::Bytes;
    use cacheclip_rpc::v1::MissReason;
    use std::fs;
    use std::path::Path;
    use std::sync::Arc;

    async fn store(dir: &Path, chunks: &[Chunk]) -> Arc<Core> {
        for chunk in chunks {
            testing::lay(dir, chunk);
        }
        Core::open(&Options { scrub_bytes_per_second: 0, ..testing::options(dir) }).await.unwrap()
    }

    fn found(core: &Core, chunk: &Chunk) -> Result<ContainerHash, MissReason> {
        core.catalogue.lock().find(chunk.head.layout(), &chunk.key).map(|record| record.hash)
    }

    #[tokio::test]
    async fn a_pass_reads_everything_and_sets_aside_what_has_changed_on_disk() {
        let dir = tempfile::tempdir().unwrap();
        let chunks: Vec<Chunk> = (0..5).map(testing::chunk).collect();
        let core = store(dir.path(), &chunks).await;
        let all: u64 = chunks.iter().map(read_bytes).sum();
        assert_eq!(pass(&core, 0), all);
        assert_eq!(core.stat().quarantined, 0);

        let path = |n: usize| testing::path(dir.path(), &chunks[n].key);
        testing::flip(&path(1), chunks[1].head.segments()[2].offset + 9);
        testing::flip(&path(2), 50);
        fs::OpenOptions::new().write(true).open(path(3)).unwrap().set_len(5000).unwrap();
        fs::remove_file(path(4)).unwrap();
        pass(&core, 1);
        assert!(found(&core, &chunks[0]).is_ok());
        for chunk in &chunks[1..] {
            assert_eq!(found(&core, chunk), Err(MissReason::Corrupt));
        }
        assert_eq!((core.stat().objects, core.stat().quarantined), (1, 3), "the removed one left nothing");
        assert_eq!(pass(&core, 2), read_bytes(&chunks[0]));
    }

    /// What a pass reads of an object: padding is nobody's.
    fn read_bytes(chunk: &Chunk) -> u64 {
        let segments = chunk.head.segments().iter().map(|entry| entry.stored_len);
        segments.sum::<u64>() + chunk.head.bytes().len() as u64
    }

    #[tokio::test]
    async fn another_container_under_the_same_name_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let (here, other) = (testing::chunk(1), testing::chunk(2));
        let core = store(dir.path(), std::slice::from_ref(&here)).await;
        // What a misdirected write leaves: whole in itself, but not what was published.
        fs::write(testing::path(dir.path(), &here.key), &other.bytes).unwrap();
        pass(&core, 0);
        assert_eq!(found(&core, &here), Err(MissReason::Corrupt));
    }

    #[tokio::test]
    async fn a_damaged_segment_in_ram_is_found_within_as_many_passes_as_there_are_segments() {
        let dir = tempfile::tempdir().unwrap();
        let chunk = testing::chunk(1);
        let core = store(dir.path(), std::slice::from_ref(&chunk)).await;
        let object = Arc::new(Resident::new(chunk.head.clone()));
        {
            let mut ram = core.ram.lock();
            ram.insert(Arc::clone(&object));
            for (index, entry) in chunk.head.segments().iter().enumerate() {
                let start = entry.offset as usize;
                let mut stored = chunk.bytes[start..start + entry.stored_len as usize].to_vec();
                stored[7] ^= u8::from(index == 1);
                ram.fill(&chunk.key, chunk.head.hash(), index, Bytes::from(stored));
            }
        }
        pass(&core, 0);
        assert!(core.ram.lock().peek(&chunk.key).is_some(), "the first pass looks at segment 0");
        pass(&core, 1);
        assert!(core.ram.lock().peek(&chunk.key).is_none());
        assert!(found(&core, &chunk).is_ok(), "its file is good");
        let opened = core.open_object(chunk.head.layout(), &chunk.key, &(0..0)).unwrap();
        let stored = core.segment(&opened.object, 1).unwrap();
        assert!(chunk.head.verify_segment(1, &stored).is_ok());
    }

    #[tokio::test]
    async fn a_scrubber_ends_with_its_store() {
        let dir = tempfile::tempdir().unwrap();
        let core = store(dir.path(), &[testing::chunk(1)]).await;
        // So slow that it is at rest when the store goes.
        let scrubbing = tokio::spawn(run(Arc::downgrade(&core), core.closed.clone(), 1));
        drop(core);
        scrubbing.await.unwrap();
    }
}
