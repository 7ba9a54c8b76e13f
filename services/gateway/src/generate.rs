//! One generation: the worker's stream is opened with the sections, importance sets follow when the scorer has
//! answered, events are relayed as they come.
//!
//! Scoring and the worker's loading run side by side. A worker that fails before its first token is replaced by
//! the next best one, unseen by the caller; after that, its failure is the caller's.

use crate::metrics;
use crate::peers::{Peer, wanted};
use crate::request::Generation;
use crate::scorer::{Question, Scored, Scorers};
use crate::sections::Prompt;
use crate::worker::{Workers, within, worth_another};
use cacheclip_plan::Policy;
use cacheclip_rpc::status::unavailable;
use cacheclip_rpc::v1;
use cacheclip_rpc::v1::worker_request::Request as Part;
use cacheclip_service::request_id;
use futures::FutureExt as _;
use futures::future::{BoxFuture, Shared};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Status};

/// Where a generation's events go. Bounded: a slow caller slows its own relay down.
pub(crate) type Events = mpsc::Sender<Result<v1::GenerateEvent, Status>>;

/// The two services that a generation needs.
#[derive(Clone, Debug)]
pub(crate) struct Relay {
    pub(crate) workers: Workers,
    pub(crate) scorers: Scorers,
    /// Longest silence of the worker.
    pub(crate) idle: Duration,
}

/// Importance sets on their way; every try of a request waits for the same ones.
type Scoring = Shared<BoxFuture<'static, Arc<Scored>>>;

/// How far a request has come.
struct Progress {
    received: Instant,
    /// Whether the caller has seen a token: from then on no other worker can take over.
    answered: bool,
}

impl Relay {
    /// Runs one generation to its end, or until the caller goes away.
    pub(crate) async fn run(&self, request: Generation, prompt: Prompt, tokenize: f64, events: Events) {
        let policy = request.policy.name();
        let finished = tokio::select! {
            finished = self.generate(request, prompt, tokenize, &events) => Some(finished),
            // Dropping the other branch drops the worker's stream, and the worker stops computing.
            () = events.closed() => None,
        };
        let code = match finished {
            None => tonic::Code::Cancelled,
            Some(Ok(())) => tonic::Code::Ok,
            Some(Err(failed)) => {
                let status = self.workers.explain(failed).await;
                let code = status.code();
                // The caller may be gone by now; then nobody needs the status.
                let _ = events.send(Err(status)).await;
                code
            }
        };
        metrics::request(policy, code);
    }

    /// Tries workers, best first, until one has answered something. Importance sets are asked for once, whatever
    /// becomes of the workers.
    async fn generate(
        &self,
        request: Generation,
        prompt: Prompt,
        tokenize: f64,
        events: &Events,
    ) -> Result<(), Status> {
        let (received, reusable) = (request.received, prompt.reusable);
        let wanted = wanted(prompt.sections.chunks.iter().chain(&prompt.sections.prefix));
        let scored = match question(request, prompt.chunks) {
            Some(question) => {
                let scorer = self.scorers.clone();
                Some(async move { Arc::new(scorer.score(question).await) }.boxed().shared())
            }
            None => None,
        };
        let mut tried = Vec::new();
        let mut last = unavailable("no worker was found; send the request again");
        while let Some(worker) = self.workers.choose(&wanted, &tried) {
            if !tried.is_empty() {
                metrics::restarted();
            }
            let mut progress = Progress { received, answered: false };
            let attempt = self.attempt(&worker, &prompt.sections, scored.clone(), events, &mut progress);
            let failed = match attempt.await {
                Ok(done) => {
                    let before = v1::Stage { name: "tokenize".into(), seconds: tokenize };
                    let stages =
                        scored.as_ref().and_then(|scored| scored.peek()).map(|scored| &scored.stages);
                    let done = finish(done, before, stages, reusable);
                    send(events, v1::generate_event::Event::Done(done)).await;
                    return Ok(());
                }
                Err(failed) => failed,
            };
            if progress.answered || !worth_another(&failed) {
                return Err(failed);
            }
            tried.push(worker.endpoint().to_owned());
            tracing::warn!(worker = worker.endpoint(), status = %failed, "worker failed before its first token");
            last = failed;
        }
        Err(last)
    }

