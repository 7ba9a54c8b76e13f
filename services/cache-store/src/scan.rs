//! The start: the catalogue, from the heads of the files and what the journal says of their time.

use crate::catalogue::{Catalogue, Record, Victim};
use crate::clock;
use crate::disk::Disk;
use crate::inspect::{self, Unusable};
use crate::journal::{Life, NEVER};
use crate::metrics;
use cacheclip_chunk::ChunkKey;
use cacheclip_rpc::v1::MissReason;
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::SystemTime;

/// Files that are looked at side by side: what a start waits for is the disk.
const THREADS: usize = 16;

/// What a start found beside the objects that it knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Found {
    /// Files of another release, or of nobody: left alone.
    pub(crate) foreign: u64,
    /// Objects that were set aside.
    pub(crate) damaged: u64,
}

/// A file among the objects.
struct Seen {
    modified: SystemTime,
    path: PathBuf,
    bytes: u64,
    object: Result<(ChunkKey, Record), Unusable>,
}

/// Fills a catalogue: one open and, but for very deep models, one read per file. `ttl` is how many seconds an object
/// lives that nobody claims.
pub(crate) fn scan(
    disk: &Disk,
    catalogue: &mut Catalogue,
    lives: &HashMap<ChunkKey, Life>,
    ttl: Option<u64>,
) -> io::Result<Found> {
    for (path, bytes) in disk.quarantined()? {
        catalogue.set_aside(path, bytes);
    }
    let mut found = Found::default();
    for Seen { modified, path, bytes, object } in look_at_all(disk.objects()?)? {
        match object {
            Ok((key, record)) => {
                catalogue.occupy(bytes);
                catalogue.insert(key, record);
                let life = lives.get(&key).copied().unwrap_or_default();
                let published = clock::seconds(modified);
                catalogue.expire_at(&key, expiry(life.claimed, published, ttl));
                if life.pinned != 0 {
                    catalogue.pin(&key, life.pinned);
                }
            }
            Err(why) if why.is_foreign() => {
                tracing::warn!(path = %path.display(), %why, "file is left alone; its bytes count");
                catalogue.occupy(bytes);
                found.foreign += 1;
            }
            Err(why) => {
                tracing::warn!(path = %path.display(), %why, "object is damaged: set aside");
                metrics::verify_failed("start");
                metrics::quarantined();
                if let Some(key) = inspect::name(&path) {
                    catalogue.remember(key, MissReason::Corrupt);
                }
                let (path, bytes) = disk.quarantine(&path)?;
                catalogue.set_aside(path, bytes);
                found.damaged += 1;
            }
        }
    }
    catalogue.end_pins();
    shrink(disk, catalogue)?;
    Ok(found)
}

/// When an object's time is over: with its last claim, or, where nobody claimed it any more when it was published, so
/// long after that.
pub(crate) fn expiry(claimed: Option<u64>, published: u64, ttl: Option<u64>) -> u64 {
    let claimed = claimed.filter(|until| *until > published);
    claimed.or_else(|| ttl.map(|seconds| published.saturating_add(seconds))).unwrap_or(NEVER)
}

/// The cap may have been lowered.
fn shrink(disk: &Disk, catalogue: &mut Catalogue) -> io::Result<()> {
    while catalogue.used() > catalogue.capacity() {
        match catalogue.victim() {
            Some(Victim::Quarantined(path, bytes)) => {
                disk.remove_damaged(&path)?;
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

/// Looks at files side by side; the least recently written comes first.
fn look_at_all(paths: Vec<PathBuf>) -> io::Result<Vec<Seen>> {
    let share = paths.len().div_ceil(THREADS).max(1);
    let looked: Vec<io::Result<Vec<Seen>>> = thread::scope(|scope| {
        let looking: Vec<_> = paths
            .chunks(share)
            .map(|paths| scope.spawn(|| paths.iter().filter_map(|path| look_at(path).transpose()).collect()))
            .collect();
        let panicked = |_| Err(io::Error::other("a thread that read heads panicked"));
        looking.into_iter().map(|share| share.join().unwrap_or_else(panicked)).collect()
    });
    let mut seen = Vec::with_capacity(paths.len());
    for share in looked {
        seen.extend(share?);
    }
    seen.sort_by(|a, b| (a.modified, &a.path).cmp(&(b.modified, &b.path)));
    Ok(seen)
}

/// One file; nothing where it has just gone.
fn look_at(path: &Path) -> io::Result<Option<Seen>> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    let metadata = file.metadata()?;
    let (modified, bytes) = (metadata.modified()?, metadata.len());
    let object = inspect::head(path, &file, bytes).map(|head| (head.key(), Record::from(&head)));
    Ok(Some(Seen { modified, path: path.to_owned(), bytes, object }))
}
