//! Reading objects, from RAM, disk or the bucket, verified on the way from there; readers of one thing share one read of it.

use crate::catalogue::Record;
use crate::core::Core;
use crate::flight::Flights;
use crate::metrics;
use crate::ram::Resident;
use bytes::Bytes;
use cacheclip_chunk::{ChunkKey, ContainerHash, Head, LayoutId, SegmentKind};
use cacheclip_rpc::v1::{MissReason, Tier};
use std::io;
use std::ops::Range;
use std::sync::Arc;

/// An object that a request reads.
#[derive(Clone, Debug)]
pub(crate) struct Opened {
    pub(crate) object: Arc<Resident>,
    pub(crate) tier: Tier,
}

/// An object that the store has.
#[derive(Debug)]
pub(crate) struct Found {
    key: ChunkKey,
    record: Record,
    /// The bucket alone has it.
    remote: bool,
    /// What the RAM tier has of it.
    object: Option<Arc<Resident>>,
}

impl Found {
    /// Whether nothing has to be read to open it.
    pub(crate) fn is_at_hand(&self) -> bool {
        !self.remote && self.object.is_some()
    }
}

impl Core {
    /// Finds an object, which thereby counts as used.
    pub(crate) fn find(&self, layout: LayoutId, key: &ChunkKey) -> Result<Found, MissReason> {
        metrics::requested();
        let (record, remote) = {
            let mut catalogue = self.catalogue.lock();
            let record = catalogue.find(layout, key)?;
            catalogue.touch(key);
            (record, catalogue.on_disk(key).is_none())
        };
        let object = self.ram.lock().get(key).filter(|object| object.head.hash() == record.hash);
        Ok(Found { key: *key, record, remote, object })
    }

    /// Opens what was found for layers `range` (an end of 0 means all) and what comes with them. Blocking where it is
    /// not at hand.
    pub(crate) fn open_found(&self, found: Found, range: &Range<u32>) -> Result<Opened, MissReason> {
        let Found { key, record, remote, object } = found;
        if remote {
            self.promote(&key, &record)?;
        }
        let object = match object {
            Some(object) => object,
            None => self.reads.heads.share((key, record.hash), || self.read_head(&key, &record))?,
        };
        if range.end > object.head.shape().layers {
            return Err(MissReason::Layout);
        }
        let in_ram = object.has(wanted(&object.head, range).into_iter());
        let (tier, label) = match (remote, in_ram) {
            (true, _) => (Tier::StoreBucket, metrics::BUCKET),
            (false, true) => (Tier::StoreRam, metrics::RAM),
            (false, false) => (Tier::StoreDisk, metrics::DISK),
        };
        metrics::hit(label);
        Ok(Opened { object, tier })
    }

    /// Finds an object and opens it.
    #[cfg(test)]
    pub(crate) fn open_object(
        &self,
        layout: LayoutId,
        key: &ChunkKey,
        range: &Range<u32>,
    ) -> Result<Opened, MissReason> {
        self.open_found(self.find(layout, key)?, range)
    }

    /// An object's head from disk, for the RAM tier if it has room.
    fn read_head(&self, key: &ChunkKey, record: &Record) -> Result<Arc<Resident>, MissReason> {
        // Another reader may just have brought it.
        if let Some(object) = self.ram.lock().peek_at(key, record.hash) {
            return Ok(Arc::clone(object));
        }
        let head = self.read_file(key, record.hash, || {
            self.disk_part(key, 0, record.head_len).and_then(|bytes| check_head(&bytes, record.hash))
        })?;
        let object = Arc::new(Resident::new(head));
        self.ram.lock().insert(Arc::clone(&object));
        // It may have been deleted while it was read: then it must not stay in RAM either.
        if self.catalogue.lock().record(key).is_none_or(|it| it.hash != record.hash) {
            self.ram.lock().remove(key);
        }
        self.gauge();
        Ok(object)
    }

    /// A segment's stored bytes, verified. Blocking.
    pub(crate) fn segment(&self, object: &Resident, index: usize) -> Result<Bytes, MissReason> {
        if let Some(stored) = object.segment(index) {
            return Ok(stored);
        }
        let head = &object.head;
        self.reads.segments.share((head.key(), head.hash(), index), || self.read_segment(head, index))
    }

