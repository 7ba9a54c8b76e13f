//! The journal: which documents claim which chunks, what was deleted, and what is pinned. Unlike the index it is truth,
//! beside the files: what a call has returned outlives a power loss.
//!
//! Every deletion has a number, its *generation*, and leaves tombstones with it: who began to write before it is
//! refused. A deletion is written here before any file goes, with its keys *doomed*; they are so until their files
//! are gone, if need be over a restart.
//!
//! Whoever writes here holds the store's `changes` lock, so that journal, files and catalogue change in one order.

mod rows;
mod tables;

use crate::disk::volume;
use cacheclip_chunk::{ChunkKey, DocumentId, LayoutId};
use redb::{
    Database, Durability, ReadTransaction, ReadableDatabase as _, ReadableTable as _, WriteTransaction,
};
use rows::{Due, Kind};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tables::Done;

/// The end of what has none.
pub(crate) const NEVER: u64 = u64::MAX;

/// A document's claim on chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Claim {
    pub(crate) document: DocumentId,
    /// Seconds since 1970, or [`NEVER`].
    pub(crate) until: u64,
}

/// What the journal says of one chunk's time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Life {
    /// When the last claim ends; absent: nobody claims it.
    pub(crate) claimed: Option<u64>,
    /// When its pin ends; 0: it has none.
    pub(crate) pinned: u64,
}

/// How much went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) objects: u32,
    pub(crate) bytes: u64,
}

impl Size {
    fn add(&mut self, bytes: u64) {
        self.objects += 1;
        self.bytes += bytes;
    }
}

/// A document's deletion, as it is told again to who asks again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Receipt {
    pub(crate) generation: u64,
    pub(crate) disk: Size,
    pub(crate) ram: Size,
    pub(crate) bucket: Size,
    pub(crate) kept: u32,
    /// Ascending, with those of the document's earlier deletions.
    pub(crate) keys: Vec<ChunkKey>,
}

/// What the store has of a chunk that may go: its bytes on disk, those in RAM, and those in the bucket.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Weight {
    pub(crate) disk: Option<u64>,
    pub(crate) ram: Option<u64>,
    pub(crate) bucket: Option<u64>,
}

/// What a document's deletion means to the store.
#[derive(Debug)]
pub(crate) struct Deleted {
    pub(crate) receipt: Receipt,
    /// Keys that go now.
    pub(crate) gone: Vec<ChunkKey>,
    /// Keys that others claim.
    pub(crate) kept: Vec<ChunkKey>,
}

/// The journal. Dropped in this order: whoever gets the directory's lock may open it.
#[derive(Debug)]
pub(crate) struct Journal {
    database: Database,
    generation: AtomicU64,
    _lock: Arc<File>,
}

impl Journal {
    /// Opens the journal, or begins one. `lock` is held for as long as it is open.
    pub(crate) fn open(path: &Path, lock: Arc<File>) -> io::Result<Self> {
        if !path.exists() {
            // Half of a database cannot be opened: it gets its name when it is whole.
            let new = path.with_extension("new");
            volume::remove(&new)?;
            drop(tables::begin(&new).map_err(failed)?);
            volume::rename(&new, path)?;
            path.parent().map_or(Ok(()), volume::sync_folder)?;
        }
        let database = tables::begin(path).map_err(failed)?;
        let generation = tables::current(&database).map_err(failed)?;
        Ok(Self { database, generation: AtomicU64::new(generation), _lock: lock })
    }

    /// The number of the last deletion; 1 before the first, because 0 means that somebody does not know.
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    fn read<T>(&self, ask: impl FnOnce(&ReadTransaction) -> Done<T>) -> io::Result<T> {
        let answer = || -> Done<T> { ask(&self.database.begin_read()?) };
        answer().map_err(failed)
    }

