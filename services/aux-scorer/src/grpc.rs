//! The `Scorer` service: digests in, byte spans out; text only where it is not known yet.

use crate::auxiliary::{Auxiliary, Error, Mode};
use crate::gather::{Asked, Chunks, asked};
use crate::metrics;
use crate::ram::Ram;
use crate::stores::Stores;
use cacheclip_chunk::DocumentId;
use cacheclip_rpc::convert;
use cacheclip_rpc::status::{exhausted, invalid, unavailable};
use cacheclip_rpc::v1;
use cacheclip_service::lifetime::Lifetime;
use cacheclip_service::request_id;
use cacheclip_service::residency::{Announcer, Load};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

/// Hint to callers that met a full queue.
const RETRY: Duration = Duration::from_millis(200);

/// The gRPC service. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Service(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    chunks: Chunks,
    turns: Arc<Semaphore>,
    concurrency: u32,
    waiting: AtomicUsize,
    queue: usize,
    announcer: Announcer,
}

impl Service {
    pub(crate) fn new(
        auxiliary: Auxiliary,
        stores: Option<Stores>,
        options: &crate::Options,
        announcer: Announcer,
    ) -> Self {
        let ram = Ram::new(options.cache_bytes, Lifetime::seconds(options.cache_seconds));
        Self(Arc::new(Shared {
            chunks: Chunks::new(auxiliary, ram, stores),
            turns: Arc::new(Semaphore::new(options.concurrency.max(1))),
            concurrency: options.concurrency.max(1) as u32,
            waiting: AtomicUsize::new(0),
            queue: options.queue,
            announcer,
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
        let v1::ScoreRequest { prefix, chunks, question, .. } = request;
        let asked = asked(chunks)?;
        let waiting = self.0.enter()?;
        let mut gathered = self.0.chunks.find(&asked).await;
        let need_text = gathered.need_text(&asked);
        if !need_text.is_empty() {
            return Ok(Response::new(v1::ScoreResponse { need_text, ..Default::default() }));
        }
        let work = move |shared: &Shared| {
            let chunks = shared.chunks.complete(&asked, &mut gathered).map_err(to_status)?;
            let gathered_after = began.elapsed().as_secs_f64();
            let scored = shared.chunks.auxiliary.score(prefix.as_deref(), &chunks, &question, mode);
            let sets = scored.map_err(to_status)?.into_iter().enumerate().map(|(chunk, spans)| {
                let spans = spans.into_iter();
                let spans =
                    spans.map(|s| v1::ScoredSpan { start: s.span.start, end: s.span.end, score: s.score });
                v1::ImportanceSet { chunk: chunk as u32, spans: spans.collect() }
            });
            let sets = sets.collect();
            let total = began.elapsed().as_secs_f64();
            metrics::scored(total);
            let stage = |name: &str, seconds| v1::Stage { name: name.to_owned(), seconds };
            let stages = vec![stage("aux_kv", gathered_after), stage("aux_question", total - gathered_after)];
            Ok(v1::ScoreResponse { sets, need_text: Vec::new(), stages, cold: gathered.cold })
        };
        Ok(Response::new(self.0.run(waiting, work).await?))
    }

    async fn prepare(
        &self,
        request: Request<v1::PrepareRequest>,
    ) -> Result<Response<v1::PrepareResponse>, Status> {
        let v1::PrepareRequest { chunks, hold } = request.into_inner();
        if let Some(hold) = &hold {
            convert::id::<DocumentId>("hold.document", &hold.document)?;
        }
        let asked = asked(chunks)?;
        let waiting = self.0.enter()?;
        let mut work = self.0.chunks.plan(asked).await;
        let compute = std::mem::take(&mut work.compute);
        let mut made = Vec::new();
        if compute.is_empty() {
            drop(waiting);
        } else {
            let began = work.began.clone();
            let all = move |shared: &Shared| {
                let one = |it: &Asked| Ok((it.digest, shared.chunks.compute(it, &began).map_err(to_status)?));
                compute.iter().map(one).collect::<Result<Vec<_>, Status>>()
            };
            made = self.0.run(waiting, all).await?;
        }
        let computed = made.len() as u32;
        let (cached, need_text) = (work.cached as u32, std::mem::take(&mut work.need_text));
        // Ingest promises that what it reports is stored; nobody waits for an answer meanwhile.
        work.store(made, hold.as_ref()).await.map_err(|error| {
            unavailable(format_args!(
                "the stores cannot record the document's claim on its chunks: {error}; send it again"
            ))
        })?;
        Ok(Response::new(v1::PrepareResponse { computed, cached, need_text }))
    }

    async fn delete_document(
        &self,
        request: Request<v1::DeleteDocumentRequest>,
    ) -> Result<Response<v1::HolderDeletion>, Status> {
        let document = convert::id("document", &request.into_inner().document)?;
        // Whoever asked may go away: what the stores have deleted must be forgotten here all the same.
        let shared = Arc::clone(&self.0);
        let deleting = request_id::spawn(async move { shared.chunks.delete_document(&document).await });
        let deletion =
            deleting.await.map_err(|error| Status::internal(format!("deleting failed: {error}")))?;
        Ok(Response::new(deletion))
    }

    type WatchStream = ReceiverStream<Result<v1::Residency, Status>>;

    async fn watch(&self, _: Request<v1::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let shared = Arc::clone(&self.0);
        let load = move || Load {
            held: shared.chunks.held(),
            waiting: u32::try_from(shared.waiting.load(Ordering::Relaxed)).unwrap_or(u32::MAX),
            running: shared.concurrency.saturating_sub(shared.turns.available_permits() as u32),
        };
        Ok(Response::new(self.0.announcer.stream(load)))
    }
}

impl Shared {
    /// A place among those that wait: for the stores, then for their turn.
    fn enter(&self) -> Result<Waiting<'_>, Status> {
        let waiting = Waiting { counter: &self.waiting };
        if self.waiting.fetch_add(1, Ordering::Relaxed) + 1 > self.queue {
            return Err(exhausted("the scorer's queue", RETRY));
        }
        Ok(waiting)
    }

    /// Runs `work` off the async threads when it is this request's turn.
    async fn run<T: Send + 'static>(
        self: &Arc<Self>,
        waiting: Waiting<'_>,
        work: impl FnOnce(&Self) -> Result<T, Status> + Send + 'static,
    ) -> Result<T, Status> {
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
}

/// Counts a waiting request until it is dropped.
struct Waiting<'a> {
    counter: &'a AtomicUsize,
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