    fn read_segment(&self, head: &Head, index: usize) -> Result<Bytes, MissReason> {
        let (key, hash) = (head.key(), head.hash());
        let entry = head.segments().get(index).ok_or(MissReason::Corrupt)?;
        // Another reader may just have brought it, for an object that came to the tier after this one left it.
        let (brought, held) = {
            let ram = self.ram.lock();
            (ram.peek_at(&key, hash).and_then(|object| object.segment(index)), ram.held())
        };
        if let Some(stored) = brought {
            return Ok(stored);
        }
        let stored = self.read_file(&key, hash, || {
            let read = self.disk_part(&key, entry.offset, entry.stored_len as usize);
            read.and_then(|stored| check_segment(head, index, stored))
        })?;
        let stored = held.count(stored);
        self.ram.lock().fill(&key, hash, index, stored.clone());
        Ok(stored)
    }

    /// What is read of an object's file. Evicted meanwhile, or set aside because it is damaged, it comes from the bucket
    /// if that has it.
    fn read_file<T>(
        &self,
        key: &ChunkKey,
        container: ContainerHash,
        read: impl Fn() -> Result<T, Damage>,
    ) -> Result<T, MissReason> {
        let miss = |damage| self.miss(key, container, damage, metrics::AT_DISK);
        let reason = match read() {
            Ok(it) => return Ok(it),
            Err(damage) => miss(damage),
        };
        let record = self.catalogue.lock().record(key);
        match record.filter(|_| self.is_remote(key, container)) {
            Some(record) => {
                self.promote(key, &record)?;
                read().map_err(miss)
            }
            None => Err(reason),
        }
    }

    fn disk_part(&self, key: &ChunkKey, offset: u64, len: usize) -> Result<Bytes, Damage> {
        #[cfg(test)]
        self.reads.from_disk.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        Ok(self.disk.read(key, offset, len)?)
    }

    /// What a failed read means to the reader; sets the object aside where it is to blame.
    pub(crate) fn miss(
        &self,
        key: &ChunkKey,
        container: ContainerHash,
        damage: Damage,
        place: &'static str,
    ) -> MissReason {
        match damage {
            Damage::None(error) => {
                tracing::error!(%key, %error, "object cannot be read now");
                return MissReason::Unavailable;
            }
            Damage::Certain(why) => self.set_aside(key, container, place, &why),
            // Evicted or deleted while it was read, or removed by other hands.
            Damage::Gone => self.set_aside(key, container, place, &"its file is gone"),
        }
        let catalogue = self.catalogue.lock();
        match catalogue.record(key) {
            // Another container has taken its place: the reader may simply ask again.
            Some(_) => MissReason::Unavailable,
            None => catalogue.reason(key),
        }
    }
}

/// The medium's own word that it cannot read what it wrote.
const EIO: i32 = 5;

/// Whether these bytes are the head that was published.
pub(crate) fn check_head(bytes: &[u8], published: ContainerHash) -> Result<Head, Damage> {
    let head = Head::parse(bytes).map_err(|error| Damage::Certain(error.to_string()))?;
    if head.hash() == published {
        return Ok(head);
    }
    Err(Damage::Certain("its head is not the one that was published".into()))
}

/// Whether these are the stored bytes of a segment.
pub(crate) fn check_segment(head: &Head, index: usize, stored: Bytes) -> Result<Bytes, Damage> {
    head.verify_segment(index, &stored).map_err(|error| Damage::Certain(error.to_string()))?;
    Ok(stored)
}

/// Reads of objects under way.
#[derive(Debug, Default)]
pub(crate) struct Reads {
    heads: Flights<(ChunkKey, ContainerHash), Result<Arc<Resident>, MissReason>>,
    segments: Flights<(ChunkKey, ContainerHash, usize), Result<Bytes, MissReason>>,
    /// Reads of files.
    #[cfg(test)]
    from_disk: std::sync::atomic::AtomicUsize,
}

/// What a failed read says about the object.
#[derive(Debug)]
pub(crate) enum Damage {
    /// Nothing: the process lacks something.
    None(io::Error),
    /// It is not what was published.
    Certain(String),
    /// It has no file.
    Gone,
}

