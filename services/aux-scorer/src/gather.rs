//! Auxiliary KV of a request's chunks: from RAM, from the stores, from text.

use crate::auxiliary::{Auxiliary, Chunk, Error};
use crate::identity::Digest;
use crate::metrics;
use crate::ram::{Mark, Ram};
use crate::stores::{Lacking, Stores};
use cacheclip_chunk::{ChunkKey, DocumentId};
use cacheclip_client::Since;
use cacheclip_rpc::status::invalid;
use cacheclip_rpc::v1::{self, Hold, HolderDeletion};
use std::collections::{HashMap, HashSet};
use tonic::Status;

/// A chunk as it is asked about.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(crate) digest: Digest,
    pub(crate) text: Option<String>,
}

/// Chunks of a request, checked by field.
pub(crate) fn asked(chunks: Vec<v1::ScoreChunk>) -> Result<Vec<Asked>, Status> {
    let check = |(index, chunk): (usize, v1::ScoreChunk)| {
        let digest = chunk.digest.as_ref().try_into();
        let digest = digest.map_err(|_| invalid(&format!("chunks[{index}].digest"), "must be 32 bytes"))?;
        Ok(Asked { digest, text: chunk.text })
    };
    chunks.into_iter().enumerate().map(check).collect()
}

/// What has been found of a request's chunks, in their order.
#[derive(Debug)]
pub(crate) struct Gathered {
    chunks: Vec<Option<Chunk>>,
    /// Indices of chunks that were not in RAM, ascending.
    pub(crate) cold: Vec<u32>,
    began: Began,
}

/// What had been deleted when a request began: nothing of it comes back by what the request computes.
#[derive(Clone, Debug)]
pub(crate) struct Began {
    /// From this process's RAM.
    mark: Mark,
    /// From the stores.
    since: Since,
}

/// What an ingest has to do for its chunks.
#[derive(Debug)]
pub(crate) struct Work {
    pub(crate) began: Began,
    /// The stores, for this request.
    stores: Option<Stores>,
    /// Chunks that are there already, wherever.
    pub(crate) cached: usize,
    /// Of these, those that nobody stores again and that have to be claimed.
    claim: Vec<Digest>,
    /// Indices of chunks whose text is needed.
    pub(crate) need_text: Vec<u32>,
    /// Chunks to compute.
    pub(crate) compute: Vec<Asked>,
    /// Chunks that are in RAM and that the stores have lost.
    pub(crate) restore: Vec<(Digest, Chunk)>,
}

/// The tiers of auxiliary KV.
#[derive(Debug)]
pub(crate) struct Chunks {
    pub(crate) auxiliary: Auxiliary,
    ram: Ram,
    stores: Option<Stores>,
}

impl Chunks {
    /// What is in `ram`, else in the stores, else computed.
    pub(crate) fn new(auxiliary: Auxiliary, ram: Ram, stores: Option<Stores>) -> Self {
        Self { auxiliary, ram, stores }
    }

    /// A request begins; the stores for it.
    fn begin(&self) -> (Began, Option<Stores>) {
        let stores = self.stores.as_ref().map(Stores::begin);
        let since = stores.as_ref().map(Stores::since).unwrap_or_default();
        (Began { mark: self.ram.mark(), since }, stores)
    }

    /// What RAM holds, in announcements' short form.
    pub(crate) fn held(&self) -> Vec<u64> {
        self.ram.held()
    }

    /// What is in RAM and, of the rest, what the stores have within their time. Chunks that came with their text are
    /// computed instead: they come so because the stores were asked before.
    pub(crate) async fn find(&self, asked: &[Asked]) -> Gathered {
        let (began, stores) = self.begin();
        let mut chunks: Vec<Option<Chunk>> = asked.iter().map(|it| self.ram.get(&it.digest)).collect();
        metrics::chunks("cached", chunks.iter().flatten().count());
        let mut cold = Vec::new();
        if let Some(stores) = &stores {
            let absent = chunks.iter().zip(asked).filter(|(chunk, it)| chunk.is_none() && it.text.is_none());
            let absent: HashSet<Digest> = absent.map(|(_, it)| it.digest).collect();
            if !absent.is_empty() {
                let loaded = stores.load(&absent.into_iter().collect::<Vec<_>>()).await;
                for (index, (chunk, it)) in chunks.iter_mut().zip(asked).enumerate() {
                    if chunk.is_none()
                        && let Some(found) = loaded.get(&it.digest)
                    {
                        *chunk = Some(found.clone());
                        cold.push(index as u32);
                    }
                }
                loaded.into_iter().for_each(|(digest, chunk)| self.ram.insert(digest, chunk, began.mark));
            }
        }
        metrics::chunks("loaded", cold.len());
        Gathered { chunks, cold, began }
    }

