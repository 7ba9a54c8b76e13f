//! The store's state, and the operations that change what is on disk.
//!
//! Locks: `changes` orders everything that renames or removes object files and is taken on blocking threads
//! only; the catalogue's and the RAM tier's locks are held for moments and never across file operations.

use crate::catalogue::{Catalogue, Record, Victim};
use crate::changes::{self, Changes};
use crate::disk::{self, Disk};
use crate::error::Error;
use crate::index::Entry;
use crate::metrics;
use crate::options::Options;
use crate::ram::Ram;
use cacheclip_chunk::container::head::HEADER_LEN;
use cacheclip_chunk::{ChunkKey, ContainerHash, FormatError, Head, LayoutId};
use cacheclip_rpc::v1::{MissReason, StatResponse, Tier};
use parking_lot::Mutex;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio_util::sync::{CancellationToken, DropGuard};

/// How long a start waits for the directory's lock, and how often it looks.
const LOCK_WAIT: Duration = Duration::from_secs(2);
const LOCK_POLL: Duration = Duration::from_millis(20);

/// Shared by all requests.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) disk: Disk,
    pub(crate) catalogue: Arc<Mutex<Catalogue>>,
    pub(crate) ram: Mutex<Ram>,
    pub(crate) changes: Mutex<()>,
    /// What the index has to be told.
    pub(crate) announce: Arc<Changes>,
    /// Cancelled when the last user of this store is gone: ends what lives as long as it.
    pub(crate) closed: CancellationToken,
    _open: DropGuard,
}