impl From<io::Error> for Damage {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Self::Certain("it is cut off".into()),
            io::ErrorKind::NotFound => Self::Gone,
            _ if error.raw_os_error() == Some(EIO) => Self::Certain(error.to_string()),
            // Too many open files, say: nothing is wrong with the object.
            _ => Self::None(error),
        }
    }
}

/// Segments that a read of layers brings: spans and rank first, because they are small and planning starts with
/// them, then the layers.
pub(crate) fn wanted(head: &Head, range: &Range<u32>) -> Vec<usize> {
    let end = if range.end == 0 { head.shape().layers } else { range.end };
    let extras = [SegmentKind::Spans, SegmentKind::Rank].into_iter().filter_map(|kind| head.segment_of(kind));
    extras.chain((range.start..end).filter_map(|layer| head.layer_segment(layer).ok())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::Options;
    use crate::testing::{self, Chunk};
    use std::sync::atomic::Ordering;
    use std::thread;

    const READERS: usize = 8;

    /// A store with one object and a RAM tier of so many bytes.
    async fn store(dir: &std::path::Path, ram_bytes: u64) -> (Arc<Core>, Chunk) {
        let chunk = testing::chunk(1);
        testing::lay(dir, &chunk);
        let core = Core::open(&Options { ram_bytes, ..testing::options(dir) }).await.unwrap();
        (core, chunk)
    }

    fn wait_until(arrived: impl Fn() -> bool) {
        while !arrived() {
            thread::yield_now();
        }
    }

    /// Lets readers come while `lead` reads, which ends when all of them are aboard; how often the disk was read.
    fn while_reading<T: Send>(
        core: &Core,
        aboard: impl Fn() -> usize,
        lead: impl FnOnce() -> T + Send,
        read: impl Fn() -> T + Sync,
    ) -> (usize, Vec<T>) {
        let before = core.reads.from_disk.load(Ordering::Relaxed);
        let read = &read;
        let all = thread::scope(|scope| {
            let leader = scope.spawn(lead);
            wait_until(|| aboard() == 1);
            let readers: Vec<_> = (0..READERS).map(|_| scope.spawn(read)).collect();
            readers.into_iter().chain([leader]).map(|it| it.join().unwrap()).collect()
        });
        (core.reads.from_disk.load(Ordering::Relaxed) - before, all)
    }

    #[tokio::test]
    async fn readers_of_one_cold_object_share_its_reads_though_ram_cannot_keep_it() {
        for ram_bytes in [0, 1 << 20] {
            let dir = tempfile::tempdir().unwrap();
            let (core, Chunk { key, head, .. }) = store(dir.path(), ram_bytes).await;
            let record = core.catalogue.lock().record(&key).unwrap();
            let id = (key, record.hash);
            let aboard = || core.reads.heads.aboard(&id);
            let lead = || {
                core.reads.heads.share(id, || {
                    wait_until(|| aboard() > READERS);
                    core.read_head(&key, &record)
                })
            };
            let open = || core.open_object(head.layout(), &key, &(0..0)).map(|opened| opened.object);
            let (reads, opened) = while_reading(&core, aboard, lead, open);
            assert_eq!((reads, opened.len()), (1, READERS + 1));

            let id = (key, record.hash, 2);
            let aboard = || core.reads.segments.aboard(&id);
            let lead = || {
                core.reads.segments.share(id, || {
                    wait_until(|| aboard() > READERS);
                    core.read_segment(&head, 2)
                })
            };
            // Each has an object of its own, as where the tier keeps none.
            let read = || core.segment(&Resident::new(head.clone()), 2);
            let (reads, read) = while_reading(&core, aboard, lead, read);
            assert_eq!(reads, 1);
            assert!(read.iter().all(|stored| head.verify_segment(2, stored.as_ref().unwrap()).is_ok()));

            let object = opened[0].as_ref().unwrap();
            core.segment(object, 2).unwrap();
            let again = core.reads.from_disk.load(Ordering::Relaxed);
            assert_eq!(again, if ram_bytes == 0 { 3 } else { 2 }, "RAM is asked before the disk");
        }
    }
}
