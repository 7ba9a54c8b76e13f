//! The `Worker` service: loads beside scoring, plans, hands over to the engine, streams what comes out.

use crate::engine::{self, Engine, Event, Generation, Outcome, Owed, Placed, Tenant};
use crate::layout::{Anchor, Layout};
use crate::loader::{self, Found, Loader, Opened};
use crate::metrics;
use crate::ram::{Mark, Ram, Set};
use crate::report;
use crate::request::{self, Limits, Request};
use cacheclip_chunk::{ChunkKey, DocumentId};
use cacheclip_plan::{Policy, Rung, choose_rung};
use cacheclip_rpc::convert;
use cacheclip_rpc::status::{exhausted, invalid, unavailable};
use cacheclip_rpc::v1;
use cacheclip_rpc::v1::worker_request::Request as Part;
use cacheclip_service::request_id;
use cacheclip_service::residency::{Announcer, Load};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

/// Longest wait for the first message of a stream.
const FIRST_MESSAGE: Duration = Duration::from_secs(10);
/// Hint to callers that met a full queue.
const RETRY: Duration = Duration::from_millis(500);

/// Everything the service needs; one per process.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) engine: Engine,
    pub(crate) loader: Loader,
    pub(crate) ram: Ram,
    pub(crate) layout: Arc<Layout>,
    pub(crate) anchor: Anchor,
    pub(crate) limits: Limits,
    pub(crate) model: String,
    pub(crate) tokenizer_digest: [u8; 32],
    pub(crate) eos: Vec<u32>,
    pub(crate) importance_timeout: Duration,
    pub(crate) fuse_rank: bool,
    pub(crate) probe: bool,
    pub(crate) pipeline: bool,
    pub(crate) announcer: Announcer,
}

/// The gRPC service. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Service(pub(crate) Arc<Shared>);

#[tonic::async_trait]
impl v1::worker_server::Worker for Service {
    type GenerateStream = ReceiverStream<Result<v1::WorkerEvent, Status>>;

    async fn generate(
        &self,
        request: tonic::Request<Streaming<v1::WorkerRequest>>,
    ) -> Result<tonic::Response<Self::GenerateStream>, Status> {
        let received = Instant::now();
        let mut inbound = request.into_inner();
        let first = tokio::time::timeout(FIRST_MESSAGE, inbound.message())
            .await
            .map_err(|_| Status::deadline_exceeded("no sections arrived"))??;
        let Some(Part::Sections(sections)) = first.and_then(|message| message.request) else {
            return Err(invalid("request", "the first message must carry the sections"));
        };
        let shared = &self.0;
        let request = Request::parse(sections, &shared.layout, &shared.anchor, &shared.limits)?;
        // Room for every event the engine can send, so that relaying never waits on a slow caller for long.
        let (events, stream) = mpsc::channel(request.max_tokens + 2);
        let shared = Arc::clone(shared);
        let work = async move {
            let answered = tokio::select! {
                // Who hangs up waits for nothing any more: what was on its way is let go of.
                () = events.closed() => return,
                answered = shared.answer(request, inbound, received, &events) => answered,
            };
            if let Err(status) = answered {
                // The caller may be gone; then nobody needs the status.
                let _ = events.send(Err(status)).await;
            }
        };
        request_id::spawn(work);
        Ok(tonic::Response::new(ReceiverStream::new(stream)))
    }

    async fn precompute(
        &self,
        request: tonic::Request<v1::PrecomputeRequest>,
    ) -> Result<tonic::Response<v1::PrecomputeResponse>, Status> {
        let Shared { layout, anchor, limits, .. } = &*self.0;
        let mut request = request.into_inner();
        let hold = request.hold.take();
        if let Some(hold) = &hold {
            convert::id::<DocumentId>("hold.document", &hold.document)?;
        }
        let wanted = request::chunks(request, layout, anchor, limits)?;
        let computed = self.0.loader.precompute(&wanted, hold).await.map_err(to_status)?;
        Ok(tonic::Response::new(v1::PrecomputeResponse { computed }))
    }

    async fn describe(
        &self,
        _: tonic::Request<v1::DescribeRequest>,
    ) -> Result<tonic::Response<v1::DescribeResponse>, Status> {
        let shared = &self.0;
        Ok(tonic::Response::new(v1::DescribeResponse {
            model: shared.model.clone(),
            layout: Some(shared.layout.to_proto()),
            tokenizer: convert::id_bytes(&shared.tokenizer_digest),
            anchor: shared.anchor.ids.to_vec(),
            max_tokens: shared.limits.max_tokens as u32,
            policies: Policy::NAMES.map(str::to_owned).to_vec(),
        }))
    }