    fn write<T>(&self, change: impl FnOnce(&WriteTransaction) -> Done<T>) -> io::Result<T> {
        let commit = || -> Done<T> {
            let mut transaction = self.database.begin_write()?;
            transaction.set_durability(Durability::Immediate)?;
            let done = change(&transaction)?;
            transaction.commit()?;
            Ok(done)
        };
        commit().map_err(failed)
    }

    /// Adds or renews a document's claim; false, and nothing is added, where it was deleted after `begun`.
    pub(crate) fn hold(
        &self,
        layout: LayoutId,
        keys: &[ChunkKey],
        claim: Claim,
        begun: u64,
    ) -> io::Result<bool> {
        self.write(|transaction| {
            if tables::deleted(&transaction.open_table(tables::DELETIONS)?, claim.document)? > begun {
                return Ok(false);
            }
            let mut claims = transaction.open_table(tables::CLAIMS)?;
            let mut holders = transaction.open_table(tables::HOLDERS)?;
            let mut dues = transaction.open_table(tables::DUES)?;
            for key in keys {
                let row = rows::claim_row(&claim, key);
                let before = claims.insert(&row, &rows::pack_held(layout, claim.until))?;
                if let Some(until) = before.map(|held| rows::unpack_held(held.value()).1) {
                    dues.remove(&rows::due(Kind::Claim, until, &row))?;
                }
                if claim.until != NEVER {
                    dues.insert(&rows::due(Kind::Claim, claim.until, &row), ())?;
                }
                holders.insert(&rows::swapped(&row), claim.until)?;
            }
            Ok(true)
        })
    }

    /// Whether a write that began at generation `begun` comes too late: its key or its document was deleted since.
    pub(crate) fn refuses(
        &self,
        key: &ChunkKey,
        document: Option<DocumentId>,
        begun: u64,
    ) -> io::Result<bool> {
        self.read(|transaction| {
            let deletion = match document {
                Some(document) => tables::deleted(&transaction.open_table(tables::DELETIONS)?, document)?,
                None => 0,
            };
            Ok(deletion > begun || !tables::deleted_since(transaction, &[*key], begun)?.is_empty())
        })
    }

    /// Which of these keys were deleted after generation `begun`.
    pub(crate) fn deleted_since(&self, keys: &[ChunkKey], begun: u64) -> io::Result<HashSet<ChunkKey>> {
        self.read(|transaction| tables::deleted_since(transaction, keys, begun))
    }

    /// What is true of a key at `now`.
    pub(crate) fn life(&self, key: &ChunkKey, now: u64) -> io::Result<Life> {
        Ok(self.lives(&[*key], now)?.first().copied().unwrap_or_default())
    }

    /// What is true of these keys at `now`, in their order.
    pub(crate) fn lives(&self, keys: &[ChunkKey], now: u64) -> io::Result<Vec<Life>> {
        self.read(|transaction| {
            let (holders, pins) =
                (transaction.open_table(tables::HOLDERS)?, transaction.open_table(tables::PINS)?);
            let mut lives = Vec::with_capacity(keys.len());
            for key in keys {
                let pinned = pins.get(key.as_bytes())?.map_or(0, |it| it.value());
                let claimed = tables::claims_of(&holders, key)?.into_iter().map(|(_, until)| until);
                let claimed = claimed.filter(|until| *until > now).max();
                lives.push(Life { claimed, pinned: if pinned > now { pinned } else { 0 } });
            }
            Ok(lives)
        })
    }

    /// All keys with claims or pins, ended ones too: for a start, which goes over every key anyway.
    pub(crate) fn all_lives(&self) -> io::Result<HashMap<ChunkKey, Life>> {
        self.read(|transaction| {
            let mut lives: HashMap<ChunkKey, Life> = HashMap::new();
            for row in transaction.open_table(tables::HOLDERS)?.iter()? {
                let (row, until) = row?;
                let life = lives.entry(ChunkKey::from_bytes(rows::part(row.value(), 0))).or_default();
                life.claimed = life.claimed.max(Some(until.value()));
            }
            for row in transaction.open_table(tables::PINS)?.iter()? {
                let (key, until) = row?;
                lives.entry(ChunkKey::from_bytes(*key.value())).or_default().pinned = until.value();
            }
            Ok(lives)
        })
    }

