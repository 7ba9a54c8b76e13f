//! Claims, deletion, pins and expiry.
//!
//! A deletion is first written to the journal, with its keys doomed, and from then on none of them is served or
//! published by who began before. Then their files go. A deletion that breaks off in between is finished when it is
//! asked for again, by the sweeper, before its key is published anew, or by the next start.

use crate::catalogue::Remote;
use crate::core::Core;
use crate::journal::{Claim, NEVER, Receipt, Weight};
use crate::metrics;
use cacheclip_chunk::{ChunkKey, DocumentId, LayoutId};
use cacheclip_rpc::v1::MissReason;
use std::collections::HashSet;
use std::io;
use std::sync::Weak;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Files that are removed before others get a turn.
const BATCH: usize = 256;
/// Rows of each kind that the journal forgets in one turn of the sweeper.
const ROWS: usize = 4096;

/// Sweeps every so often until the store is gone. Holds the store for one turn at a time.
pub(crate) async fn run(store: Weak<Core>, closed: CancellationToken, every: Duration) {
    loop {
        tokio::select! {
            biased;
            () = closed.cancelled() => return,
            () = tokio::time::sleep(every) => {}
        }
        loop {
            let Some(core) = store.upgrade() else { return };
            match tokio::task::spawn_blocking(move || core.sweep()).await {
                Ok(Ok(true)) => {}
                Ok(Ok(false)) => break,
                Ok(Err(error)) => {
                    tracing::error!(%error, "the sweeper could not remove everything: it tries again");
                    break;
                }
                Err(error) => {
                    tracing::error!(%error, "the sweeper panicked: it tries again");
                    break;
                }
            }
        }
    }
}

impl Core {
    /// The generation at which a writer began that says `told`; 0: it does not know, and begins now.
    pub(crate) fn began(&self, told: u64) -> u64 {
        let now = self.journal.generation();
        // More than there were is another journal's number.
        if told == 0 { now } else { told.min(now) }
    }

    /// A document's claim from now on; `ttl` of 0: for ever.
    pub(crate) fn claim(&self, document: DocumentId, ttl: u64) -> Claim {
        let until = if ttl == 0 { NEVER } else { self.clock.now().saturating_add(ttl).min(NEVER - 1) };
        Claim { document, until }
    }

    /// Adds or renews a claim on keys, here or not; false where the document was deleted after `begun`.
    pub(crate) fn hold(
        &self,
        layout: LayoutId,
        keys: &[ChunkKey],
        claim: Claim,
        begun: u64,
    ) -> io::Result<bool> {
        let _changes = self.changes.lock();
        let held = self.journal.hold(layout, keys, claim, begun)?;
        if held {
            self.renew(keys)?;
        }
        Ok(held)
    }

    /// Tells the catalogue when claimed keys expire. Under `changes`.
    fn renew(&self, keys: &[ChunkKey]) -> io::Result<()> {
        let lives = self.journal.lives(keys, self.clock.now())?;
        let mut catalogue = self.catalogue.lock();
        for (key, life) in keys.iter().zip(lives) {
            if let Some(until) = life.claimed {
                catalogue.expire_at(key, until);
            }
        }
        Ok(())
    }

    /// Deletes keys of a layout; how many objects and bytes that were.
    pub(crate) fn delete(&self, layout: LayoutId, keys: &[ChunkKey]) -> io::Result<(u32, u64)> {
        let (keys, taken) = {
            let _changes = self.changes.lock();
            let mut keys = keys.to_vec();
            {
                let catalogue = self.catalogue.lock();
                keys.retain(|key| catalogue.record(key).is_none_or(|record| record.layout == layout));
            }
            self.journal.delete(&keys, self.clock.now())?;
            let taken = self.take_deleted(&keys);
            (keys, taken)
        };
        self.finish_all(&keys)?;
        Ok(taken)
    }