    async fn delete_document(
        &self,
        request: tonic::Request<v1::DeleteDocumentRequest>,
    ) -> Result<tonic::Response<v1::HolderDeletion>, Status> {
        let document = convert::id("document", &request.into_inner().document)?;
        // Whoever asked may go away: what the stores have deleted must be forgotten here all the same.
        let loader = self.0.loader.clone();
        let deleting = request_id::spawn(async move { loader.delete_document(&document).await });
        let deletion =
            deleting.await.map_err(|error| Status::internal(format!("deleting failed: {error}")))?;
        Ok(tonic::Response::new(deletion))
    }

    type WatchStream = ReceiverStream<Result<v1::Residency, Status>>;

    async fn watch(
        &self,
        _: tonic::Request<v1::WatchRequest>,
    ) -> Result<tonic::Response<Self::WatchStream>, Status> {
        let shared = Arc::clone(&self.0);
        let load = move || {
            let (waiting, running) = shared.engine.load();
            Load { held: shared.loader.held(), waiting, running }
        };
        Ok(tonic::Response::new(self.0.announcer.stream(load)))
    }
}

/// Scores as they arrived, or why there are none.
struct Arrived {
    set: Option<Set>,
    unavailable: String,
    seconds: f64,
}

impl Shared {
    async fn answer(
        &self,
        request: Request,
        inbound: Streaming<v1::WorkerRequest>,
        received: Instant,
        events: &mpsc::Sender<Result<v1::WorkerEvent, Status>>,
    ) -> Result<(), Status> {
        let full = request.policy == Policy::Full;
        let mark = self.ram.mark();
        let load = async {
            let opened = match full {
                true => Ok((Opened::default(), self.engine.owe(request.rows()))),
                false => self.load(&request).await,
            };
            (opened, received.elapsed().as_secs_f64())
        };
        // Loading and scoring run side by side; the slower of the two is what the request waits for.
        let ((opened, load_seconds), arrived) =
            tokio::join!(load, self.importance(&request, inbound, received));
        let (mut opened, owed) = opened.map_err(to_status)?;
        let (rung, set) = self.rung(&request, &opened.found, &arrived, mark)?;
        let generation = self.generation(&request, &mut opened.found, rung, set, received);
        let mut outcomes = self.engine.generate(generation, owed).map_err(to_status)?;
        // The engine takes layers as they come. What cannot be had at all ends the request.
        let mut relay = std::pin::pin!(async {
            let mut index = 0;
            while let Some(event) = outcomes.recv().await {
                let text = match event {
                    Event::Text(text) => text,
                    Event::Done(outcome) => return Ok(Some(outcome)),
                    Event::Failed(error) => return Err(to_status(error)),
                };
                let token = v1::WorkerToken { text, index };
                index += 1;
                let token = v1::WorkerEvent { event: Some(v1::worker_event::Event::Token(token)) };
                if events.send(Ok(token)).await.is_err() {
                    // Dropping `outcomes` tells the engine to stop.
                    return Ok(None);
                }
            }
            Ok(None)
        });
        let outcome = {
            let mut complete = std::pin::pin!(opened.complete());
            tokio::select! {
                biased;
                outcome = &mut relay => match outcome? {
                    // Of what the engine used, the last may have to be put away yet.
                    Some(outcome) => complete.await.map(|()| outcome).map_err(to_status)?,
                    None => return Ok(()),
                },
                came = &mut complete => {
                    came.map_err(to_status)?;
                    match relay.await? {
                        Some(outcome) => outcome,
                        None => return Ok(()),
                    }
                }
            }
        };
        loader::count(&request.wanted, &opened.found);
        let stages = [("load", load_seconds), ("importance", arrived.seconds)];
        let done = v1::worker_event::Event::Done(self.done(&request, &opened.found, rung, *outcome, &stages));
        // The caller may be gone.
        let _ = events.send(Ok(v1::WorkerEvent { event: Some(done) })).await;
        Ok(())
    }

    /// Finds or computes all sections, or begins to load them; what the engine owes for the request from then on.
    async fn load(&self, request: &Request) -> Result<(Opened, Owed), engine::Error> {
        let (mut opened, owed) = self.loader.open(&request.wanted, &request.tenant, request.rows()).await?;
        if !self.pipeline {
            opened.come().await?;
        }
        Ok((opened, owed))
    }

    /// Waits for the second message, if the policy has a use for it.
    async fn importance(
        &self,
        request: &Request,
        mut inbound: Streaming<v1::WorkerRequest>,
        received: Instant,
    ) -> Arrived {
        let mut arrived = Arrived { set: None, unavailable: String::new(), seconds: 0.0 };
        if !request.policy.needs_scores() || request.assembly.candidate_rows() == 0 {
            return arrived;
        }
        let message = tokio::time::timeout(self.importance_timeout, inbound.next()).await;
        arrived.seconds = received.elapsed().as_secs_f64();
        match message {
            Ok(Some(Ok(v1::WorkerRequest { request: Some(Part::Importance(importance)) }))) => {
                arrived.unavailable = importance.unavailable;
                if arrived.unavailable.is_empty() {
                    arrived.set = Some(Arc::new(request::scored(importance.sets, request.assembly.chunks())));
                }
            }
            Ok(Some(Ok(_))) => arrived.unavailable = "the second message carried no importance sets".into(),
            Ok(Some(Err(status))) => arrived.unavailable = status.message().to_owned(),
            Ok(None) => arrived.unavailable = "the request stream ended without importance sets".into(),
            Err(_) => arrived.unavailable = "importance sets did not arrive in time".into(),
        }
        arrived
    }

