//! A fake worker and a fake scorer behind real sockets, and a gateway in front of them.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use cacheclip_gateway::Options;
use cacheclip_prompt::Composer;
use cacheclip_rpc::v1::gateway_client::GatewayClient;
use cacheclip_rpc::v1::scorer_server::{Scorer, ScorerServer};
use cacheclip_rpc::v1::worker_request::Request as Part;
use cacheclip_rpc::v1::worker_server::{Worker, WorkerServer};
use cacheclip_rpc::v1::{self, generate_event::Event};
use cacheclip_service::{ConnectOptions, Running, Server, connect, request_id, residency};
use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::sync::{Notify, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::Routes;
use tonic::transport::Channel;
use tonic::{Request, Response, Status, Streaming};

/// No test waits longer than this for anything.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
pub(crate) const MODEL: &str = "fake";
pub(crate) const MAX_TOKENS: u32 = 200;

pub(crate) fn model_dir() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny/primary")
}

/// Fails the test instead of hanging it.
pub(crate) async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what).await.expect("in time")
}

/// What a fake does, and what it saw.
#[derive(Debug, Default)]
pub(crate) struct State {
    /// The worker answers `Generate` with this, before reading anything.
    pub(crate) refuse: Option<Status>,
    /// The worker sends one token and then nothing.
    pub(crate) hang: bool,
    /// The worker's stream ends without a result.
    pub(crate) cut: bool,
    /// The worker calls another tokenizer its own.
    pub(crate) other_tokenizer: bool,
    /// Layout the worker describes: this byte, 32 times.
    pub(crate) layout: u8,
    /// The scorer never answers.
    pub(crate) silent: bool,
    /// The scorer forgets every text at once.
    pub(crate) forgetful: bool,
    pub(crate) sections: Vec<v1::Sections>,
    pub(crate) importance: Vec<v1::Importance>,
    /// Request streams that ended without importance.
    pub(crate) ended_without: usize,
    pub(crate) precomputed: Vec<usize>,
    pub(crate) known: HashSet<Vec<u8>>,
    pub(crate) asked: Vec<v1::ScoreRequest>,
    pub(crate) prepared: Vec<v1::PrepareRequest>,
    /// What ingested chunks belong to, by who was told.
    pub(crate) holds: Vec<(&'static str, Option<v1::Hold>)>,
    /// Documents that were deleted, by who was told.
    pub(crate) deleted: Vec<(&'static str, Vec<u8>)>,
    pub(crate) request_ids: Vec<String>,
    stored: HashSet<Vec<u8>>,
    held: Vec<u64>,
}

#[derive(Clone, Debug)]
pub(crate) struct Fake {
    state: Arc<Mutex<State>>,
    announcer: residency::Announcer,
    /// Told when a generation's stream was dropped by the gateway.
    pub(crate) dropped: Arc<Notify>,
}

impl Default for Fake {
    fn default() -> Self {
        Self { state: Arc::default(), announcer: residency::Announcer::new("fake"), dropped: Arc::default() }
    }
}

impl Fake {
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no poison")
    }

    /// Announces keys as resident.
    pub(crate) fn hold(&self, keys: &[tonic::codegen::Bytes]) {
        let short =
            |key: &tonic::codegen::Bytes| residency::short(key.as_ref().try_into().expect("32 bytes"));
        self.state().held = keys.iter().map(short).collect();
    }

    fn announce(&self) -> ReceiverStream<Result<v1::Residency, Status>> {
        let state = Arc::clone(&self.state);
        self.announcer.stream(move || residency::Load {
            held: state.lock().expect("no poison").held.clone(),
            ..Default::default()
        })
    }

    fn saw_request(&self) {
        let id = request_id::current().map(|id| id.to_string()).unwrap_or_default();
        self.state().request_ids.push(id);
    }

    /// Reads the second message, answers, and tells when nobody listens any more.
    async fn answer(
        self,
        mut inbound: Streaming<v1::WorkerRequest>,
        events: mpsc::Sender<Result<v1::WorkerEvent, Status>>,
    ) {
        let (wants_scores, chunks, hang, cut) = {
            let mut state = self.state();
            let (hang, cut) = (state.hang, state.cut);
            let sections = state.sections.last_mut().expect("sections");
            (sections.policy.starts_with("cacheclip"), sections.chunks.clone(), hang, cut)
        };
        match inbound.message().await {
            Ok(Some(v1::WorkerRequest { request: Some(Part::Importance(importance)) })) => {
                assert!(wants_scores && !chunks.is_empty(), "importance that nobody needs");
                self.state().importance.push(importance);
            }
            Ok(None) => self.state().ended_without += 1,
            other => panic!("not importance: {other:?}"),
        }
        for (index, text) in ["sunny", " bell"].into_iter().enumerate() {
            let token = v1::WorkerToken { text: text.into(), index: index as u32 };
            let _ = events.send(Ok(event(v1::worker_event::Event::Token(token)))).await;
            if hang {
                events.closed().await;
                self.dropped.notify_one();
                return;
            }
        }
        if cut {
            return;
        }
        let tokens = chunks.iter().map(|chunk| chunk.ids.len() as u32).sum();
        let done = v1::WorkerDone {
            text: "sunny bell".into(),
            finish_reason: v1::FinishReason::Stop.into(),
            usage: Some(v1::Usage { prompt_tokens: tokens, cached_tokens: tokens, ..Default::default() }),
            explain: Some(v1::Explain {
                stages: vec![v1::Stage { name: "decode".into(), seconds: 0.5 }],
                ..Default::default()
            }),
        };
        let _ = events.send(Ok(event(v1::worker_event::Event::Done(done)))).await;
    }

    fn need_text(&self, chunks: &[v1::ScoreChunk]) -> Vec<u32> {
        let mut state = self.state();
        let mut needed = Vec::new();
        for (index, chunk) in chunks.iter().enumerate() {
            match &chunk.text {
                Some(_) if !state.forgetful => drop(state.known.insert(chunk.digest.to_vec())),
                _ if state.known.contains(&chunk.digest.to_vec()) => {}
                _ => needed.push(index as u32),
            }
        }
        needed
    }
}

fn event(event: v1::worker_event::Event) -> v1::WorkerEvent {
    v1::WorkerEvent { event: Some(event) }
}

/// What every holder says: one chunk of its own, and what the stores tell all of them.
fn gave_up(own: v1::Tier) -> v1::HolderDeletion {
    let tiers = vec![v1::TierDeletion::of(own, 1, 10), v1::TierDeletion::of(v1::Tier::StoreDisk, 4, 40)];
    v1::HolderDeletion { generation: 7, tiers, kept: 1, pending: Vec::new() }
}

#[tonic::async_trait]
impl Worker for Fake {
    type GenerateStream = ReceiverStream<Result<v1::WorkerEvent, Status>>;