    /// Deletes what a document alone claims, and of `further` keys what nobody claims.
    pub(crate) fn delete_document(&self, document: DocumentId, further: &[ChunkKey]) -> io::Result<Receipt> {
        let receipt = {
            let _changes = self.changes.lock();
            let weigh = |layout: Option<LayoutId>, key: &ChunkKey| self.weigh(layout, key);
            let deleted = self.journal.delete_document(document, further, self.clock.now(), weigh)?;
            self.take_deleted(&deleted.gone);
            self.renew(&deleted.kept)?;
            deleted.receipt
        };
        // Those of an earlier deletion that broke off, too.
        self.finish_all(&receipt.keys)?;
        Ok(receipt)
    }

    /// What there is of a key; nothing where it is another layout's.
    fn weigh(&self, layout: Option<LayoutId>, key: &ChunkKey) -> Option<Weight> {
        let (record, disk, bucket) = {
            let catalogue = self.catalogue.lock();
            let record = catalogue.record(key);
            let bytes = record.map(|record| record.bytes);
            let in_bucket = catalogue.remote(key) == Remote::Yes;
            (record, catalogue.on_disk(key).and(bytes), bytes.filter(|_| in_bucket))
        };
        if record.zip(layout).is_some_and(|(record, layout)| record.layout != layout) {
            return None;
        }
        let in_ram = self.ram.lock().peek(key).is_some();
        Some(Weight { disk, ram: record.filter(|_| in_ram).map(|record| record.bytes), bucket })
    }

    /// Takes doomed keys out of what is served; their bytes count until their files are gone. Under `changes`.
    fn take_deleted(&self, keys: &[ChunkKey]) -> (u32, u64) {
        let (mut objects, mut bytes) = (0, 0);
        for key in keys {
            let taken = {
                let mut catalogue = self.catalogue.lock();
                let taken = catalogue.take(key, MissReason::Deleted);
                if taken.is_none() {
                    catalogue.remember(*key, MissReason::Deleted);
                }
                taken
            };
            {
                let mut doomed = self.doomed.lock();
                let doomed = doomed.entry(*key).or_default();
                doomed.in_bucket = self.bucket.is_some();
                doomed.bytes += taken.filter(|it| it.on_disk).map_or(0, |it| it.record.bytes);
            }
            if let Some(taken) = taken.filter(|it| it.here) {
                self.drop_from_tiers(*key);
                objects += 1;
                bytes += taken.record.bytes;
            }
        }
        (objects, bytes)
    }

    /// Removes what there is of deleted keys. Where the bucket cannot be reached, all else goes, and they stay doomed.
    fn finish_all(&self, keys: &[ChunkKey]) -> io::Result<()> {
        let cleared = keys.chunks(BATCH).try_for_each(|batch| self.clear_doomed(batch));
        for batch in keys.chunks(BATCH) {
            let _changes = self.changes.lock();
            self.finish(batch)?;
        }
        // What went before it was deleted is gone for good, too.
        self.disk.settle()?;
        self.gauge();
        cleared
    }

    /// Removes the files of those of these keys that are doomed, and their doom where the bucket has nothing of them.
    /// Under `changes`.
    pub(crate) fn finish(&self, keys: &[ChunkKey]) -> io::Result<()> {
        let keys: HashSet<ChunkKey> = {
            let doomed = self.doomed.lock();
            keys.iter().filter(|key| doomed.contains_key(*key)).copied().collect()
        };
        if keys.is_empty() {
            return Ok(());
        }
        for key in &keys {
            self.disk.remove(key)?;
            let bytes = self.doomed.lock().get_mut(key).map_or(0, |it| std::mem::take(&mut it.bytes));
            self.catalogue.lock().release(bytes);
        }
        let damaged = self.catalogue.lock().take_damaged(&keys);
        for (path, bytes) in damaged {
            self.disk.remove_damaged(&path)?;
            self.catalogue.lock().release(bytes);
        }
        self.disk.settle()?;
        let done: HashSet<ChunkKey> = {
            let doomed = self.doomed.lock();
            keys.into_iter().filter(|key| doomed.get(key).is_some_and(|it| !it.in_bucket)).collect()
        };
        if done.is_empty() {
            return Ok(());
        }
        self.journal.done(&done.iter().copied().collect::<Vec<_>>())?;
        self.doomed.lock().retain(|key, _| !done.contains(key));
        Ok(())
    }

