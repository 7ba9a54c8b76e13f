//! The store's state, and the operations that change what is on disk.
//!
//! Locks: `changes` orders everything that renames or removes object files or writes the journal, and is taken on
//! blocking threads only; the catalogue's and the RAM tier's locks are held for moments and never across file
//! operations.

use crate::bucket::Bucket;
use crate::catalogue::{Catalogue, REMEMBERED, Record, Victim};
use crate::changes::{self, Changes};
use crate::clock::Clock;
use crate::disk::{self, Disk};
use crate::error::Error;
use crate::index::Entry;
use crate::journal::Journal;
use crate::metrics;
use crate::options::Options;
use crate::ram::Ram;
use crate::read::Reads;
use crate::scan::{self, Found};
use cacheclip_chunk::{ChunkKey, ContainerHash, DocumentId, Head, LayoutId};
use cacheclip_rpc::v1::{MissReason, StatResponse, Tier};
use parking_lot::Mutex;
use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio_util::sync::{CancellationToken, DropGuard};

/// How long a start waits for the directory's lock, and how often it looks.
const LOCK_WAIT: Duration = Duration::from_secs(2);
const LOCK_POLL: Duration = Duration::from_millis(20);

/// How a publication ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Published {
    Stored,
    /// Another writer was first, with this container.
    Existed(ContainerHash),
    /// Its key or document was deleted after the writer began.
    Deleted,
}

/// What is still to go of a deleted key.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Doomed {
    /// Bytes on disk that count until its file is gone.
    pub(crate) bytes: u64,
    /// The bucket has not said yet that it has nothing of it.
    pub(crate) in_bucket: bool,
}

/// Shared by all requests. Dropped in this order: who gets the directory's lock may open the journal.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) journal: Journal,
    pub(crate) disk: Disk,
    pub(crate) clock: Clock,
    /// Seconds that an object lives which no document claims; absent: it does not expire.
    pub(crate) ttl: Option<u64>,
    /// Seconds that deletions are remembered.
    pub(crate) tombstone_seconds: u64,
    /// Deleted keys of which something is still to go.
    pub(crate) doomed: Mutex<HashMap<ChunkKey, Doomed>>,
    pub(crate) bucket: Option<Arc<Bucket>>,
    /// Files that were left alone at the start.
    foreign: u64,
    pub(crate) catalogue: Arc<Mutex<Catalogue>>,
    pub(crate) ram: Mutex<Ram>,
    pub(crate) reads: Reads,
    pub(crate) changes: Mutex<()>,
    /// What the index has to be told.
    pub(crate) announce: Arc<Changes>,
    /// Cancelled when the last user of this store is gone: ends what lives as long as it.
    pub(crate) closed: CancellationToken,
    _open: DropGuard,
}

impl Core {
    /// Opens the directory, finishes deletions that a predecessor began, and rebuilds all else from what is there.
    pub(crate) async fn open_at(options: &Options, clock: Clock) -> Result<Arc<Self>, Error> {
        Self::open_with(options, clock, Bucket::open(options)?).await
    }

    pub(crate) async fn open_with(
        options: &Options,
        clock: Clock,
        bucket: Option<Arc<Bucket>>,
    ) -> Result<Arc<Self>, Error> {
        let started = Instant::now();
        let disk = lock(options).await?;
        let (root, capacity) = (options.data_dir.clone(), options.disk_bytes);
        let (time, ttl) = (clock.clone(), (options.ttl_seconds > 0).then_some(options.ttl_seconds));
        let has_bucket = bucket.is_some();
        let (journal, disk, catalogue, found, doomed) = blocking(options, move || {
            let journal = Journal::open(&disk.journal(), disk.lock())
                .map_err(|reason| Error::Journal { path: disk.journal(), reason })?;
            let mut catalogue = Catalogue::new(capacity, time);
            let failed = |reason| Error::DataDir { path: root.clone(), reason };
            let doomed = finish_deletions(&journal, &disk, has_bucket).map_err(failed)?;
            let found = rebuild(&journal, &disk, &mut catalogue, ttl).map_err(failed)?;
            if has_bucket {
                catalogue.doubt();
            }
            Ok((journal, disk, catalogue, found, doomed))
        })
        .await?;
        metrics::capacity(metrics::DISK, options.disk_bytes);
        metrics::capacity(metrics::RAM, options.ram_bytes);
        let closed = CancellationToken::new();
        let core = Arc::new(Self {
            journal,
            disk,
            clock,
            ttl,
            tombstone_seconds: options.tombstone_seconds,
            doomed: Mutex::new(doomed),
            bucket,
            foreign: found.foreign,
            catalogue: Arc::new(Mutex::new(catalogue)),
            ram: Mutex::new(Ram::new(options.ram_bytes)),
            reads: Reads::default(),
            changes: Mutex::new(()),
            announce: Arc::new(Changes::new(changes::MOST)),
            _open: closed.clone().drop_guard(),
            closed,
        });
        core.gauge();
        let stat = core.stat();
        tracing::info!(
            objects = stat.objects,
            disk_bytes = stat.disk_used_bytes,
            quarantined = stat.quarantined,
            damaged = found.damaged,
            foreign = found.foreign,
            generation = stat.generation,
            seconds = started.elapsed().as_secs_f64(),
            "catalogue rebuilt"
        );
        Ok(core)
    }