    async fn generate(
        &self,
        request: Request<Streaming<v1::WorkerRequest>>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        self.saw_request();
        if let Some(refusal) = self.state().refuse.clone() {
            return Err(refusal);
        }
        let mut inbound = request.into_inner();
        let first = inbound.message().await?.and_then(|message| message.request);
        let Some(Part::Sections(sections)) = first else { panic!("not sections: {first:?}") };
        self.state().sections.push(sections);
        let (events, stream) = mpsc::channel(4);
        tokio::spawn(self.clone().answer(inbound, events));
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn precompute(
        &self,
        request: Request<v1::PrecomputeRequest>,
    ) -> Result<Response<v1::PrecomputeResponse>, Status> {
        let mut state = self.state();
        let v1::PrecomputeRequest { chunks, hold, .. } = request.into_inner();
        state.holds.push(("worker", hold));
        state.precomputed.push(chunks.len());
        let computed = chunks.into_iter().map(|chunk| state.stored.insert(chunk.key.to_vec())).collect();
        Ok(Response::new(v1::PrecomputeResponse { computed }))
    }

    async fn describe(
        &self,
        _: Request<v1::DescribeRequest>,
    ) -> Result<Response<v1::DescribeResponse>, Status> {
        let composer = Composer::from_dir(&model_dir()).expect("the small model");
        let state = self.state();
        let digest = if state.other_tokenizer { [9; 32] } else { composer.tokenizer().digest() };
        let layout = v1::Layout { id: vec![state.layout; 32].into(), key_spec: 1, ..Default::default() };
        Ok(Response::new(v1::DescribeResponse {
            model: MODEL.into(),
            layout: Some(layout),
            tokenizer: digest.to_vec().into(),
            anchor: composer.anchor().expect("ids"),
            max_tokens: MAX_TOKENS,
            policies: ["cacheclip", "cacheclip-paper", "stale", "full"].map(String::from).to_vec(),
        }))
    }

    async fn delete_document(
        &self,
        request: Request<v1::DeleteDocumentRequest>,
    ) -> Result<Response<v1::HolderDeletion>, Status> {
        self.state().deleted.push(("worker", request.into_inner().document.to_vec()));
        Ok(Response::new(gave_up(v1::Tier::WorkerRam)))
    }

    type WatchStream = ReceiverStream<Result<v1::Residency, Status>>;

    async fn watch(&self, _: Request<v1::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        Ok(Response::new(self.announce()))
    }
}

#[tonic::async_trait]
impl Scorer for Fake {
    async fn score(&self, request: Request<v1::ScoreRequest>) -> Result<Response<v1::ScoreResponse>, Status> {
        self.saw_request();
        let request = request.into_inner();
        self.state().asked.push(request.clone());
        if self.state().silent {
            std::future::pending::<()>().await;
        }
        let need_text = self.need_text(&request.chunks);
        if !need_text.is_empty() {
            return Ok(Response::new(v1::ScoreResponse { need_text, ..Default::default() }));
        }
        let span = v1::ScoredSpan { start: 0, end: 4, score: 1.0 };
        let set = |chunk| v1::ImportanceSet { chunk, spans: vec![span] };
        let sets = (0..request.chunks.len() as u32).map(set).collect();
        let stages = vec![v1::Stage { name: "aux_question".into(), seconds: 0.25 }];
        Ok(Response::new(v1::ScoreResponse { sets, stages, ..Default::default() }))
    }

