//! Taking stock: what the bucket holds, compared with what is on disk and what the journal says.
//!
//! Names and lengths come from listing. Of what is on disk, too, that is enough; of what is not, the head is read.

use super::Bucket;
use super::objects::Listed;
use crate::catalogue::{Record, Remote};
use crate::core::Core;
use crate::inspect::{self, Unusable};
use crate::metrics;
use crate::scan;
use cacheclip_chunk::ChunkKey;
use cacheclip_rpc::v1::MissReason;
use futures::{StreamExt as _, stream};
use std::collections::HashSet;
use std::io;
use std::path::Path;
use std::sync::{Arc, Weak};

/// Objects that are compared before others get a turn.
const BATCH: usize = 256;
/// Heads that are read side by side.
const READS: usize = 16;

/// Learns what the bucket holds. Holds the store for moments only.
pub(super) async fn take(store: &Weak<Core>, bucket: &Arc<Bucket>) -> io::Result<()> {
    let Some(begun) = store.upgrade().map(|core| core.journal.generation()) else { return Ok(()) };
    let listed = bucket.objects.list().await;
    metrics::bucket("list", if listed.is_ok() { "done" } else { "failed" }, 1);
    let listed = listed.map_err(io::Error::other)?;
    let mut seen = HashSet::with_capacity(listed.len());
    for batch in listed.chunks(BATCH) {
        seen.extend(batch.iter().map(|it| it.key));
        let batch = batch.to_vec();
        let unknown = with(store, move |core| core.compare(batch, begun)).await?;
        let reading = unknown.into_iter().map(|it| {
            let bucket = Arc::clone(bucket);
            async move { tokio::task::spawn_blocking(move || (read(&bucket, &it), it)).await }
        });
        let mut reading = stream::iter(reading).buffer_unordered(READS);
        let mut found = Vec::new();
        while let Some(read) = reading.next().await {
            let (head, listed) = read.map_err(io::Error::other)?;
            match head {
                Err(Unusable::Read(error)) if error.kind() != io::ErrorKind::UnexpectedEof => {
                    return Err(error);
                }
                head => found.push((listed, head)),
            }
        }
        with(store, move |core| core.adopt(found, begun)).await?;
    }
    let objects = seen.len();
    with(store, move |core| {
        let mut catalogue = core.catalogue.lock();
        for key in catalogue.unsure().difference(&seen) {
            catalogue.set_remote(key, Remote::No);
        }
        drop(catalogue);
        core.gauge();
        Ok(())
    })
    .await?;
    bucket.listed.send_replace(true);
    tracing::info!(objects, "the bucket is listed");
    Ok(())
}

/// Blocking work on a store that may be gone, which is then nobody's loss.
async fn with<T: Default + Send + 'static>(
    store: &Weak<Core>,
    work: impl FnOnce(&Core) -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let Some(core) = store.upgrade() else { return Ok(T::default()) };
    tokio::task::spawn_blocking(move || work(&core)).await.map_err(io::Error::other)?
}

fn read(bucket: &Bucket, listed: &Listed) -> Result<Record, Unusable> {
    let name = format!("{}.kv", listed.key);
    let object = bucket.objects.object_of(&listed.key);
    inspect::head(Path::new(&name), &object, listed.bytes).map(|head| Record::from(&head))
}

impl Core {
    /// Compares listed objects with the catalogue; which of them it does not know.
    fn compare(&self, listed: Vec<Listed>, begun: u64) -> io::Result<Vec<Listed>> {
        let keys: Vec<ChunkKey> = listed.iter().map(|it| it.key).collect();
        let (deleted, lives) = (self.journal.deleted_at(&keys)?, self.journal.lives(&keys, 0)?);
        // What is deleted from now on leaves the catalogue, and `adopt` looks again.
        let since = self.journal.deleted_since(&keys, begun)?;
        let (mut unknown, mut late) = (Vec::new(), Vec::new());
        for ((listed, deleted), life) in listed.into_iter().zip(deleted).zip(lives) {
            let (key, at) = (listed.key, listed.modified);
            // What is doomed is its deletion's to remove, and so is what was deleted since the listing began.
            if since.contains(&key) || self.doomed.lock().contains_key(&key) {
                continue;
            }
            let mut catalogue = self.catalogue.lock();
            // Its deletion was complete while this bucket was in no configuration.
            if deleted.is_some_and(|deleted| at <= deleted) {
                late.push(key);
                continue;
            }
            match catalogue.known(&key) {
                None => unknown.push(listed),
                Some(record) if record.bytes == listed.bytes && catalogue.remote(&key) == Remote::Unsure => {
                    let came = catalogue.on_disk(&key).is_none();
                    catalogue.set_remote(&key, Remote::Yes);
                    // The file's time says when it came back to disk, where it did.
                    catalogue.expire_by(&key, scan::expiry(life.claimed, at, self.ttl));
                    if came {
                        self.announce.tell(key, true);
                    }
                }
                // Another container: the upload of the one on disk takes its place.
                Some(_) => {}
            }
        }
        if !late.is_empty() {
            self.bucket.as_ref().map_or(Ok(()), |bucket| bucket.remove(&late))?;
            let mut catalogue = self.catalogue.lock();
            late.iter().for_each(|key| catalogue.set_remote(key, Remote::No));
        }
        Ok(unknown)
    }

    /// Adds what only the bucket has.
    fn adopt(&self, found: Vec<(Listed, Result<Record, Unusable>)>, begun: u64) -> io::Result<()> {
        let keys: Vec<ChunkKey> = found.iter().map(|(listed, _)| listed.key).collect();
        let mut damaged = Vec::new();
        {
            let _changes = self.changes.lock();
            let (lives, since) = (self.journal.lives(&keys, 0)?, self.journal.deleted_since(&keys, begun)?);
            for ((listed, head), life) in found.into_iter().zip(lives) {
                let (key, at) = (listed.key, listed.modified);
                match head {
                    Ok(record) => {
                        if since.contains(&key) || self.doomed.lock().contains_key(&key) {
                            continue;
                        }
                        let mut catalogue = self.catalogue.lock();
                        if catalogue.known(&key).is_some() {
                            // Put since: the upload of that one takes its place.
                            catalogue.set_remote(&key, Remote::Unsure);
                            continue;
                        }
                        catalogue.insert_remote(key, record);
                        catalogue.expire_at(&key, scan::expiry(life.claimed, at, self.ttl));
                        drop(catalogue);
                        self.announce.tell(key, true);
                    }
                    Err(why) if why.is_foreign() => {
                        tracing::warn!(%key, %why, "object of the bucket is left alone");
                    }
                    Err(why) => {
                        tracing::warn!(%key, %why, "object is damaged in the bucket: removed from there");
                        metrics::verify_failed(metrics::AT_BUCKET);
                        self.catalogue.lock().remember(key, MissReason::Corrupt);
                        damaged.push(key);
                    }
                }
            }
        }
        match &self.bucket {
            Some(bucket) if !damaged.is_empty() => bucket.remove(&damaged),
            _ => Ok(()),
        }
    }
}
