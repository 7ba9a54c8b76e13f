//! One generation: the worker's stream is opened with the sections, importance sets follow when the scorer has
//! answered, events are relayed as they come.
//!
//! Scoring and the worker's loading run side by side; whichever side fails, the other is dropped.

use crate::metrics;
use crate::request::Generation;
use crate::scorer::{Question, Scored, Scorer};
use crate::sections::Prompt;
use crate::worker::{Worker, within};
use cacheclip_plan::Policy;
use cacheclip_rpc::status::unavailable;
use cacheclip_rpc::v1;
use cacheclip_rpc::v1::worker_request::Request as Part;
use cacheclip_service::request_id;
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Status};

/// Where a generation's events go. Bounded: a slow caller slows its own relay down.
pub(crate) type Events = mpsc::Sender<Result<v1::GenerateEvent, Status>>;

/// The two services that a generation needs.
#[derive(Clone, Debug)]
pub(crate) struct Relay {
    pub(crate) worker: Worker,
    pub(crate) scorer: Scorer,
    /// Longest silence of the worker.
    pub(crate) idle: Duration,
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
                let status = self.worker.explain(failed).await;
                let code = status.code();
                // The caller may be gone by now; then nobody needs the status.
                let _ = events.send(Err(status)).await;
                code
            }
        };
        metrics::request(policy, code);
    }

    async fn generate(
        &self,
        request: Generation,
        prompt: Prompt,
        tokenize: f64,
        events: &Events,
    ) -> Result<(), Status> {
        let received = request.received;
        let reusable = prompt.reusable;
        let (to_worker, requests) = mpsc::channel(2);
        let question = question(request, prompt.chunks);
        // There is room for both messages: this cannot wait, and fails only if the receiver were gone.
        let _ = to_worker.try_send(part(Part::Sections(prompt.sections)));

        let scored = OnceLock::new();
        let feed = async {
            if let Some(question) = question {
                let Scored { importance, stages } = self.scorer.score(question).await;
                // Before the worker can have an answer, so that the answer's record has them.
                let _ = scored.set(stages);
                let _ = to_worker.send(part(Part::Importance(importance))).await;
            }
            // Ends the request stream: nothing more will follow.
            drop(to_worker);
        };
        let relay = self.relay(requests, received, events, |done| {
            let before = v1::Stage { name: "tokenize".into(), seconds: tokenize };
            finish(done, before, scored.get(), reusable)
        });
        tokio::pin!(feed, relay);
        tokio::select! {
            biased;
            finished = &mut relay => finished,
            () = &mut feed => relay.await,
        }
    }

    async fn relay(
        &self,
        requests: mpsc::Receiver<v1::WorkerRequest>,
        received: Instant,
        events: &Events,
        finish: impl FnOnce(v1::WorkerDone) -> v1::Done,
    ) -> Result<(), Status> {
        let mut client = self.worker.client();
        let call = client.generate(request_id::outgoing(Request::new(ReceiverStream::new(requests))));
        let mut stream = within(self.idle, "the worker's answer", call).await?.into_inner();
        let mut first = true;
        loop {
            let message = within(self.idle, "the worker's next event", stream.message()).await?;
            match message.and_then(|message| message.event) {
                Some(v1::worker_event::Event::Token(v1::WorkerToken { text, index })) => {
                    if std::mem::take(&mut first) {
                        metrics::first_token(received.elapsed().as_secs_f64());
                    }
                    send(events, v1::generate_event::Event::Token(v1::Token { text, index })).await;
                }
                Some(v1::worker_event::Event::Done(done)) => {
                    send(events, v1::generate_event::Event::Done(finish(done))).await;
                    return Ok(());
                }
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