    async fn prepare(
        &self,
        request: Request<v1::PrepareRequest>,
    ) -> Result<Response<v1::PrepareResponse>, Status> {
        let request = request.into_inner();
        self.state().prepared.push(request.clone());
        self.state().holds.push(("scorer", request.hold.clone()));
        Ok(Response::new(v1::PrepareResponse {
            need_text: self.need_text(&request.chunks),
            ..Default::default()
        }))
    }

    async fn delete_document(
        &self,
        request: Request<v1::DeleteDocumentRequest>,
    ) -> Result<Response<v1::HolderDeletion>, Status> {
        self.state().deleted.push(("scorer", request.into_inner().document.to_vec()));
        Ok(Response::new(gave_up(v1::Tier::ScorerRam)))
    }

    type WatchStream = ReceiverStream<Result<v1::Residency, Status>>;

    async fn watch(&self, _: Request<v1::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        Ok(Response::new(self.announce()))
    }
}

/// A gateway with its fakes; all on loopback.
#[derive(Debug)]
pub(crate) struct Fleet {
    pub(crate) fake: Fake,
    pub(crate) worker: Option<Running>,
    pub(crate) scorer: Option<Running>,
    pub(crate) gateway: Running,
    pub(crate) client: GatewayClient<Channel>,
    others: Vec<Running>,
}

pub(crate) async fn start_worker(fake: &Fake, listen: &str) -> Running {
    let options = cacheclip_service::Options { listen: listen.into(), ..Default::default() };
    let announcer = residency::Announcer::new("fake worker");
    let routes = Routes::new(WorkerServer::new(Fake { announcer: announcer.clone(), ..fake.clone() }));
    let server = Server::new("fake worker", options);
    let running = server.serve(routes, &["cacheclip.v1.Worker"]).await.expect("a worker");
    announcer.follow(&running);
    running
}

pub(crate) async fn start_scorer(fake: &Fake) -> Running {
    let routes = Routes::new(ScorerServer::new(fake.clone()));
    let server = Server::new("fake scorer", cacheclip_service::Options::default());
    server.serve(routes, &["cacheclip.v1.Scorer"]).await.expect("a scorer")
}

pub(crate) fn options(worker: &Running, scorer: Option<&Running>) -> Options {
    Options {
        model_dir: model_dir(),
        workers: vec![worker.endpoint()],
        scorers: scorer.map(Running::endpoint).into_iter().collect(),
        ..Default::default()
    }
}

impl Fleet {
    pub(crate) async fn start() -> Self {
        Self::with(|_| {}).await
    }