    /// As [`Core::open_at`], by the machine's clock.
    #[cfg(test)]
    pub(crate) async fn open(options: &Options) -> Result<Arc<Self>, Error> {
        Self::open_at(options, Clock::system()).await
    }

    /// What an index should say of this store now.
    pub(crate) fn entries(&self) -> Vec<(ChunkKey, Entry)> {
        self.catalogue.lock().records().map(|(key, record)| (key, Entry::from(&record))).collect()
    }

    /// What the store holds.
    pub(crate) fn stat(&self) -> StatResponse {
        let (ram_used_bytes, ram_capacity_bytes) = {
            let ram = self.ram.lock();
            (ram.used(), ram.capacity())
        };
        let catalogue = self.catalogue.lock();
        let bucket = catalogue.bucket();
        StatResponse {
            objects: catalogue.len() as u64,
            disk_used_bytes: catalogue.used(),
            disk_capacity_bytes: catalogue.capacity(),
            ram_used_bytes,
            ram_capacity_bytes,
            quarantined: catalogue.quarantined() as u64,
            foreign: self.foreign,
            pinned_bytes: catalogue.pinned_bytes(),
            generation: self.journal.generation(),
            bucket_objects: bucket.objects,
            bucket_used_bytes: bucket.bytes,
        }
    }

    pub(crate) fn gauge(&self) {
        let stat = self.stat();
        metrics::objects(stat.objects as usize);
        metrics::used(metrics::DISK, stat.disk_used_bytes);
        metrics::used(metrics::RAM, stat.ram_used_bytes);
        metrics::pinned(stat.pinned_bytes);
        if self.bucket.is_some() {
            metrics::bucket_holds(stat.bucket_objects, stat.bucket_used_bytes);
        }
    }

    /// Where a key is, without counting as a use.
    pub(crate) fn locate(&self, layout: LayoutId, key: &ChunkKey) -> Result<(Record, Tier), MissReason> {
        let (record, on_disk) = {
            let catalogue = self.catalogue.lock();
            (catalogue.find(layout, key)?, catalogue.on_disk(key).is_some())
        };
        let ram = self.ram.lock();
        let in_ram = ram.peek(key).is_some_and(|object| {
            object.head.hash() == record.hash && object.has(0..object.head.segments().len())
        });
        let tier = match (in_ram, on_disk) {
            (true, _) => Tier::StoreRam,
            (false, true) => Tier::StoreDisk,
            (false, false) => Tier::StoreBucket,
        };
        Ok((record, tier))
    }

    /// Reserves room on disk, evicting what was not used for longest. False where that cannot be enough.
    pub(crate) fn make_room(&self, bytes: u64) -> bool {
        loop {
            {
                let mut catalogue = self.catalogue.lock();
                if catalogue.reserve(bytes) {
                    return true;
                }
                if bytes > catalogue.capacity() {
                    return false;
                }
            }
            if self.evict("capacity") == 0 {
                return false;
            }
        }
    }

    /// The volume is full before the cap is: frees at least so many bytes, if it can.
    pub(crate) fn free(&self, bytes: u64) {
        let mut freed = 0;
        while freed < bytes {
            match self.evict("volume_full") {
                0 => return,
                some => freed += some,
            }
        }
    }

    /// Evicts one file; its bytes, 0 where nothing is left to evict.
    fn evict(&self, reason: &'static str) -> u64 {
        let _changes = self.changes.lock();
        loop {
            let Some(victim) = self.catalogue.lock().victim() else { return 0 };
            let (removed, bytes) = match victim {
                Victim::Quarantined(path, bytes) => (disk::remove(&path), bytes),
                Victim::Object(key, bytes) => {
                    self.drop_from_tiers(key);
                    metrics::evicted(metrics::DISK, reason);
                    (self.disk.remove(&key), bytes)
                }
            };
            match removed {
                Ok(()) => {
                    self.catalogue.lock().release(bytes);
                    self.gauge();
                    return bytes.max(1);
                }
                // Its bytes stay counted until the next start sees the file again.
                Err(error) => tracing::error!(%error, "a file cannot be removed"),
            }
        }
    }

