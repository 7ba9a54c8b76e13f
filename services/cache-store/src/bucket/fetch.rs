//! Promotion: an object that the bucket alone has is brought back to the disk, verified, to be read from there.

use super::{Bucket, Failure};
use crate::catalogue::{Record, Remote};
use crate::core::Core;
use crate::disk::Temporary;
use crate::metrics;
use crate::upload::{Announced, Failed, Room};
use cacheclip_chunk::{ChunkKey, ContainerHash, Head};
use cacheclip_rpc::v1::MissReason;
use std::io;

impl Core {
    /// Whether the bucket has this container and the disk has not.
    pub(crate) fn is_remote(&self, key: &ChunkKey, container: ContainerHash) -> bool {
        let catalogue = self.catalogue.lock();
        catalogue.on_disk(key).is_none() && catalogue.record(key).is_some_and(|it| it.hash == container)
    }

    /// Brings an object back to disk; who asks for the same one meanwhile waits for it, too. Blocking.
    pub(crate) fn promote(&self, key: &ChunkKey, record: &Record) -> Result<(), MissReason> {
        let Some(bucket) = &self.bucket else { return Err(MissReason::Unavailable) };
        bucket.fetches.share((*key, record.hash), || {
            // Another reader may just have brought it.
            if !self.is_remote(key, record.hash) {
                return Ok(());
            }
            if bucket.objects.is_down() {
                return Err(MissReason::Timeout);
            }
            let fetched = self.fetch(bucket, key, record);
            let outcome = match &fetched {
                Ok(()) => "done",
                Err(Failed::Bucket(Failure::Missing)) => "missing",
                Err(Failed::Bucket(_) | Failed::Io(_)) => "failed",
                Err(Failed::Invalid(..) | Failed::Damaged(_)) => "corrupt",
            };
            metrics::bucket("fetch", outcome, 1);
            match fetched {
                Ok(()) => Ok(()),
                Err(Failed::Io(error)) => {
                    tracing::error!(%key, %error, "an object of the bucket cannot be written to disk");
                    Err(MissReason::Unavailable)
                }
                Err(Failed::Bucket(why @ (Failure::Timeout(_) | Failure::Refused(_)))) => {
                    tracing::debug!(%key, %why, "an object was not fetched");
                    Err(MissReason::Timeout)
                }
                Err(damage) => Err(self.lose(key, record.hash, &damage)),
            }
        })
    }

    fn fetch(&self, bucket: &Bucket, key: &ChunkKey, record: &Record) -> Result<(), Failed> {
        let objects = &bucket.objects;
        let turn = async { tokio::time::timeout(objects.timeout(), bucket.turns.acquire()).await };
        let _turn = objects.wait(turn).map_err(|_| Failure::Timeout(objects.timeout()))?;
        // Room is made when it has answered: a bucket that is away must not cost the disk anything.
        let mut frames = objects.fetch(key)?;
        let full = || Failed::Io(io::Error::new(io::ErrorKind::StorageFull, "the disk has no room for it"));
        let room = Room::reserve(self, record.bytes).ok_or_else(full)?;
        let announced = Announced { layout: record.layout, key: *key, bytes: record.bytes };
        let (temporary, head) = self.write(announced, || Ok(frames.next()?))?.ok_or_else(full)?;
        if head.hash() != record.hash {
            return Err(Failed::Invalid("data", "it is another container".into()));
        }
        if self.publish_again(temporary, &head)? {
            room.keep();
        }
        Ok(())
    }

    /// Publishes what came from the bucket, unless its object was deleted, expired or put anew meanwhile.
    fn publish_again(&self, temporary: Temporary, head: &Head) -> io::Result<bool> {
        let key = head.key();
        let _changes = self.changes.lock();
        if !self.is_remote(&key, head.hash()) || self.catalogue.lock().has_expired(&key) {
            return Ok(false);
        }
        let life = self.journal.life(&key, self.clock.now())?;
        self.disk.publish(temporary, &key)?;
        {
            let mut catalogue = self.catalogue.lock();
            catalogue.arrive(&key);
            if life.pinned > 0 {
                catalogue.pin(&key, life.pinned);
            }
        }
        self.gauge();
        Ok(true)
    }

    /// The bucket's copy is not what was uploaded: it is served no more and removed, at once or by the sweeper.
    fn lose(&self, key: &ChunkKey, container: ContainerHash, why: &dyn std::fmt::Display) -> MissReason {
        {
            let mut catalogue = self.catalogue.lock();
            match catalogue.known_as(key) {
                // Deleted or expired while it was fetched.
                None => return catalogue.reason(key),
                Some(known) if known != container || catalogue.remote(key) != Remote::Yes => {
                    return MissReason::Unavailable;
                }
                Some(_) => {}
            }
            catalogue.set_remote(key, Remote::Unsure);
            if catalogue.on_disk(key).is_none() {
                catalogue.remember(*key, MissReason::Corrupt);
            }
        }
        metrics::verify_failed(metrics::AT_BUCKET);
        tracing::warn!(%key, %why, "object is damaged in the bucket: removed from there");
        self.drop_from_tiers(*key);
        match self.clear(&[*key]) {
            Ok(cleared) => cleared.note(&mut self.catalogue.lock()),
            Err(error) => tracing::warn!(%key, %error, "it cannot be removed now: the sweeper tries again"),
        }
        self.gauge();
        MissReason::Corrupt
    }
}
