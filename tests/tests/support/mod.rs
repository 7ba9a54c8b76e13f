//! The embedded fleet as the tests use it: start it, ask, ingest, look at its files and metrics, stop it.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use cacheclip::fleet::{Fleet, Options};
use cacheclip_bench::{Corpus, Question, world};
use cacheclip_chunk::{ChunkKey, Head};
use cacheclip_rpc::v1::gateway_client::GatewayClient;
use cacheclip_rpc::v1::{self, GenerateRequest, IngestRequest, Sampling, generate_event::Event};
use cacheclip_tests::PATIENCE;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tonic::transport::Channel;
use tonic::{IntoRequest, Status};

/// A stop text that no answer holds: instead of the model's own, which end an answer early.
pub(crate) const NEVER: &str = "\u{1}never\u{1}";

/// The repository.
pub(crate) fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Fails the test instead of hanging it. Boxed: a test that awaits many of these would be large.
pub(crate) async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, Box::pin(what)).await.expect("in time")
}

/// A data directory of its own.
pub(crate) fn data() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

/// A running fleet and a client of its gateway.
#[derive(Debug)]
pub(crate) struct TestFleet {
    pub(crate) fleet: Fleet,
    client: GatewayClient<Channel>,
}

/// One answer as it came.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) started: v1::Started,
    pub(crate) tokens: Vec<v1::Token>,
    pub(crate) done: v1::Done,
}

/// What an ingest reported, over all documents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ingested {
    pub(crate) chunks: u32,
    pub(crate) computed: u32,
    pub(crate) tokens: u64,
}

impl TestFleet {
    /// A fleet on this directory.
    pub(crate) async fn start(data: &Path) -> Self {
        Self::with(data, |_| {}).await
    }

    /// A fleet whose options were changed.
    pub(crate) async fn with(data: &Path, change: impl FnOnce(&mut Options)) -> Self {
        let mut options = options(data);
        change(&mut options);
        let fleet = soon(Fleet::start(options)).await.expect("a fleet starts");
        let client = soon(fleet.client()).await.expect("its gateway answers");
        Self { fleet, client }
    }

    /// A client of the gateway.
    pub(crate) fn client(&self) -> GatewayClient<Channel> {
        self.client.clone()
    }

    /// Asks and takes the whole stream, whose order is checked on the way.
    pub(crate) async fn ask(&self, request: impl IntoRequest<GenerateRequest>) -> Result<Answer, Status> {
        let mut client = self.client();
        soon(async {
            let mut events = client.generate(request).await?.into_inner();
            let (mut started, mut tokens) = (None, Vec::new());
            while let Some(event) = events.message().await? {
                match event.event.expect("every message holds an event") {
                    Event::Started(first) => {
                        assert!(started.is_none() && tokens.is_empty(), "`started` comes first and once");
                        started = Some(first);
                    }
                    Event::Token(token) => tokens.push(token),
                    Event::Done(done) => {
                        assert!(events.message().await?.is_none(), "nothing follows `done`");
                        return Ok(Answer { started: started.expect("`started` came"), tokens, done });
                    }
                }
            }
            panic!("the stream ended without `done`")
        })
        .await
    }

    /// Asks, and there is an answer.
    pub(crate) async fn answer(&self, request: GenerateRequest) -> Answer {
        self.ask(request).await.expect("an answer")
    }

    /// Sends documents and takes all progress.
    pub(crate) async fn ingest(
        &self,
        documents: Vec<IngestRequest>,
    ) -> Result<Vec<v1::IngestProgress>, Status> {
        let mut client = self.client();
        soon(async {
            let mut stream = client.ingest(tokio_stream::iter(documents)).await?.into_inner();
            let mut progress = Vec::new();
            while let Some(message) = stream.message().await? {
                progress.push(message);
            }
            Ok(progress)
        })
        .await
    }

    /// Ingests the reports of a corpus, one document each.
    pub(crate) async fn ingest_corpus(&self, corpus: &Corpus) -> Ingested {
        let document = |document: &cacheclip_bench::Document| IngestRequest {
            document: document.name.clone(),
            chunks: vec![chunk(&document.text)],
            ..Default::default()
        };
        let documents = corpus.documents.iter().map(document).collect();
        let progress = self.ingest(documents).await.expect("an ingest");
        Ingested {
            chunks: progress.iter().map(|it| it.chunks_done).sum(),
            computed: progress.iter().map(|it| it.chunks_computed).sum(),
            tokens: progress.iter().map(|it| it.tokens).sum(),
        }
    }

    /// The primary model's layout id.
    pub(crate) async fn layout(&self) -> Vec<u8> {
        let mut client = self.client();
        let told = soon(client.get_capabilities(v1::GetCapabilitiesRequest {})).await;
        let told = told.expect("capabilities").into_inner();
        told.models[0].layout.as_ref().expect("a layout").id.to_vec()
    }

    /// Metrics of the process as the gateway's admin port shows them.
    pub(crate) async fn metrics(&self) -> String {
        let admin = self.fleet.admin().expect("the test asked for an admin port");
        soon(async {
            let mut socket = tokio::net::TcpStream::connect(admin).await?;
            let request = format!("GET /metrics HTTP/1.1\r\nHost: {admin}\r\nConnection: close\r\n\r\n");
            socket.write_all(request.as_bytes()).await?;
            let mut answer = String::new();
            socket.read_to_string(&mut answer).await?;
            assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
            Ok::<_, io::Error>(answer)
        })
        .await
        .expect("metrics")
    }

    /// Stops everything; afterwards another fleet may use the directory.
    pub(crate) async fn stop(self) {
        let Self { fleet, client } = self;
        drop(client);
        soon(fleet.drain()).await;
    }
}