    /// Keys that were deleted, not more than so many.
    pub(crate) fn tombstones(&self, most: usize) -> io::Result<Vec<ChunkKey>> {
        self.read(|transaction| {
            let mut keys = Vec::new();
            for row in transaction.open_table(tables::TOMBSTONES)?.iter()?.take(most) {
                keys.push(ChunkKey::from_bytes(*row?.0.value()));
            }
            Ok(keys)
        })
    }

    /// When these keys were deleted last, in their order; as far as that is remembered.
    pub(crate) fn deleted_at(&self, keys: &[ChunkKey]) -> io::Result<Vec<Option<u64>>> {
        self.read(|transaction| {
            let tombstones = transaction.open_table(tables::TOMBSTONES)?;
            let at = |key: &ChunkKey| Ok(tombstones.get(key.as_bytes())?.map(|row| row.value().1));
            keys.iter().map(at).collect()
        })
    }

    /// Dooms keys, whoever claims them.
    pub(crate) fn delete(&self, keys: &[ChunkKey], now: u64) -> io::Result<()> {
        let generation = self.write(|transaction| {
            let generation = tables::advance(transaction)?;
            tables::doom(transaction, keys, generation, now)?;
            Ok(generation)
        })?;
        self.generation.store(generation, Ordering::Release);
        Ok(())
    }

    /// Takes a document's claims back and dooms the keys that nobody else claims, and those of `further` that nobody
    /// claims at all. `weigh` says what there is of a key; nothing, where the key is not one of that layout. Every time is a deletion with a number of its own,
    /// because a write may have begun since the last; what went is told again where nothing came since.
    pub(crate) fn delete_document(
        &self,
        document: DocumentId,
        further: &[ChunkKey],
        now: u64,
        mut weigh: impl FnMut(Option<LayoutId>, &ChunkKey) -> Option<Weight>,
    ) -> io::Result<Deleted> {
        let deleted = self.write(|transaction| {
            let generation = tables::advance(transaction)?;
            let claimed = tables::release(transaction, document)?;
            let (mut gone, mut kept) = (Vec::new(), Vec::new());
            let mut deletions = transaction.open_table(tables::DELETIONS)?;
            let before = deletions.get(document.as_bytes())?.map(|row| rows::unpack_receipt(row.value()));
            let (mut receipt, before) = before.unwrap_or_default();
            if !claimed.is_empty() {
                receipt = Receipt { keys: receipt.keys, ..Receipt::default() };
            }
            let holders = transaction.open_table(tables::HOLDERS)?;
            let further = further.iter().map(|key| (*key, None));
            for (key, layout) in claimed.into_iter().map(|(key, layout)| (key, Some(layout))).chain(further) {
                if tables::claims_of(&holders, &key)?.iter().any(|(_, until)| *until > now) {
                    // Of further keys nobody said that they were this document's here.
                    kept.extend(layout.map(|_| key));
                } else if let Some(weight) = weigh(layout, &key) {
                    weight.disk.into_iter().for_each(|bytes| receipt.disk.add(bytes));
                    weight.ram.into_iter().for_each(|bytes| receipt.ram.add(bytes));
                    weight.bucket.into_iter().for_each(|bytes| receipt.bucket.add(bytes));
                    gone.push(key);
                }
            }
            drop(holders);
            receipt.generation = generation;
            receipt.kept += kept.len() as u32;
            let keys: BTreeSet<ChunkKey> = receipt.keys.iter().chain(&gone).copied().collect();
            receipt.keys = keys.into_iter().collect();
            tables::doom(transaction, &gone, generation, now)?;
            deletions.insert(document.as_bytes(), &rows::pack_receipt(&receipt, now)[..])?;
            let mut dues = transaction.open_table(tables::DUES)?;
            dues.remove(&rows::due(Kind::Deletion, before, document.as_bytes()))?;
            dues.insert(&rows::due(Kind::Deletion, now, document.as_bytes()), ())?;
            Ok(Deleted { receipt, gone, kept })
        })?;
        self.generation.store(deleted.receipt.generation, Ordering::Release);
        Ok(deleted)
    }

