//! The bucket: object storage behind the disk, where an object that leaves the disk may stay.
//!
//! Objects go there after they were published on disk, by a queue that nobody waits for, and come back, verified, when
//! they are read and the disk has none. Every node has its own part of the bucket, `URL/NODE/<2 hex>/KEY.kv`: what is
//! there is one store's, as what is in its directory is, so that listing, deletion and repair need nobody's consent.
//! A key changes in one pair of hands at a time ([`uploads`]): an upload that is under way is waited for before its
//! object is deleted, and so cannot bring it back.
//!
//! No call of the bucket is made under the store's `changes` lock: the network must not stop puts.

mod fetch;
mod objects;
mod stock;
#[cfg(test)]
mod tests;
mod upload;
mod uploads;

pub(crate) use objects::{Failure, Objects};

use crate::catalogue::{Catalogue, Remote};
use crate::core::Core;
use crate::error::Error;
use crate::flight::Flights;
use crate::metrics;
use crate::options::Options;
use cacheclip_chunk::{ChunkKey, ContainerHash};
use cacheclip_rpc::v1::MissReason;
use cacheclip_service::seconds;
use std::io;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use tokio::sync::{Semaphore, oneshot, watch};
use tokio_util::sync::CancellationToken;
use uploads::{Hold, Uploads};

/// Objects that are uploaded side by side: what one waits for is mostly the network.
const UPLOADS: usize = 4;
/// Objects that are fetched side by side; each holds one segment in memory.
const FETCHES: usize = 16;

/// A store's part of a bucket.
#[derive(Debug)]
pub(crate) struct Bucket {
    objects: Objects,
    uploads: Arc<Uploads>,
    fetches: Flights<(ChunkKey, ContainerHash), Result<(), MissReason>>,
    turns: Semaphore,
    /// Whether all that it holds is known.
    listed: watch::Sender<bool>,
}

impl Bucket {
    /// The bucket of a configuration, if it has one. Nothing is asked of it yet.
    pub(crate) fn open(options: &Options) -> Result<Option<Arc<Self>>, Error> {
        let Some(url) = &options.bucket else { return Ok(None) };
        let wrong = |field, reason: String| Error::Option { field, reason };
        let timeout = seconds(options.bucket_timeout_seconds);
        if timeout.is_zero() {
            let why = format!("is {}, must be above 0", options.bucket_timeout_seconds);
            return Err(wrong("bucket_timeout_seconds", why));
        }
        if options.bucket_queue == 0 {
            return Err(wrong("bucket_queue", "is 0, must be above 0: nothing would be uploaded".into()));
        }
        let objects = Objects::open(url, timeout).map_err(|why| wrong("bucket", why))?;
        Ok(Some(Self::over(objects.below(&options.node), options.bucket_queue)))
    }

    fn over(objects: Objects, queue: usize) -> Arc<Self> {
        Arc::new(Self {
            objects,
            uploads: Arc::new(Uploads::new(queue)),
            fetches: Flights::default(),
            turns: Semaphore::new(FETCHES),
            listed: watch::Sender::new(false),
        })
    }

    /// Whether all that it holds is known.
    pub(crate) fn is_listed(&self) -> bool {
        *self.listed.borrow()
    }

    /// Takes keys in hand: nobody uploads or removes their objects until the hold is dropped. Waits for uploads that
    /// are under way, which end at their next part where the object is wanted no more. Blocking.
    fn hold(&self, keys: &[ChunkKey]) -> io::Result<Hold> {
        let until = Instant::now() + self.objects.timeout();
        Uploads::hold(&self.uploads, keys, until)
            .ok_or_else(|| io::Error::new(io::ErrorKind::TimedOut, "an upload to the bucket is under way"))
    }

    /// Removes the objects of keys, there or not. Blocking.
    fn remove(&self, keys: &[ChunkKey]) -> io::Result<()> {
        let removed = self.objects.wait(self.objects.remove(keys));
        metrics::bucket("delete", if removed.is_ok() { "done" } else { "failed" }, keys.len());
        removed.map_err(|why| io::Error::other(format!("the bucket: {why}")))
    }
}

