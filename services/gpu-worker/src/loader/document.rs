//! Documents: their chunks computed and stored ahead of need under the document's claim, and their deletion.

use super::{Loader, Wanted};
use crate::engine::{Error, Tenant};
use cacheclip_chunk::{ChunkKey, DocumentId};
use cacheclip_client::{Located, StoreClient, Terms};
use cacheclip_rpc::v1::{Hold, HolderDeletion, MissReason};

impl Loader {
    /// Makes sure the sections are stored, and are the document's that `hold` names; true for those that had to be
    /// computed. Ends when the stores have acknowledged them (or refused: a full store is no error).
    ///
    /// # Errors
    /// As [`open`](Self::open); a claim that no store has recorded, for a document must not be thought deletable that
    /// is not.
    pub(crate) async fn precompute(&self, wanted: &[Wanted], hold: Option<Hold>) -> Result<Vec<bool>, Error> {
        let (began, stores) = self.begin();
        let keys: Vec<ChunkKey> = wanted.iter().map(|want| want.key).collect();
        let stored = match &stores {
            Some(stores) => {
                let located = stores.lookup(self.layout.id, &keys).await;
                // Stores that cannot be asked must not make ingest compute again what RAM holds.
                let kept = |(entry, key): (&Located, &ChunkKey)| match entry {
                    Located::Found { .. } => true,
                    Located::Missing(MissReason::Unavailable | MissReason::Timeout) => {
                        self.ram.get(key).is_some()
                    }
                    Located::Missing(_) => false,
                };
                located.iter().zip(&keys).map(kept).collect()
            }
            None => keys.iter().map(|key| self.ram.get(key).is_some()).collect::<Vec<_>>(),
        };
        // What a put brings is claimed with it; the rest is claimed before it can be thought nobody's.
        let there = keys.iter().zip(&stored).filter(|(_, stored)| **stored).map(|(key, _)| *key).collect();
        self.claim(stores.as_ref(), there, hold.as_ref()).await?;
        let terms = Terms { hold: hold.clone(), since: began.since.clone() };
        let (mut computed, mut unstored) = (Vec::with_capacity(wanted.len()), Vec::new());
        for (index, (want, stored)) in wanted.iter().zip(stored).enumerate() {
            let earlier = keys[..index].contains(&want.key);
            computed.push(!stored && !earlier);
            if stored || earlier {
                continue;
            }
            let canonical = self.canonical(want, &Tenant::default(), self.owe(want), began.mark).await?;
            let Some(writer) = &self.writer else { continue };
            let written = writer.write(want.key, terms.clone(), want.spans.clone(), canonical).await;
            // It is in this RAM, and may be stored by whoever needs it next.
            unstored.extend(written.is_unclaimed().then_some(want.key));
        }
        self.claim(stores.as_ref(), unstored, hold.as_ref()).await?;
        Ok(computed)
    }

    /// Has the stores record a document's claim on chunks that no put brings them.
    async fn claim(
        &self,
        stores: Option<&StoreClient>,
        keys: Vec<ChunkKey>,
        hold: Option<&Hold>,
    ) -> Result<(), Error> {
        let Some((stores, hold)) = stores.zip(hold) else { return Ok(()) };
        stores.hold(self.layout.id, &keys, hold).await.map_err(|error| Error::Unclaimed(error.to_string()))
    }

    /// Has the stores delete a document and forgets what went. Without stores nobody knows which chunks are the
    /// document's: all of them go.
    pub(crate) async fn delete_document(&self, document: &DocumentId) -> HolderDeletion {
        let Some(stores) = &self.stores else {
            return HolderDeletion { tiers: vec![self.ram.clear()], ..HolderDeletion::default() };
        };
        let deleted = stores.delete_document(document).await;
        let forgotten = self.ram.forget(&deleted.keys);
        tracing::info!(
            %document,
            generation = deleted.generation,
            chunks = deleted.keys.len(),
            pending = ?deleted.pending,
            "a document was deleted"
        );
        deleted.with(&forgotten)
    }
}