    /// Keys whose files must go before anything is served.
    pub(crate) fn doomed(&self) -> io::Result<Vec<ChunkKey>> {
        self.read(|transaction| {
            let doomed = transaction.open_table(tables::DOOMED)?;
            let keys = doomed.iter()?.map(|row| Ok(ChunkKey::from_bytes(*row?.0.value())));
            keys.collect()
        })
    }

    /// The files of these keys are gone for good.
    pub(crate) fn done(&self, keys: &[ChunkKey]) -> io::Result<()> {
        self.write(|transaction| {
            let mut doomed = transaction.open_table(tables::DOOMED)?;
            keys.iter().try_for_each(|key| Ok(doomed.remove(key.as_bytes()).map(drop)?))
        })
    }

    /// Pins keys; a pin that ends later stays.
    pub(crate) fn pin(&self, keys: &[ChunkKey], until: u64) -> io::Result<()> {
        self.write(|transaction| {
            let (mut pins, mut dues) =
                (transaction.open_table(tables::PINS)?, transaction.open_table(tables::DUES)?);
            for key in keys {
                let before = tables::unpin(&mut pins, &mut dues, key)?;
                let until = until.max(before);
                pins.insert(key.as_bytes(), until)?;
                dues.insert(&rows::due(Kind::Pin, until, key.as_bytes()), ())?;
            }
            Ok(())
        })
    }

    /// Ends pins.
    pub(crate) fn unpin(&self, keys: &[ChunkKey]) -> io::Result<()> {
        self.write(|transaction| {
            let (mut pins, mut dues) =
                (transaction.open_table(tables::PINS)?, transaction.open_table(tables::DUES)?);
            keys.iter().try_for_each(|key| tables::unpin(&mut pins, &mut dues, key).map(drop))
        })
    }

    /// Forgets ended claims on keys whose objects have expired and are gone.
    pub(crate) fn lapse(&self, keys: &[ChunkKey], now: u64) -> io::Result<()> {
        self.write(|transaction| {
            let mut claims = transaction.open_table(tables::CLAIMS)?;
            let mut holders = transaction.open_table(tables::HOLDERS)?;
            let mut dues = transaction.open_table(tables::DUES)?;
            for key in keys {
                for (row, until) in
                    tables::claims_of(&holders, key)?.into_iter().filter(|(_, until)| *until <= now)
                {
                    let claim = rows::swapped(&row);
                    holders.remove(&row)?;
                    claims.remove(&claim)?;
                    dues.remove(&rows::due(Kind::Claim, until, &claim))?;
                }
            }
            Ok(())
        })
    }

    /// Forgets claims and pins that ended by `now` and tombstones of `old` and before, at most `most` of each; how
    /// many that were. The objects of ended claims must have gone before.
    pub(crate) fn sweep(&self, now: u64, old: u64, most: usize) -> io::Result<usize> {
        let mut due = Vec::new();
        self.read(|transaction| {
            let dues = transaction.open_table(tables::DUES)?;
            for kind in rows::KINDS {
                let by = if matches!(kind, Kind::Claim | Kind::Pin) { now } else { old };
                let (least, greatest) = rows::due_by(kind, by);
                for row in dues.range::<&Due>(&least..=&greatest)?.take(most) {
                    due.push((kind, *row?.0.value()));
                }
            }
            Ok(())
        })?;
        // A commit costs the disk something.
        if !due.is_empty() {
            self.write(|transaction| tables::forget(transaction, &due))?;
        }
        Ok(due.len())
    }
}

fn failed(error: redb::Error) -> io::Error {
    io::Error::other(format!("journal: {error}"))
}

#[cfg(test)]
mod tests;
