//! Importance sets from the scorer, or the reason why there are none. Never an error: a request goes on
//! without scores, one rung down.

use crate::metrics;
use crate::peers::{Chosen, Peer, Peers};
use crate::worker::{ANNOUNCEMENT_BYTES, passed_on, within, worth_another};
use cacheclip_rpc::convert::id_bytes;
use cacheclip_rpc::v1::scorer_client::ScorerClient;
use cacheclip_rpc::v1::{
    Hold, Importance, PrepareRequest, Residency, ScoreChunk, ScoreMode, ScoreRequest, ScoreResponse, Stage,
    WatchRequest,
};
use cacheclip_service::residency::short;
use cacheclip_service::{ConnectOptions, request_id};
use futures::future::BoxFuture;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tonic::transport::Channel;
use tonic::{Code, Request, Status, Streaming};

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
#[derive(Clone, Debug)]
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

/// The scorers, if any are configured. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Scorers {
    peers: Option<Peers>,
    timeout: Duration,
    message_bytes: usize,
}

fn watch(channel: Channel) -> BoxFuture<'static, Result<Streaming<Residency>, Status>> {
    Box::pin(async move {
        let mut client = ScorerClient::new(channel).max_decoding_message_size(ANNOUNCEMENT_BYTES);
        client.watch(Request::new(WatchRequest {})).await.map(tonic::Response::into_inner)
    })
}

impl Scorers {
    pub(crate) fn start(
        endpoints: &[String],
        connect: &ConnectOptions,
        timeout: Duration,
        message_bytes: usize,
    ) -> Result<Self, cacheclip_service::Error> {
        let peers = match endpoints {
            [] => None,
            some => Some(Peers::start("scorer", some, connect, watch)?),
        };
        Ok(Self { peers, timeout, message_bytes })
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
        let asking = async {
            let mut tried = Vec::new();
            let mut last = None;
            while let Some((scorer, mut client)) = self.choose(&question.chunks, &tried)? {
                let answer = tokio::select! {
                    answer = ask_twice(&mut client, &question) => answer,
                    () = scorer.lost() => Err(Failed::Call(Status::unavailable("the scorer fell silent"))),
                };
                match answer {
                    Err(Failed::Call(failed)) if worth_another(&failed) => last = Some(failed),
                    answer => return answer.map_err(Missing::from),
                }
                tried.push(scorer.endpoint().to_owned());
            }
            Err(last.unwrap_or_else(|| Status::unavailable("no scorer was found")).into())
        };
        let late = || Status::deadline_exceeded(format!("no importance sets within {:?}", self.timeout));
        tokio::time::timeout(self.timeout, asking).await.map_err(|_| late())?
    }

    /// The scorer that holds most of these chunks' auxiliary KV, less its queue. A chunk's text length stands for
    /// its tokens: only the proportion counts.
    fn choose(
        &self,
        chunks: &[Asked],
        tried: &[String],
    ) -> Result<Option<(Chosen, ScorerClient<Channel>)>, Missing> {
        let Some(peers) = &self.peers else {
            return Err(Missing { label: "not_configured", why: "no scorer is configured".into() });
        };
        let wanted: Vec<(u64, u32)> =
            chunks.iter().map(|chunk| (short(&chunk.digest), chunk.text.len() as u32)).collect();
        Ok(peers.choose(&wanted, tried).map(|scorer| {
            let client = self.client(&scorer);
            (scorer, client)
        }))
    }

    /// A client for one call to a scorer.
    pub(crate) fn client(&self, scorer: &Peer) -> ScorerClient<Channel> {
        ScorerClient::new(scorer.channel())
            .max_decoding_message_size(self.message_bytes)
            .max_encoding_message_size(self.message_bytes)
    }

    /// All scorers, and names behind which none was found.
    pub(crate) fn all(&self) -> (Vec<Arc<Peer>>, Vec<String>) {
        self.peers.as_ref().map(Peers::all).unwrap_or_default()
    }

    /// Has a scorer compute, keep and store the auxiliary KV of chunks, for the document that `hold` names. Failing
    /// keeps nobody from ingesting: it is counted, and told.
    pub(crate) async fn prepare(&self, chunks: &[Asked], hold: Option<&Hold>, limit: Duration) -> bool {
        let (_scorer, mut client) = match self.choose(chunks, &[]) {
            Ok(Some(chosen)) => chosen,
            // Without scorers nothing is to be prepared.
            Err(_) => return true,
            Ok(None) => return false,
        };
        let call = async {
            let mut request = PrepareRequest { chunks: digests(chunks), hold: hold.cloned() };
            let reply =
                client.prepare(request_id::outgoing(Request::new(request.clone()))).await?.into_inner();
            if reply.need_text.is_empty() {
                return Ok(());
            }
            add_text(&mut request.chunks, chunks, &reply.need_text);
            client.prepare(request_id::outgoing(Request::new(request))).await.map(drop)
        };
        let Err(failed) = within(limit, "the scorer's preparation", call).await else { return true };
        let Missing { label, why } = failed.into();
        metrics::unprepared(label, chunks.len());
        tracing::warn!(reason = label, why, "chunks are not prepared for scoring");
        false
    }
}

/// Why one scorer gave no sets.
enum Failed {
    Call(Status),
    /// It answered; another one would not do better.
    Missing(Missing),
}

impl From<Status> for Failed {
    fn from(failed: Status) -> Self {
        Self::Call(failed)
    }
}

impl From<Failed> for Missing {
    fn from(failed: Failed) -> Self {
        match failed {
            Failed::Call(status) => status.into(),
            Failed::Missing(missing) => missing,
        }
    }
}

/// Digests first; once more with the texts that the scorer does not know.
async fn ask_twice(client: &mut ScorerClient<Channel>, asked: &Question) -> Result<ScoreResponse, Failed> {
    let mut request = ScoreRequest {
        prefix: asked.prefix.clone(),
        chunks: digests(&asked.chunks),
        question: asked.question.clone(),
        mode: asked.mode.into(),
    };
    // No deadline in the metadata: giving up drops the call, which the scorer hears of at once.
    let call = |request: ScoreRequest| request_id::outgoing(Request::new(request));
    let first = client.score(call(request.clone())).await?.into_inner();
    if first.need_text.is_empty() {
        return Ok(first);
    }
    add_text(&mut request.chunks, &asked.chunks, &first.need_text);
    let second = client.score(call(request)).await?.into_inner();
    if second.need_text.is_empty() {
        return Ok(second);
    }
    // It forgets faster than it is told: its cache is too small for one request.
    let why = "the scorer asked for text twice; enlarge its cache".into();
    Err(Failed::Missing(Missing { label: "text", why }))
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