    /// A fleet whose gateway's options are changed first.
    pub(crate) async fn with(change: impl FnOnce(&mut Options)) -> Self {
        let fake = Fake::default();
        let worker = start_worker(&fake, "127.0.0.1:0").await;
        let scorer = start_scorer(&fake).await;
        let mut options = options(&worker, Some(&scorer));
        change(&mut options);
        Self { worker: Some(worker), scorer: Some(scorer), ..Self::with_options(options, fake).await }
    }

    /// A gateway for peers that the test has started.
    pub(crate) async fn with_options(options: Options, fake: Fake) -> Self {
        let gateway = soon(cacheclip_gateway::start(options)).await.expect("a gateway");
        let channel = connect(&gateway.endpoint(), &ConnectOptions::default()).expect("a channel");
        let client = GatewayClient::new(channel);
        Self { fake, worker: None, scorer: None, gateway, client, others: Vec::new() }
    }

    /// Keeps peers up for as long as this fleet.
    pub(crate) fn keeping(self, others: impl IntoIterator<Item = Running>) -> Self {
        Self { others: others.into_iter().collect(), ..self }
    }

    pub(crate) async fn generate(&self, request: v1::GenerateRequest) -> Result<Answer, Status> {
        soon(Answer::read(self.client.clone(), Request::new(request))).await
    }
}

/// The events of one generation.
#[derive(Debug, Default)]
pub(crate) struct Answer {
    /// Kinds of events, in order.
    pub(crate) order: Vec<&'static str>,
    pub(crate) started: v1::Started,
    pub(crate) tokens: Vec<String>,
    pub(crate) done: v1::Done,
}

impl Answer {
    pub(crate) async fn read(
        mut client: GatewayClient<Channel>,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Self, Status> {
        let mut stream = client.generate(request).await?.into_inner();
        let mut answer = Self::default();
        while let Some(event) = stream.message().await? {
            match event.event.expect("an event") {
                Event::Started(started) => {
                    answer.order.push("started");
                    answer.started = started;
                }
                Event::Token(token) => {
                    answer.order.push("token");
                    answer.tokens.push(token.text);
                }
                Event::Done(done) => {
                    answer.order.push("done");
                    answer.done = done;
                }
            }
        }
        Ok(answer)
    }

    pub(crate) fn stages(&self) -> Vec<&str> {
        let explain = self.done.explain.as_ref().expect("an explain record");
        explain.stages.iter().map(|stage| stage.name.as_str()).collect()
    }
}

pub(crate) fn chunk(text: &str) -> v1::Chunk {
    v1::Chunk { text: text.into(), corpus: String::new() }
}

/// A request over `chunks` with everything else left to defaults.
pub(crate) fn ask(chunks: &[&str]) -> v1::GenerateRequest {
    v1::GenerateRequest {
        chunks: chunks.iter().map(|text| chunk(text)).collect(),
        question: "\nQuestion: what does Belmon keep?".into(),
        ..Default::default()
    }
}