impl Core {
    /// Opens the directory and rebuilds all else from it.
    pub(crate) async fn open(options: &Options) -> Result<Arc<Self>, Error> {
        let disk = lock(options).await?;
        let (root, capacity) = (options.data_dir.clone(), options.disk_bytes);
        let (disk, catalogue) = blocking(options, move || {
            let mut catalogue = Catalogue::new(capacity);
            scan(&disk, &mut catalogue).map_err(|source| Error::DataDir { path: root, reason: source })?;
            Ok((disk, catalogue))
        })
        .await?;
        metrics::capacity(metrics::DISK, options.disk_bytes);
        metrics::capacity(metrics::RAM, options.ram_bytes);
        let closed = CancellationToken::new();
        let core = Arc::new(Self {
            disk,
            catalogue: Arc::new(Mutex::new(catalogue)),
            ram: Mutex::new(Ram::new(options.ram_bytes)),
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
            "catalogue rebuilt"
        );
        Ok(core)
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
        StatResponse {
            objects: catalogue.len() as u64,
            disk_used_bytes: catalogue.used(),
            disk_capacity_bytes: catalogue.capacity(),
            ram_used_bytes,
            ram_capacity_bytes,
            quarantined: catalogue.quarantined() as u64,
        }
    }

    pub(crate) fn gauge(&self) {
        let stat = self.stat();
        metrics::objects(stat.objects as usize);
        metrics::used(metrics::DISK, stat.disk_used_bytes);
        metrics::used(metrics::RAM, stat.ram_used_bytes);
    }

    /// Where a key is, without counting as a use.
    pub(crate) fn locate(&self, layout: LayoutId, key: &ChunkKey) -> Result<(Record, Tier), MissReason> {
        let record = self.catalogue.lock().find(layout, key)?;
        let ram = self.ram.lock();
        let in_ram = ram.peek(key).is_some_and(|object| {
            object.head.hash() == record.hash && object.has(0..object.head.segments().len())
        });
        Ok((record, if in_ram { Tier::StoreRam } else { Tier::StoreDisk }))
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

    /// Publishes a received file under its key; false where another writer was first.
    pub(crate) fn publish(&self, temporary: disk::Temporary, head: &Head) -> io::Result<bool> {
        let (key, record) = (head.key(), record(head));
        let _changes = self.changes.lock();
        if self.catalogue.lock().record(&key).is_some() {
            return Ok(false);
        }
        self.disk.publish(temporary, &key)?;
        self.catalogue.lock().insert(key, record);
        self.announce.tell(key, true);
        self.gauge();
        Ok(true)
    }

    /// Deletes keys of a layout; how many objects and bytes that were.
    pub(crate) fn delete(&self, layout: LayoutId, keys: &[ChunkKey]) -> io::Result<(u32, u64)> {
        let (mut objects, mut bytes) = (0, 0);
        for key in keys {
            let _changes = self.changes.lock();
            let Ok(record) = self.catalogue.lock().find(layout, key) else { continue };
            // The file first: a delete that failed must not look done.
            self.disk.remove(key)?;
            let mut catalogue = self.catalogue.lock();
            catalogue.take(key, MissReason::Deleted);
            catalogue.release(record.bytes);
            drop(catalogue);
            self.drop_from_tiers(*key);
            objects += 1;
            bytes += record.bytes;
        }
        self.gauge();
        Ok((objects, bytes))
    }

    /// Sets a damaged object aside, unless another container has taken its place meanwhile.
    pub(crate) fn set_aside(&self, key: &ChunkKey, container: ContainerHash, why: &dyn std::fmt::Display) {
        let _changes = self.changes.lock();
        let Some(record) = self.catalogue.lock().record(key).filter(|it| it.hash == container) else {
            return;
        };
        metrics::verify_failed("disk");
        let moved = self.disk.quarantine_object(key);
        tracing::warn!(%key, %why, "object is damaged: set aside");
        {
            let mut catalogue = self.catalogue.lock();
            catalogue.take(key, MissReason::Corrupt);
            match moved {
                Ok((path, bytes)) => {
                    metrics::quarantined();
                    catalogue.release(record.bytes);
                    catalogue.set_aside(path, bytes);
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => catalogue.release(record.bytes),
                Err(error) => tracing::error!(%key, %error, "a damaged object cannot be set aside"),
            }
        }
        self.drop_from_tiers(*key);
        self.gauge();
    }

    fn drop_from_tiers(&self, key: ChunkKey) {
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

fn record(head: &Head) -> Record {
    Record {
        layout: head.layout(),
        hash: head.hash(),
        bytes: head.container_len(),
        head_len: head.bytes().len(),
    }
}

impl From<&Record> for Entry {
    fn from(record: &Record) -> Self {
        Self { layout: record.layout, container: record.hash, bytes: record.bytes }
    }
}

/// Rebuilds the catalogue from the files, reading heads only.
fn scan(disk: &Disk, catalogue: &mut Catalogue) -> io::Result<()> {
    for (path, bytes) in disk.quarantined()? {
        catalogue.set_aside(path, bytes);
    }
    for (path, bytes) in disk.objects()? {
        match read_head(&path, bytes) {
            Ok(head) => {
                catalogue.occupy(bytes);
                catalogue.insert(head.key(), record(&head));
            }
            Err(Unusable::Foreign(why)) => {
                tracing::warn!(path = %path.display(), why, "file is left alone; its bytes count");
                catalogue.occupy(bytes);
            }
            Err(Unusable::Damaged(why)) => {
                tracing::warn!(path = %path.display(), why, "object is damaged: set aside");
                metrics::verify_failed("start");
                metrics::quarantined();
                if let Some(key) = name(&path) {
                    catalogue.remember(key, MissReason::Corrupt);
                }
                let (path, bytes) = disk.quarantine(&path)?;
                catalogue.set_aside(path, bytes);
            }
        }
    }
    // The cap may have been lowered.
    while catalogue.used() > catalogue.capacity() {
        match catalogue.victim() {
            Some(Victim::Quarantined(path, bytes)) => {
                disk::remove(&path)?;
                catalogue.release(bytes);
            }
            Some(Victim::Object(key, bytes)) => {
                disk.remove(&key)?;
                catalogue.release(bytes);
                metrics::evicted(metrics::DISK, "capacity");
            }
            None => break,
        }
    }
    Ok(())
}

enum Unusable {
    /// Nothing this release wrote.
    Foreign(String),
    Damaged(String),
}

fn name(path: &Path) -> Option<ChunkKey> {
    let stem = path.file_stem()?.to_str()?;
    (path.extension()? == "kv").then(|| stem.parse().ok()).flatten()
}

fn read_head(path: &Path, bytes: u64) -> Result<Head, Unusable> {
    let key = name(path).ok_or_else(|| Unusable::Foreign("not an object's name".into()))?;
    let read = |len: usize| -> io::Result<Vec<u8>> {
        let mut head = Vec::with_capacity(len);
        File::open(path)?.take(len as u64).read_to_end(&mut head)?;
        Ok(head)
    };
    let parse = || -> Result<Head, FormatError> {
        let prefix = read(HEADER_LEN).unwrap_or_default();
        let len = Head::len_from_prefix(&prefix)?;
        Head::parse(&read(len).unwrap_or_default())
    };
    match parse() {
        Ok(head) if head.key() != key => Err(Unusable::Damaged("it holds another key".into())),
        Ok(head) if head.container_len() != bytes => {
            let why = FormatError::Length { expected: head.container_len(), found: bytes };
            Err(Unusable::Damaged(why.to_string()))
        }
        Ok(head) => Ok(head),
        Err(why @ FormatError::Version { .. }) => Err(Unusable::Foreign(why.to_string())),
        Err(why) => Err(Unusable::Damaged(why.to_string())),
    }
}
