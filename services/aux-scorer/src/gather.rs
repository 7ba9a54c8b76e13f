//! Auxiliary KV of a request's chunks: from RAM, from the stores, from text.

use crate::auxiliary::{Auxiliary, Chunk, Error};
use crate::identity::Digest;
use crate::metrics;
use crate::stores::{Lacking, Stores};
use cacheclip_rpc::status::invalid;
use cacheclip_rpc::v1;
use cacheclip_service::residency;
use quick_cache::Weighter;
use quick_cache::sync::Cache;
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

#[derive(Clone, Debug)]
struct ByBytes;

impl Weighter<Digest, Chunk> for ByBytes {
    fn weight(&self, _: &Digest, chunk: &Chunk) -> u64 {
        (chunk.kv.bytes() + chunk.spans.len() * 12 + 128) as u64
    }
}

/// What has been found of a request's chunks, in their order.
#[derive(Debug)]
pub(crate) struct Gathered {
    chunks: Vec<Option<Chunk>>,
    /// Indices of chunks that were not in RAM, ascending.
    pub(crate) cold: Vec<u32>,
}

/// What an ingest has to do for its chunks.
#[derive(Debug, Default)]
pub(crate) struct Work {
    /// Chunks that are there already, wherever.
    pub(crate) cached: usize,
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
    cache: Cache<Digest, Chunk, ByBytes>,
    stores: Option<Stores>,
}

impl Chunks {
    /// Keeps at most `bytes` in RAM.
    pub(crate) fn new(auxiliary: Auxiliary, bytes: u64, stores: Option<Stores>) -> Self {
        // The estimate sizes bookkeeping only: a quarter of a megabyte per chunk.
        let chunks = usize::try_from(bytes >> 18).unwrap_or(usize::MAX).clamp(64, 1 << 20);
        Self { auxiliary, cache: Cache::with_weighter(chunks, bytes, ByBytes), stores }
    }

    /// What RAM holds, in announcements' short form.
    pub(crate) fn held(&self) -> Vec<u64> {
        self.cache.iter().map(|(digest, _)| residency::short(&digest)).collect()
    }

    /// What is in RAM and, of the rest, what the stores have within their time. Chunks that came with their text are
    /// computed instead: they come so because the stores were asked before.
    pub(crate) async fn find(&self, asked: &[Asked]) -> Gathered {
        let mut chunks: Vec<Option<Chunk>> = asked.iter().map(|it| self.cache.get(&it.digest)).collect();
        metrics::chunks("cached", chunks.iter().flatten().count());
        let mut cold = Vec::new();
        if let Some(stores) = &self.stores {
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
                loaded.into_iter().for_each(|(digest, chunk)| self.cache.insert(digest, chunk));
            }
        }
        metrics::chunks("loaded", cold.len());
        metrics::cache(self.cache.weight());
        Gathered { chunks, cold }
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
            let made = self.compute(it)?;
            if let Some(stores) = &self.stores {
                stores.write_behind(it.digest, made.clone());
            }
            computed.insert(it.digest, made.clone());
            *chunk = Some(made);
        }
        gathered.cold.sort_unstable();
        Ok(gathered.chunks.iter_mut().filter_map(Option::take).collect())
    }

    /// Computes a chunk and keeps it in RAM.
    pub(crate) fn compute(&self, asked: &Asked) -> Result<Chunk, Error> {
        let text = asked.text.as_deref().ok_or_else(|| Error::Invalid {
            field: "chunks",
            why: "a chunk has no text; send it where the scorer asks for it".into(),
        })?;
        let chunk = self.auxiliary.chunk(text)?;
        self.cache.insert(asked.digest, chunk.clone());
        metrics::chunks("computed", 1);
        metrics::cache(self.cache.weight());
        Ok(chunk)
    }

    /// What there is to do so that these chunks are kept and stored.
    pub(crate) async fn plan(&self, asked: Vec<Asked>) -> Work {
        let digests: Vec<Digest> = asked.iter().map(|it| it.digest).collect();
        let lacking = match &self.stores {
            Some(stores) => stores.lacking(&digests).await,
            None => vec![Lacking::Unknown; digests.len()],
        };
        let (mut work, mut seen) = (Work::default(), HashSet::new());
        for (index, (it, lacking)) in asked.into_iter().zip(lacking).enumerate() {
            let kept = self.cache.get(&it.digest);
            match (kept, it.text.is_some()) {
                (None, false) if lacking != Lacking::No => work.need_text.push(index as u32),
                (None, true) if lacking != Lacking::No && seen.insert(it.digest) => work.compute.push(it),
                (Some(chunk), _) if lacking == Lacking::Yes && seen.insert(it.digest) => {
                    work.cached += 1;
                    work.restore.push((it.digest, chunk));
                }
                _ => work.cached += 1,
            }
        }
        metrics::chunks("cached", work.cached);
        metrics::chunks("text_needed", work.need_text.len());
        work
    }

    /// Stores chunks; ends when the stores have answered, or do not.
    pub(crate) async fn store(&self, chunks: Vec<(Digest, Chunk)>) {
        if let Some(stores) = &self.stores {
            stores.write(chunks).await;
        }
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