    /// Pins those of these keys that are here; how many.
    pub(crate) fn pin(&self, layout: LayoutId, keys: &[ChunkKey], seconds: u64) -> io::Result<u32> {
        let _changes = self.changes.lock();
        let keys = self.here(layout, keys);
        let now = self.clock.now();
        self.journal.pin(&keys, now.saturating_add(seconds))?;
        let lives = self.journal.lives(&keys, now)?;
        let mut catalogue = self.catalogue.lock();
        let pinned = keys.iter().zip(lives).filter(|(key, life)| catalogue.pin(key, life.pinned));
        Ok(pinned.count() as u32)
    }

    /// Ends pins; of how many keys that are here.
    pub(crate) fn unpin(&self, layout: LayoutId, keys: &[ChunkKey]) -> io::Result<u32> {
        let _changes = self.changes.lock();
        let keys = self.here(layout, keys);
        self.journal.unpin(&keys)?;
        let mut catalogue = self.catalogue.lock();
        Ok(keys.iter().filter(|key| catalogue.unpin(key)).count() as u32)
    }

    fn here(&self, layout: LayoutId, keys: &[ChunkKey]) -> Vec<ChunkKey> {
        let catalogue = self.catalogue.lock();
        keys.iter().filter(|key| catalogue.find(layout, key).is_ok()).copied().collect()
    }

    /// Removes the files of those of these keys whose time is over. What the bucket may have of them stays known, and
    /// is served no more, until it is `cleared`. Under `changes`.
    pub(crate) fn remove_expired(&self, keys: &[ChunkKey], cleared: bool) -> io::Result<()> {
        let expired: Vec<ChunkKey> = {
            let catalogue = self.catalogue.lock();
            keys.iter().filter(|key| catalogue.has_expired(key)).copied().collect()
        };
        if expired.is_empty() {
            return Ok(());
        }
        let mut gone = Vec::new();
        for key in &expired {
            self.disk.remove(key)?;
            {
                let mut catalogue = self.catalogue.lock();
                let left = catalogue.leave_disk(key, MissReason::Expired);
                catalogue.release(left.unwrap_or_default());
                if cleared {
                    catalogue.take(key, MissReason::Expired);
                }
                if catalogue.known(key).is_none() {
                    gone.push(*key);
                    metrics::expired();
                }
            }
            self.drop_from_tiers(*key);
        }
        // A file that came back without its claims would stay.
        self.disk.settle()?;
        self.journal.lapse(&gone, self.clock.now())?;
        self.gauge();
        Ok(())
    }

    /// One turn of the sweeper; true where there is more to do at once. Blocking.
    pub(crate) fn sweep(&self) -> io::Result<bool> {
        let now = self.clock.now();
        self.catalogue.lock().end_pins();
        let doomed: Vec<ChunkKey> = self.doomed.lock().keys().take(BATCH).copied().collect();
        let cleared = self.clear_doomed(&doomed);
        if self.bucket.as_ref().is_some_and(|bucket| !bucket.is_listed()) {
            // What it has of them is not known: their claims must not be forgotten before it is removed.
            let _changes = self.changes.lock();
            return self.finish(&doomed).and(cleared).map(|()| false);
        }
        let (expired, strays) = {
            let catalogue = self.catalogue.lock();
            let strays = if self.bucket.is_some() { catalogue.strays(BATCH) } else { Vec::new() };
            (catalogue.expired(now, BATCH), strays)
        };
        let cleared = cleared.and_then(|()| self.clear(&[&expired[..], &strays].concat()));
        let _changes = self.changes.lock();
        self.finish(&doomed)?;
        self.remove_expired(&expired, cleared.is_ok())?;
        cleared?.note(&mut self.catalogue.lock());
        if expired.len() == BATCH {
            return Ok(true);
        }
        self.disk.settle()?;
        let forgotten = self.journal.sweep(now, now.saturating_sub(self.tombstone_seconds), ROWS)?;
        self.gauge();
        Ok(forgotten >= ROWS)
    }
}

#[cfg(test)]
mod tests;