    /// All chunks, in order: what was not found is computed from text and stored behind.
    ///
    /// # Errors
    /// A text that cannot be encoded, or one that is not there.
    pub(crate) fn complete(&self, asked: &[Asked], gathered: &mut Gathered) -> Result<Vec<Chunk>, Error> {
        let mut computed: HashMap<Digest, Chunk> = HashMap::new();
        for (index, (chunk, it)) in gathered.chunks.iter_mut().zip(asked).enumerate() {
            if chunk.is_some() {
                continue;
            }
            gathered.cold.push(index as u32);
            if let Some(known) = computed.get(&it.digest) {
                *chunk = Some(known.clone());
                continue;
            }
            let made = self.compute(it, &gathered.began)?;
            if let Some(stores) = &self.stores {
                stores.write_behind(gathered.began.since.clone(), it.digest, made.clone());
            }
            computed.insert(it.digest, made.clone());
            *chunk = Some(made);
        }
        gathered.cold.sort_unstable();
        Ok(gathered.chunks.iter_mut().filter_map(Option::take).collect())
    }

    /// Computes a chunk and keeps it in RAM.
    pub(crate) fn compute(&self, asked: &Asked, began: &Began) -> Result<Chunk, Error> {
        let text = asked.text.as_deref().ok_or_else(|| Error::Invalid {
            field: "chunks",
            why: "a chunk has no text; send it where the scorer asks for it".into(),
        })?;
        let chunk = self.auxiliary.chunk(text)?;
        self.ram.insert(asked.digest, chunk.clone(), began.mark);
        metrics::chunks("computed", 1);
        Ok(chunk)
    }

    /// What there is to do so that these chunks are kept and stored.
    pub(crate) async fn plan(&self, asked: Vec<Asked>) -> Work {
        let digests: Vec<Digest> = asked.iter().map(|it| it.digest).collect();
        let (began, stores) = self.begin();
        let lacking = match &stores {
            Some(stores) => stores.lacking(&digests).await,
            None => vec![Lacking::Unknown; digests.len()],
        };
        let mut seen = HashSet::new();
        let mut work = Work {
            began,
            stores,
            cached: 0,
            claim: Vec::new(),
            need_text: Vec::new(),
            compute: Vec::new(),
            restore: Vec::new(),
        };
        for (index, (it, lacking)) in asked.into_iter().zip(lacking).enumerate() {
            let kept = self.ram.get(&it.digest);
            match (kept, it.text.is_some()) {
                (None, false) if lacking != Lacking::No => work.need_text.push(index as u32),
                (None, true) if lacking != Lacking::No && seen.insert(it.digest) => work.compute.push(it),
                (Some(chunk), _) if lacking == Lacking::Yes && seen.insert(it.digest) => {
                    work.cached += 1;
                    work.restore.push((it.digest, chunk));
                }
                _ => {
                    work.cached += 1;
                    work.claim.push(it.digest);
                }
            }
        }
        metrics::chunks("cached", work.cached);
        metrics::chunks("text_needed", work.need_text.len());
        work
    }

    /// Has the stores delete a document and forgets what went. Without stores nobody knows which chunks are the
    /// document's: all of them go.
    pub(crate) async fn delete_document(&self, document: &DocumentId) -> HolderDeletion {
        let Some(stores) = &self.stores else {
            return HolderDeletion { tiers: vec![self.ram.forget(|_| true)], ..HolderDeletion::default() };
        };
        let deleted = stores.delete_document(document).await;
        let keys: HashSet<ChunkKey> = deleted.keys.iter().copied().collect();
        let forgotten = self.ram.forget(|digest| stores.names(&keys, digest));
        deleted.with(&forgotten)
    }
}

impl Work {
    /// Stores what was computed and what the stores have lost, and claims all of it for the document that `hold` names;
    /// ends when the stores have answered, or do not.
    ///
    /// # Errors
    /// A claim that no store has recorded: a document must not be thought deletable that is not.
    pub(crate) async fn store(
        mut self,
        made: Vec<(Digest, Chunk)>,
        hold: Option<&Hold>,
    ) -> Result<(), cacheclip_client::Error> {
        let Some(stores) = self.stores.take() else { return Ok(()) };
        let unclaimed = stores.write(made.into_iter().chain(self.restore).collect(), hold).await;
        let Some(hold) = hold else { return Ok(()) };
        self.claim.extend(unclaimed);
        stores.hold(&self.claim, hold).await
    }
}

impl Gathered {
    /// Indices of chunks that are neither found nor came with their text.
    pub(crate) fn need_text(&self, asked: &[Asked]) -> Vec<u32> {
        let absent = self.chunks.iter().zip(asked).enumerate();
        let absent = absent.filter(|(_, (chunk, it))| chunk.is_none() && it.text.is_none());
        let need: Vec<u32> = absent.map(|(index, _)| index as u32).collect();
        metrics::chunks("text_needed", need.len());
        need
    }
}
