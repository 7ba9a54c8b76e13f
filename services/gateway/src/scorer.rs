//! Importance sets from the scorer, or the reason why there are none. Never an error: a request goes on
//! without scores, one rung down.

use crate::metrics;
use crate::worker::{passed_on, within};
use cacheclip_rpc::convert::id_bytes;
use cacheclip_rpc::v1::scorer_client::ScorerClient;
use cacheclip_rpc::v1::{
    Importance, PrepareRequest, ScoreChunk, ScoreMode, ScoreRequest, ScoreResponse, Stage,
};
use cacheclip_service::request_id;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

/// A chunk as the scorer is asked about it.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(crate) digest: [u8; 32],
    pub(crate) text: Arc<str>,
}

/// What there is to score.
#[derive(Clone, Debug)]
pub(crate) struct Question {
    pub(crate) prefix: Option<String>,
    pub(crate) chunks: Vec<Asked>,
    pub(crate) question: String,
    pub(crate) mode: ScoreMode,
}

/// What the worker is sent, and what it cost.
#[derive(Debug)]
pub(crate) struct Scored {
    pub(crate) importance: Importance,
    pub(crate) stages: Vec<Stage>,
}

/// Why there are no sets: the metric's label and the sentence for the explain record and the log.
struct Missing {
    label: &'static str,
    why: String,
}

impl From<Status> for Missing {
    fn from(failed: Status) -> Self {
        let failed = passed_on(&failed, "scorer");
        let label = match failed.code() {
            Code::DeadlineExceeded => "timeout",
            Code::Unavailable => "unavailable",
            _ => "refused",
        };
        Self { label, why: format!("{}: {}", cacheclip_service::code_name(failed.code()), failed.message()) }
    }
}

/// The scorer, if one is configured. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Scorer {
    client: Option<ScorerClient<Channel>>,
    timeout: Duration,
}

impl Scorer {
    pub(crate) fn new(channel: Option<Channel>, timeout: Duration, message_bytes: usize) -> Self {
        let client = channel.map(|channel| {
            ScorerClient::new(channel)
                .max_decoding_message_size(message_bytes)
                .max_encoding_message_size(message_bytes)
        });
        Self { client, timeout }
    }

    /// The sets for a question, within the time that scoring may take.
    pub(crate) async fn score(&self, question: Question) -> Scored {
        let began = Instant::now();
        let answer = self.ask(question).await;
        let seconds = began.elapsed().as_secs_f64();
        metrics::stage("score", seconds);
        let mut stages = vec![Stage { name: "score".into(), seconds }];
        let importance = match answer {
            Ok(response) => {
                stages.extend(response.stages);
                Importance { sets: response.sets, unavailable: String::new() }
            }
            Err(Missing { label, why }) => {
                metrics::fallback(label);
                tracing::warn!(reason = label, why, "no importance sets");
                Importance { sets: Vec::new(), unavailable: why }
            }
        };
        Scored { importance, stages }
    }

    async fn ask(&self, question: Question) -> Result<ScoreResponse, Missing> {
        let Some(client) = self.client.clone() else {
            return Err(Missing { label: "not_configured", why: "no scorer is configured".into() });
        };
        Ok(within(self.timeout, "importance sets", ask_twice(client, question)).await??)
    }

    /// Has the scorer compute and keep the auxiliary KV of chunks. Failing costs the first question some time
    /// and nothing else, so it is only counted.
    pub(crate) async fn prepare(&self, chunks: &[Asked], limit: Duration) {
        let Some(mut client) = self.client.clone() else { return };
        let call = async {
            let mut request = PrepareRequest { chunks: digests(chunks) };
            let reply =
                client.prepare(request_id::outgoing(Request::new(request.clone()))).await?.into_inner();
            if reply.need_text.is_empty() {
                return Ok(());
            }
            add_text(&mut request.chunks, chunks, &reply.need_text);
            client.prepare(request_id::outgoing(Request::new(request))).await.map(drop)
        };
        if let Err(failed) = within(limit, "the scorer's preparation", call).await {
            let Missing { label, why } = failed.into();
            metrics::fallback(label);
            tracing::warn!(reason = label, why, "chunks are not prepared for scoring");
        }
    }
}

/// Digests first; once more with the texts that the scorer does not know.
async fn ask_twice(
    mut client: ScorerClient<Channel>,
    question: Question,
) -> Result<Result<ScoreResponse, Missing>, Status> {
    let Question { prefix, chunks, question, mode } = question;
    let mut request = ScoreRequest { prefix, chunks: digests(&chunks), question, mode: mode.into() };
    // No deadline in the metadata: giving up drops the call, which the scorer hears of at once.
    let call = |request: ScoreRequest| request_id::outgoing(Request::new(request));
    let first = client.score(call(request.clone())).await?.into_inner();
    if first.need_text.is_empty() {
        return Ok(Ok(first));
    }
    add_text(&mut request.chunks, &chunks, &first.need_text);
    let second = client.score(call(request)).await?.into_inner();
    if second.need_text.is_empty() {
        return Ok(Ok(second));
    }
    // It forgets faster than it is told: its cache is too small for one request.
    Ok(Err(Missing { label: "text", why: "the scorer asked for text twice; enlarge its cache".into() }))
}

fn digests(chunks: &[Asked]) -> Vec<ScoreChunk> {
    chunks.iter().map(|chunk| ScoreChunk { digest: id_bytes(&chunk.digest), text: None }).collect()
}

fn add_text(request: &mut [ScoreChunk], chunks: &[Asked], needed: &[u32]) {
    for &index in needed {
        let index = index as usize;
        if let (Some(into), Some(chunk)) = (request.get_mut(index), chunks.get(index)) {
            into.text = Some(chunk.text.to_string());
        }
    }
}