impl Answer {
    pub(crate) fn text(&self) -> &str {
        &self.done.text
    }

    pub(crate) fn usage(&self) -> &v1::Usage {
        self.done.usage.as_ref().expect("every answer has its usage")
    }

    pub(crate) fn explain(&self) -> &v1::Explain {
        self.done.explain.as_ref().expect("every answer is explained")
    }

    pub(crate) fn chunks(&self) -> &[v1::ChunkReport] {
        &self.explain().chunks
    }

    /// Keys of the chunks, in order.
    pub(crate) fn keys(&self) -> Vec<String> {
        self.chunks().iter().map(name).collect()
    }

    pub(crate) fn all_hit(&self) -> bool {
        !self.chunks().is_empty() && self.chunks().iter().all(|chunk| chunk.hit)
    }

    pub(crate) fn all_missed(&self) -> bool {
        !self.chunks().is_empty() && self.chunks().iter().all(|chunk| !chunk.hit)
    }

    /// Which text of each chunk was recomputed.
    pub(crate) fn recomputed(&self) -> Vec<(u32, Vec<(u32, u32)>)> {
        let spans =
            |chunk: &v1::ChunkReport| chunk.recomputed_spans.iter().map(|s| (s.start, s.end)).collect();
        self.chunks().iter().map(|chunk| (chunk.recomputed, spans(chunk))).collect()
    }

    /// Tokens of all chunks.
    pub(crate) fn chunk_tokens(&self) -> u32 {
        self.chunks().iter().map(|chunk| chunk.tokens).sum()
    }
}

/// Options of a fleet on the tiny models. A machine that is busy with other tests must not decide on which rung
/// of the ladder a request ends, so nothing times out before the test does.
pub(crate) fn options(data: &Path) -> Options {
    let mut options = Options::embedded(&root().join("models/tiny"), data);
    options.gateway.score_timeout_seconds = 40.0;
    options.worker.importance_timeout_seconds = 50.0;
    options.worker.load_timeout_seconds = 50.0;
    // Whether a tiny model's KV is loaded or computed must not depend on how busy the machine is, either.
    options.worker.loading = cacheclip_gpu_worker::Loading::Always;
    options
}

/// Two districts of reports, and questions over all eight of them.
pub(crate) fn corpus(seed: u64, questions: usize) -> Corpus {
    let corpus = world::generate(seed, 2, questions, &cacheclip_bench::Family::ALL);
    assert!(corpus.questions.iter().all(|question| question.chunks.len() == corpus.documents.len()));
    corpus
}

pub(crate) fn chunk(text: &str) -> v1::Chunk {
    v1::Chunk { text: text.to_owned(), corpus: String::new() }
}

/// The question over its reports in its order, greedy.
pub(crate) fn over(corpus: &Corpus, question: &Question) -> GenerateRequest {
    GenerateRequest {
        chunks: question.chunks.iter().map(|&index| chunk(&corpus.documents[index].text)).collect(),
        question: question.text.clone(),
        sampling: Some(Sampling { max_tokens: 24, ..Default::default() }),
        ..Default::default()
    }
}

/// The same under a policy, at a ratio.
pub(crate) fn under(request: &GenerateRequest, policy: &str, ratio: Option<f32>) -> GenerateRequest {
    GenerateRequest { policy: policy.to_owned(), ratio, ..request.clone() }
}

/// The same request with its chunks in another order; every turn has its own.
pub(crate) fn reordered(request: &GenerateRequest, turn: u64) -> GenerateRequest {
    let mut request = request.clone();
    let mut state = turn.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for last in (1..request.chunks.len()).rev() {
        // xorshift: any shuffle will do, as long as it is the same in every run.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        request.chunks.swap(last, (state % (last as u64 + 1)) as usize);
    }
    request
}

/// Name of the key that a report is about: its container's file is named so.
pub(crate) fn name(report: &v1::ChunkReport) -> String {
    ChunkKey::try_from(&report.key[..]).expect("a key").to_string()
}

/// Containers in a data directory by their key's name.
pub(crate) fn containers(data: &Path) -> BTreeMap<String, PathBuf> {
    let is_container = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "kv");
    let stem = |path: &Path| path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    files(data).into_iter().filter(is_container).map(|path| (stem(&path), path)).collect()
}

/// Containers with their bytes; those of `layout` only.
pub(crate) fn containers_of(data: &Path, layout: &[u8]) -> BTreeMap<String, Vec<u8>> {
    let read = |(key, path): (String, PathBuf)| (key, std::fs::read(path).expect("a container is readable"));
    let ours = |(_, bytes): &(String, Vec<u8>)| {
        let head = Head::parse(bytes).expect("a container that was published");
        head.layout().as_bytes()[..] == *layout
    };
    containers(data).into_iter().map(read).filter(ours).collect()
}

/// Files that were set aside.
pub(crate) fn quarantined(data: &Path) -> Vec<String> {
    let aside = |path: &PathBuf| path.parent().is_some_and(|folder| folder.ends_with("quarantine"));
    let name = |path: PathBuf| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    files(data).into_iter().filter(aside).map(name).collect()
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    // What goes away while it is looked at was not there.
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => found.extend(files(&entry.path())),
            Ok(kind) if kind.is_file() => found.push(entry.path()),
            _ => {}
        }
    }
    found
}

/// Sum over all series of the counters whose name ends so.
pub(crate) fn counted(metrics: &str, name_ends: &str) -> f64 {
    let value = |line: &str| {
        let (series, value) = line.rsplit_once(' ')?;
        let name = series.split('{').next()?;
        (name.starts_with("cacheclip_") && name.ends_with(name_ends)).then(|| value.parse::<f64>().ok())?
    };
    metrics.lines().filter(|line| !line.starts_with('#')).filter_map(value).sum()
}