    /// The best rung for what has arrived, with the set to use on it.
    fn rung(
        &self,
        request: &Request,
        found: &[Found],
        arrived: &Arrived,
        mark: Mark,
    ) -> Result<(Rung, Option<Set>), Status> {
        if !request.policy.needs_scores() || request.assembly.candidate_rows() == 0 {
            return Ok((Rung::None, None));
        }
        let key = request.set_key();
        let cached = if arrived.set.is_none() { self.ram.set(&key) } else { None };
        let ranked = found.iter().skip(1).all(|found| found.rank.is_some());
        let rung = choose_rung(&request.policy, arrived.set.is_some(), cached.is_some(), ranked);
        if let Some(set) = &arrived.set {
            let chunks = request.wanted.iter().map(|want| want.key).collect();
            self.ram.keep_set(key, chunks, Arc::clone(set), mark);
        } else {
            tracing::warn!(%rung, reason = arrived.unavailable, "no importance sets");
            if request.strict {
                return Err(unavailable(format!(
                    "strict: importance sets are missing: {}",
                    arrived.unavailable
                )));
            }
        }
        Ok((rung, arrived.set.clone().or(cached)))
    }

    fn generation(
        &self,
        request: &Request,
        found: &mut [Found],
        rung: Rung,
        set: Option<Set>,
        received: Instant,
    ) -> Generation {
        let placed = placed(request, found);
        let ranks: Option<Vec<f32>> = found
            .iter()
            .skip(1)
            .map(|found| found.rank.as_ref().map(|rank| rank.iter().map(|r| f32::from(*r) + 1.0)))
            .collect::<Option<Vec<_>>>()
            .map(|ranks| ranks.into_iter().flatten().collect());
        let generation = Generation {
            ids: request.ids(),
            assembly: request.assembly.clone(),
            tenant: Tenant::clone(&request.tenant),
            placed,
            policy: request.policy,
            ratio: request.ratio,
            scored: set,
            spans: request.spans(),
            rank: ranks,
            fuse_rank: self.fuse_rank,
            probe: self.probe && rung == Rung::Scorer && matches!(request.policy, Policy::CacheClip(_)),
            rung,
            sampling: request.sampling,
            max_tokens: request.max_tokens,
            stop: request.stop.clone(),
            eos: self.eos.clone(),
            received,
            queued: Instant::now(),
        };
        if generation.in_context() {
            // Nobody will take it.
            generation.placed.iter().for_each(|placed| placed.kv.discard());
        }
        generation
    }

    fn done(
        &self,
        request: &Request,
        found: &[Found],
        rung: Rung,
        outcome: Outcome,
        before: &[(&'static str, f64)],
    ) -> v1::WorkerDone {
        metrics::request(request.policy.name(), rung.to_string());
        metrics::first_token(outcome.ttft.as_secs_f64());
        metrics::realised(outcome.selection.realised);
        let stages: Vec<(&'static str, f64)> = before.iter().chain(&outcome.stages).copied().collect();
        stages.iter().for_each(|(name, seconds)| metrics::stage(name, *seconds));
        if request.policy != Policy::Full {
            let reason = if rung == Rung::FullPrefill { "fallback" } else { "selected" };
            metrics::recomputed(reason, outcome.selection.rows.len());
        }
        report::done(request, found, rung, outcome, &stages)
    }
}

/// Each section once, with all its places; whoever places it has it from here on.
fn placed(request: &Request, found: &mut [Found]) -> Vec<Placed> {
    let (mut placed, mut start) = (Vec::<Placed>::new(), 0);
    let mut known = HashMap::<ChunkKey, usize>::new();
    for (want, found) in request.wanted.iter().zip(found) {
        let kv = found.kv.take();
        match known.get(&want.key) {
            Some(&at) => placed[at].starts.push(start),
            None => {
                known.insert(want.key, placed.len());
                placed.extend(kv.map(|kv| Placed { starts: vec![start], kv }));
            }
        }
        start += want.ids.len();
    }
    placed
}

fn to_status(error: engine::Error) -> Status {
    match error {
        engine::Error::Busy => exhausted("the worker's queue", RETRY),
        engine::Error::TooLarge { .. } => Status::resource_exhausted(error.to_string()),
        engine::Error::Stopped | engine::Error::Unclaimed(_) => unavailable(error),
        engine::Error::Plan(error) => invalid("policy", error),
        engine::Error::Model(cacheclip_model::Error::OutOfPages { .. }) => exhausted("KV pages", RETRY),
        engine::Error::Model(error) => Status::internal(error.to_string()),
    }
}