    /// Publishes a received file under its key, unless another writer was first or it comes too late. `begun` is the
    /// generation at which the writer began, `document` the one that it brings the chunk for.
    pub(crate) fn publish(
        &self,
        temporary: disk::Temporary,
        head: &Head,
        begun: u64,
        document: Option<DocumentId>,
    ) -> io::Result<Published> {
        let key = head.key();
        let _changes = self.changes.lock();
        if self.journal.refuses(&key, document, begun)? {
            return Ok(Published::Deleted);
        }
        self.remove_expired(&[key], false)?;
        if let Some(first) = self.catalogue.lock().on_disk(&key) {
            return Ok(Published::Existed(first.hash));
        }
        // A deletion whose file could not be removed must not take this one in its place.
        self.finish(&[key])?;
        if self.doomed.lock().contains_key(&key) {
            return Err(io::Error::other("its deletion from the bucket is not complete; put again later"));
        }
        let now = self.clock.now();
        let life = self.journal.life(&key, now)?;
        self.disk.publish(temporary, &key)?;
        {
            let mut catalogue = self.catalogue.lock();
            catalogue.insert(key, Record::from(head));
            catalogue.expire_at(&key, scan::expiry(life.claimed, now, self.ttl));
            if life.pinned > 0 {
                catalogue.pin(&key, life.pinned);
            }
        }
        self.announce.tell(key, true);
        self.offer(key);
        self.gauge();
        Ok(Published::Stored)
    }

    /// Sets an object's file aside that was seen to be damaged at `place`, unless another container has been published
    /// under its key meanwhile, or it has left the disk.
    pub(crate) fn set_aside(
        &self,
        key: &ChunkKey,
        container: ContainerHash,
        place: &'static str,
        why: &dyn std::fmt::Display,
    ) {
        let _changes = self.changes.lock();
        if self.catalogue.lock().on_disk(key).is_none_or(|it| it.hash != container) {
            return;
        }
        metrics::verify_failed(place);
        let moved = self.disk.quarantine_object(key);
        tracing::warn!(%key, %why, "object is damaged: set aside");
        {
            let mut catalogue = self.catalogue.lock();
            let left = catalogue.leave_disk(key, MissReason::Corrupt).unwrap_or_default();
            match moved {
                Ok((path, bytes)) => {
                    metrics::quarantined();
                    catalogue.release(left);
                    catalogue.set_aside(path, bytes);
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => catalogue.release(left),
                Err(error) => tracing::error!(%key, %error, "a damaged object cannot be set aside"),
            }
        }
        self.drop_from_tiers(*key);
        self.gauge();
    }

    pub(crate) fn drop_from_tiers(&self, key: ChunkKey) {
        self.ram.lock().remove(&key);
        self.announce.tell(key, false);
    }
}

/// Opens the directory, waiting a little for a predecessor that is still on its way out.
async fn lock(options: &Options) -> Result<Disk, Error> {
    let deadline = Instant::now() + LOCK_WAIT;
    loop {
        let root = options.data_dir.clone();
        match blocking(options, move || Disk::open(&root)).await {
            Err(Error::InUse { .. }) if Instant::now() < deadline => tokio::time::sleep(LOCK_POLL).await,
            opened => return opened,
        }
    }
}

async fn blocking<T: Send + 'static>(
    options: &Options,
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let panicked = |error| Error::DataDir { path: options.data_dir.clone(), reason: io::Error::other(error) };
    tokio::task::spawn_blocking(work).await.map_err(panicked)?
}

impl From<&Record> for Entry {
    fn from(record: &Record) -> Self {
        Self { layout: record.layout, container: record.hash, bytes: record.bytes }
    }
}

/// Removes the files of deletions that a predecessor began; what the bucket may still have of them.
fn finish_deletions(journal: &Journal, disk: &Disk, bucket: bool) -> io::Result<HashMap<ChunkKey, Doomed>> {
    let doomed = journal.doomed()?;
    if doomed.is_empty() {
        return Ok(HashMap::new());
    }
    let keys: HashSet<ChunkKey> = doomed.iter().copied().collect();
    doomed.iter().try_for_each(|key| disk.remove(key))?;
    for (path, _) in disk.quarantined()? {
        if disk::name(&path).is_some_and(|key| keys.contains(&key)) {
            disk.remove_damaged(&path)?;
        }
    }
    disk.settle()?;
    if bucket {
        return Ok(keys.into_iter().map(|key| (key, Doomed { bytes: 0, in_bucket: true })).collect());
    }
    journal.done(&doomed)?;
    tracing::info!(keys = doomed.len(), "deletions that were under way are finished");
    Ok(HashMap::new())
}

/// Brings files and catalogue to what the journal and the files say.
fn rebuild(journal: &Journal, disk: &Disk, catalogue: &mut Catalogue, ttl: Option<u64>) -> io::Result<Found> {
    for key in journal.tombstones(REMEMBERED)? {
        catalogue.remember(key, MissReason::Deleted);
    }
    scan::scan(disk, catalogue, &journal.all_lives()?, ttl)
}