    /// One worker's try.
    async fn attempt(
        &self,
        worker: &Peer,
        sections: &v1::Sections,
        scored: Option<Scoring>,
        events: &Events,
        progress: &mut Progress,
    ) -> Result<v1::WorkerDone, Status> {
        let (to_worker, requests) = mpsc::channel(2);
        // There is room for both messages: this cannot wait, and fails only if the receiver were gone.
        let _ = to_worker.try_send(part(Part::Sections(sections.clone())));
        let feed = async {
            if let Some(scored) = scored {
                // Before the worker can have an answer, so that the answer's record has the stages.
                let importance = scored.await.importance.clone();
                let _ = to_worker.send(part(Part::Importance(importance))).await;
            }
            // Ends the request stream: nothing more will follow.
            drop(to_worker);
        };
        let relay = self.relay(worker, requests, events, progress);
        let work = async {
            tokio::pin!(feed, relay);
            tokio::select! {
                biased;
                finished = &mut relay => finished,
                () = &mut feed => relay.await,
            }
        };
        tokio::select! {
            biased;
            finished = work => finished,
            () = worker.lost() => Err(unavailable(format_args!(
                "the worker {} fell silent; send the request again",
                worker.endpoint()
            ))),
        }
    }

    async fn relay(
        &self,
        worker: &Peer,
        requests: mpsc::Receiver<v1::WorkerRequest>,
        events: &Events,
        progress: &mut Progress,
    ) -> Result<v1::WorkerDone, Status> {
        let mut client = self.workers.client(worker);
        let call = client.generate(request_id::outgoing(Request::new(ReceiverStream::new(requests))));
        let mut stream = within(self.idle, "the worker's answer", call).await?.into_inner();
        loop {
            let message = within(self.idle, "the worker's next event", stream.message()).await?;
            match message.and_then(|message| message.event) {
                Some(v1::worker_event::Event::Token(v1::WorkerToken { text, index })) => {
                    if !std::mem::replace(&mut progress.answered, true) {
                        metrics::first_token(progress.received.elapsed().as_secs_f64());
                    }
                    send(events, v1::generate_event::Event::Token(v1::Token { text, index })).await;
                }
                Some(v1::worker_event::Event::Done(done)) => return Ok(done),
                None => {
                    return Err(unavailable(
                        "the worker ended its stream without a result; send the request again",
                    ));
                }
            }
        }
    }
}

/// A caller that is gone is noticed by [`Relay::run`], which drops everything.
pub(crate) async fn send(events: &Events, event: v1::generate_event::Event) {
    let _ = events.send(Ok(v1::GenerateEvent { event: Some(event) })).await;
}

fn part(request: Part) -> v1::WorkerRequest {
    v1::WorkerRequest { request: Some(request) }
}

/// What the scorer is asked, for policies that select by scores and prompts with something to select from.
fn question(request: Generation, chunks: Vec<crate::scorer::Asked>) -> Option<Question> {
    let mode = match request.policy {
        Policy::CacheClip(_) => v1::ScoreMode::Joint,
        Policy::Paper => v1::ScoreMode::Paper,
        Policy::Stale | Policy::Full => return None,
    };
    if chunks.is_empty() {
        return None;
    }
    Some(Question { prefix: request.prefix, chunks, question: request.question, mode })
}

/// The worker's result with the gateway's stages before its own.
fn finish(
    done: v1::WorkerDone,
    tokenize: v1::Stage,
    scored: Option<&Vec<v1::Stage>>,
    reusable: u32,
) -> v1::Done {
    let usage = done.usage.unwrap_or_default();
    metrics::usage(&usage, reusable);
    let mut explain = done.explain.unwrap_or_default();
    let mut stages = vec![tokenize];
    stages.extend(scored.into_iter().flatten().cloned());
    stages.append(&mut explain.stages);
    explain.stages = stages;
    v1::Done {
        text: done.text,
        finish_reason: done.finish_reason,
        usage: Some(usage),
        explain: Some(explain),
    }
}
