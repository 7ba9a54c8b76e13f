//! Write-behind: what was published on disk goes to the bucket, and nobody waits for it.

use super::Bucket;
use crate::catalogue::{Record, Remote};
use crate::core::Core;
use crate::metrics;
use cacheclip_chunk::ChunkKey;
use std::fs::File;
use std::sync::{Arc, Weak};
use tokio_util::sync::CancellationToken;

/// Uploads what is queued, one object at a time, until the store is gone. Holds the store for moments only.
pub(super) async fn run(store: Weak<Core>, bucket: Arc<Bucket>, closed: CancellationToken) {
    let mut listed = bucket.listed.subscribe();
    let work = async {
        // Before, what it holds is not known, and a start would upload all of it again.
        if listed.wait_for(|listed| *listed).await.is_err() {
            return;
        }
        loop {
            let key = bucket.uploads.next().await;
            let outcome = upload(&store, &bucket, key).await;
            bucket.uploads.done(&key);
            metrics::bucket_queue(bucket.uploads.waiting());
            if let Some(outcome) = outcome {
                metrics::bucket("upload", outcome, 1);
            }
        }
    };
    tokio::select! {
        biased;
        () = closed.cancelled() => {}
        () = work => {}
    }
}

/// Uploads one object; how that ended, if it began.
async fn upload(store: &Weak<Core>, bucket: &Bucket, key: ChunkKey) -> Option<&'static str> {
    let core = store.upgrade()?;
    let begun = tokio::task::spawn_blocking(move || core.begin_upload(&key)).await;
    let (record, file) = begun.ok().flatten()?;
    let wanted = || store.upgrade().is_some_and(|core| core.is_wanted(&key, &record));
    match bucket.objects.send(&key, file, record.bytes, wanted).await {
        Ok(true) => {
            store.upgrade()?.uploaded(&key, &record);
            Some("done")
        }
        Ok(false) => Some("abandoned"),
        Err(why) => {
            tracing::debug!(%key, %why, "an object was not uploaded: it is tried again while it is on disk");
            Some("failed")
        }
    }
}

impl Core {
    /// An object's file, where it is still to be uploaded. From now on its copy counts as one that may be there.
    fn begin_upload(&self, key: &ChunkKey) -> Option<(Record, File)> {
        let record = {
            let mut catalogue = self.catalogue.lock();
            if catalogue.remote(key) == Remote::Yes || catalogue.has_expired(key) {
                return None;
            }
            let record = catalogue.on_disk(key)?;
            catalogue.set_remote(key, Remote::Unsure);
            record
        };
        // It may just have been evicted.
        Some((record, self.disk.open_object(key).ok()?))
    }

    fn is_wanted(&self, key: &ChunkKey, record: &Record) -> bool {
        let catalogue = self.catalogue.lock();
        !catalogue.has_expired(key) && catalogue.on_disk(key).is_some_and(|it| it.hash == record.hash)
    }

    /// An object is in the bucket. Deleted meanwhile, it has no record, and its deletion waits to remove it; evicted
    /// meanwhile, it is in the bucket alone.
    fn uploaded(&self, key: &ChunkKey, record: &Record) {
        let came = {
            let mut catalogue = self.catalogue.lock();
            if catalogue.known_as(key) != Some(record.hash) {
                return;
            }
            let came = catalogue.on_disk(key).is_none();
            catalogue.set_remote(key, Remote::Yes);
            came
        };
        if came {
            self.announce.tell(*key, true);
        }
        self.gauge();
    }
}
