//! The `Scorer` service: digests in, byte spans out; text only where it is not known yet.

use crate::auxiliary::{Auxiliary, Chunk, Error, Mode};
use crate::metrics;
use cacheclip_rpc::status::{exhausted, invalid, unavailable};
use cacheclip_rpc::v1;
use quick_cache::Weighter;
use quick_cache::sync::Cache;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;
use tonic::{Request, Response, Status};

type Digest = [u8; 32];

/// Hint to callers that met a full queue.
const RETRY: Duration = Duration::from_millis(200);

#[derive(Clone, Debug)]
pub(crate) struct ByBytes;

impl Weighter<Digest, Chunk> for ByBytes {
    fn weight(&self, _: &Digest, chunk: &Chunk) -> u64 {
        (chunk.kv.bytes() + chunk.spans.len() * 12 + 128) as u64
    }
}

/// The gRPC service. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Service(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    auxiliary: Arc<Auxiliary>,
    cache: Cache<Digest, Chunk, ByBytes>,
    turns: Arc<Semaphore>,
    waiting: AtomicUsize,
    queue: usize,
}

/// Chunks of a request in order, and the indices whose text is needed.
struct Resolved {
    chunks: Vec<Chunk>,
    need_text: Vec<u32>,
    computed: usize,
}

impl Service {
    pub(crate) fn new(auxiliary: Auxiliary, options: &crate::Options) -> Self {
        let chunks = usize::try_from(options.cache_bytes >> 18).unwrap_or(usize::MAX).clamp(64, 1 << 20);
        Self(Arc::new(Shared {
            auxiliary: Arc::new(auxiliary),
            cache: Cache::with_weighter(chunks, options.cache_bytes, ByBytes),
            turns: Arc::new(Semaphore::new(options.concurrency.max(1))),
            waiting: AtomicUsize::new(0),
            queue: options.queue,
        }))
    }
}

#[tonic::async_trait]
impl v1::scorer_server::Scorer for Service {
    async fn score(&self, request: Request<v1::ScoreRequest>) -> Result<Response<v1::ScoreResponse>, Status> {
        let began = Instant::now();
        let request = request.into_inner();
        if request.question.is_empty() {
            return Err(invalid("question", "must not be empty"));
        }
        let mode = match request.mode() {
            v1::ScoreMode::Unspecified | v1::ScoreMode::Joint => Mode::Joint,
            v1::ScoreMode::Paper => Mode::Paper,
        };
        let response = self
            .0
            .run(move |shared| {
                let resolved = shared.resolve(&request.chunks)?;
                if !resolved.need_text.is_empty() {
                    return Ok(v1::ScoreResponse { need_text: resolved.need_text, ..Default::default() });
                }
                let looked_up = began.elapsed().as_secs_f64();
                let scored = shared
                    .auxiliary
                    .score(request.prefix.as_deref(), &resolved.chunks, &request.question, mode)
                    .map_err(to_status)?;
                let sets = scored.into_iter().enumerate().map(|(chunk, spans)| v1::ImportanceSet {
                    chunk: chunk as u32,
                    spans: spans
                        .into_iter()
                        .map(|s| v1::ScoredSpan { start: s.span.start, end: s.span.end, score: s.score })
                        .collect(),
                });
                let total = began.elapsed().as_secs_f64();
                metrics::scored(total);
                let stage = |name: &str, seconds| v1::Stage { name: name.to_owned(), seconds };
                let stages = vec![stage("aux_kv", looked_up), stage("aux_question", total - looked_up)];
                Ok(v1::ScoreResponse { sets: sets.collect(), need_text: Vec::new(), stages })
            })
            .await?;
        Ok(Response::new(response))
    }

    async fn prepare(
        &self,
        request: Request<v1::PrepareRequest>,
    ) -> Result<Response<v1::PrepareResponse>, Status> {
        let request = request.into_inner();
        let response = self
            .0
            .run(move |shared| {
                let resolved = shared.resolve(&request.chunks)?;
                Ok(v1::PrepareResponse {
                    computed: resolved.computed as u32,
                    cached: (resolved.chunks.len() - resolved.computed) as u32,
                    need_text: resolved.need_text,
                })
            })
            .await?;
        Ok(Response::new(response))
    }
}

impl Shared {
    /// Runs `work` off the async threads when it is this request's turn.
    async fn run<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Self) -> Result<T, Status> + Send + 'static,
    ) -> Result<T, Status> {
        let waiting = Waiting::enter(&self.waiting);
        if waiting.count > self.queue {
            return Err(exhausted("the scorer's queue", RETRY));
        }
        let turn = Arc::clone(&self.turns).acquire_owned().await.map_err(unavailable)?;
        drop(waiting);
        let shared = Arc::clone(self);
        let span = tracing::Span::current();
        let task = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            span.in_scope(|| work(&shared))
        });
        task.await.map_err(|error| Status::internal(format!("scoring failed: {error}")))?
    }

    /// Auxiliary KV of every chunk, from the cache or from text.
    fn resolve(&self, chunks: &[v1::ScoreChunk]) -> Result<Resolved, Status> {
        let mut resolved = Resolved { chunks: Vec::new(), need_text: Vec::new(), computed: 0 };
        for (index, chunk) in chunks.iter().enumerate() {
            let digest: Digest = chunk
                .digest
                .as_ref()
                .try_into()
                .map_err(|_| invalid(&format!("chunks[{index}].digest"), "must be 32 bytes"))?;
            if let Some(known) = self.cache.get(&digest) {
                resolved.chunks.push(known);
            } else if let Some(text) = &chunk.text {
                let computed = self.auxiliary.chunk(text).map_err(to_status)?;
                self.cache.insert(digest, computed.clone());
                resolved.chunks.push(computed);
                resolved.computed += 1;
            } else {
                resolved.need_text.push(index as u32);
            }
        }
        metrics::chunks("cached", resolved.chunks.len() - resolved.computed);
        metrics::chunks("computed", resolved.computed);
        metrics::chunks("text_needed", resolved.need_text.len());
        metrics::cache(self.cache.weight());
        Ok(resolved)
    }
}

/// Counts a waiting request until it is dropped.
struct Waiting<'a> {
    counter: &'a AtomicUsize,
    count: usize,
}

impl<'a> Waiting<'a> {
    fn enter(counter: &'a AtomicUsize) -> Self {
        Self { counter, count: counter.fetch_add(1, Ordering::Relaxed) + 1 }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.counter.fetch_sub(1, Ordering::Relaxed);
    }
}

fn to_status(error: Error) -> Status {
    match error {
        Error::Invalid { field, why } => invalid(field, why),
        Error::Prompt(error) => invalid("text", error),
        Error::Model(error) => Status::internal(error.to_string()),
    }
}