/// Keys whose copies were removed. None of them is uploaded again while this lives.
#[derive(Debug, Default)]
pub(crate) struct Cleared {
    removed: Vec<ChunkKey>,
    _hold: Option<Hold>,
}

impl Cleared {
    /// Tells the catalogue.
    pub(crate) fn note(&self, catalogue: &mut Catalogue) {
        self.removed.iter().for_each(|key| catalogue.set_remote(key, Remote::No));
    }
}

impl Core {
    /// Removes from the bucket those of these keys that are doomed: until then their deletion is not complete, known
    /// to be there or not. Blocking; not under `changes`.
    pub(crate) fn clear_doomed(&self, keys: &[ChunkKey]) -> io::Result<()> {
        let Some(bucket) = &self.bucket else { return Ok(()) };
        let keys: Vec<ChunkKey> = {
            let doomed = self.doomed.lock();
            keys.iter().filter(|key| doomed.get(*key).is_some_and(|it| it.in_bucket)).copied().collect()
        };
        if keys.is_empty() {
            return Ok(());
        }
        let _hold = bucket.hold(&keys)?;
        bucket.remove(&keys)?;
        let mut doomed = self.doomed.lock();
        for key in &keys {
            if let Some(it) = doomed.get_mut(key) {
                it.in_bucket = false;
            }
        }
        Ok(())
    }

    /// Removes the copies in the bucket of those of these keys that are not served any more. Blocking; not under
    /// `changes`.
    pub(crate) fn clear(&self, keys: &[ChunkKey]) -> io::Result<Cleared> {
        let Some(bucket) = self.bucket.as_ref().filter(|_| !keys.is_empty()) else {
            return Ok(Cleared::default());
        };
        let hold = bucket.hold(keys)?;
        let removed: Vec<ChunkKey> = {
            let catalogue = self.catalogue.lock();
            let stray = |key: &&ChunkKey| catalogue.remote(key) != Remote::No && !catalogue.is_served(key);
            keys.iter().filter(stray).copied().collect()
        };
        if !removed.is_empty() {
            bucket.remove(&removed)?;
        }
        Ok(Cleared { removed, _hold: Some(hold) })
    }

    /// Queues an object for the bucket, if there is one and the queue has room.
    pub(crate) fn offer(&self, key: ChunkKey) {
        let Some(bucket) = &self.bucket else { return };
        if !bucket.uploads.offer(key) {
            metrics::bucket("upload", "dropped", 1);
        }
        metrics::bucket_queue(bucket.uploads.waiting());
    }

    /// Queues what is on disk and not in the bucket, as far as there is room.
    fn offer_all(&self) {
        let Some(bucket) = &self.bucket else { return };
        let keys = self.catalogue.lock().to_upload();
        keys.into_iter().take_while(|key| bucket.uploads.offer(*key)).for_each(drop);
        metrics::bucket_queue(bucket.uploads.waiting());
    }
}

/// Looks after a store's bucket until the store is gone: learns what it holds, and has uploaded what it lacks. `listed`
/// is told when the bucket has been asked once, well or not.
pub(crate) async fn run(
    store: Weak<Core>,
    closed: CancellationToken,
    every: Duration,
    listed: oneshot::Sender<()>,
) {
    let Some(bucket) = store.upgrade().and_then(|core| core.bucket.clone()) else { return };
    for _ in 0..UPLOADS {
        tokio::spawn(upload::run(store.clone(), Arc::clone(&bucket), closed.clone()));
    }
    let mut listed = Some(listed);
    loop {
        if !bucket.is_listed() {
            let taken = tokio::select! {
                biased;
                () = closed.cancelled() => return,
                taken = stock::take(&store, &bucket) => taken,
            };
            if let Err(why) = taken {
                tracing::warn!(%why, "the bucket cannot be listed: what it alone holds is not served until it can");
            }
        }
        if let Some(listed) = listed.take() {
            // A start that stopped waiting does not mind.
            let _ = listed.send(());
        }
        if let Some(core) = store.upgrade().filter(|_| bucket.is_listed()) {
            core.offer_all();
        }
        tokio::select! {
            biased;
            () = closed.cancelled() => return,
            () = tokio::time::sleep(every) => {}
        }
    }
}
