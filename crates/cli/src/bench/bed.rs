//! The test bed: fleets as callers see them, in front of a cache-store in a process of its own, behind a shaped link
//! where one is asked for.

use super::measure::{self, peak_rss_bytes, reset_peak_rss, use_threads};
use super::memory::Memory;
use super::process::{Store, free_port};
use crate::ingest;
use anyhow::Context as _;
use cacheclip::fleet::{Fleet, Options};
use cacheclip_bench::link::{Link, Shape};
use cacheclip_bench::{Family, world};
use cacheclip_model::config::Config;
use cacheclip_prompt::Composer;
use cacheclip_rpc::v1::gateway_client::GatewayClient;
use cacheclip_rpc::v1::generate_event::Event;
use cacheclip_rpc::v1::{Done, Explain, GenerateRequest};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tonic::transport::Channel;

/// The shape's name that stands for the directory's own weights.
const OWN: &str = "own";
/// Bytes of paged KV: room for the longest prompt of either shape.
const PAGES: u64 = 4 << 30;
/// Bytes of auxiliary KV in the scorer's RAM.
const AUXILIARY: u64 = 4 << 30;
/// Largest message: a prompt of 32K tokens and its explain record.
const MESSAGE: usize = 64 << 20;
/// No request is given up for being slow: that is what is measured. Something that hangs still ends.
const PATIENCE: Duration = Duration::from_secs(3600);
/// What every prompt ends with.
pub(crate) const QUESTION: &str = "What is the code of the bell ?";

/// What every benchmark is told.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Common {
    /// Shape of the random weights.
    #[arg(long, default_value = "smollm2-135m")]
    pub(crate) shape: String,
    /// Threads of every kernel.
    #[arg(long, default_value_t = 2)]
    pub(crate) threads: usize,
    /// Print JSON instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
}

/// What every benchmark of a fleet is told. The shape `own` is that of the directory, with its weights.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) common: Common,
    /// Directory with the models `primary/` and `aux/`: their tokenizers are used, and with `--shape own` their
    /// weights.
    #[arg(long, default_value = "models/tiny")]
    pub(crate) models: PathBuf,
}

/// Where fleets stand.
#[derive(Debug)]
pub(crate) struct Bed {
    pub(crate) store: Store,
    /// The primary's shape.
    pub(crate) config: Config,
    link: Option<Link>,
    composer: Composer,
    /// As embedded fleets have them, but for the store.
    options: Options,
    /// Fleets that were started.
    fleets: AtomicUsize,
    _data: tempfile::TempDir,
}

impl Bed {
    /// Starts the store; with `linked`, behind a link that is open until [`shape`](Self::shape) narrows it.
    pub(crate) async fn start(arguments: &Arguments, linked: bool) -> anyhow::Result<Self> {
        let Common { shape, threads, .. } = &arguments.common;
        let own = shape == OWN;
        let primary = arguments.models.join("primary");
        let config = if own { Config::from_dir(&primary)? } else { named(shape)? };
        use_threads(*threads)?;
        let data = tempfile::tempdir()?;
        let port = free_port()?;
        let link = match linked {
            true => Some(Link::start(([127, 0, 0, 1], port).into(), Shape::OPEN).await?),
            false => None,
        };
        let files = data.path().join("store");
        let store = Store::start(&files, port, link.as_ref().map(Link::endpoint)).await?;
        let mut options = patient(&arguments.models, &files);
        options.stores = vec![store.endpoint.clone()];
        if !own {
            let primary = widened(&primary, &data.path().join("primary"), config.vocab)?;
            options.worker.model_dir.clone_from(&primary);
            options.gateway.model_dir = primary;
            options.worker.random_shape = Some(shape.clone());
            options.scorer.iter_mut().for_each(|scorer| scorer.random_shape = Some("aux-30m".into()));
        }
        // The wider vocabulary has no text that is tokenised differently, and is large.
        let composer = Composer::from_dir(&arguments.models.join("primary"))?;
        let fleets = AtomicUsize::new(0);
        Ok(Self { store, config, link, composer, options, fleets, _data: data })
    }

    /// The link's rate from now on, in millions of bytes per second; `None`: as fast as it goes.
    pub(crate) fn shape(&self, mb_per_s: Option<f64>) {
        if let Some(link) = &self.link {
            link.set(mb_per_s.map_or(Shape::OPEN, Shape::megabytes));
        }
    }

    /// Starts a fleet on the store. Its worker keeps no chunks in RAM, unless `tune` says otherwise.
    pub(crate) async fn fleet(&self, tune: impl FnOnce(&mut Options)) -> anyhow::Result<Stand> {
        let mut options = self.options.clone();
        tune(&mut options);
        self.fleets.fetch_add(1, Ordering::Relaxed);
        let fleet = Fleet::start(options).await?;
        let client =
            fleet.client().await?.max_decoding_message_size(MESSAGE).max_encoding_message_size(MESSAGE);
        Ok(Stand { fleet, client })
    }

    /// Texts of about `each` tokens, no two alike; other seeds, other texts.
    pub(crate) fn texts(&self, count: usize, each: usize, seed: u64) -> anyhow::Result<Vec<String>> {
        let (mut texts, mut text, mut length) = (Vec::new(), String::new(), 0);
        for district in 0.. {
            let corpus = world::generate(seed * 100_000 + district, 4, 1, &Family::ALL);
            for sentence in corpus.documents.iter().flat_map(|document| document.text.split_inclusive('.')) {
                if texts.len() == count {
                    return Ok(texts);
                }
                length += self.composer.tokenizer().encode(sentence)?.ids.len();
                text.push_str(sentence);
                if length >= each {
                    texts.push(std::mem::take(&mut text));
                    length = 0;
                }
            }
        }
        Ok(texts)
    }

    /// Asks, and tells what it cost in all processes.
    pub(crate) async fn cost(&self, stand: &mut Stand, request: GenerateRequest) -> anyhow::Result<Cost> {
        let used = || measure::cpu_seconds("self") + self.store.cpu_seconds();
        reset_peak_rss();
        let before = used();
        let answer = stand.ask(request).await?;
        let cpu_seconds = used() - before;
        Ok(Cost { cpu_seconds, peak_rss_bytes: peak_rss_bytes(), memory: self.memory()?, answer })
    }

    /// What this process took since its peak was last forgotten, beside what it may; `None` where several fleets share it:
    /// their figures are one another's.
    pub(crate) fn memory(&self) -> anyhow::Result<Option<Memory>> {
        (self.fleets.load(Ordering::Relaxed) == 1).then(Memory::here).transpose()
    }
}

/// The named shape.
pub(crate) fn named(shape: &str) -> anyhow::Result<Config> {
    Config::shape(shape).with_context(|| format!("shape: {shape:?}; known: {:?}", Config::SHAPES))
}

/// A fleet's options under which nothing is given up or refused because it takes long or much.
fn patient(models: &Path, files: &Path) -> Options {
    let mut options = Options::embedded(models, files);
    let patience = PATIENCE.as_secs_f64();
    (options.worker.ram_bytes, options.worker.page_bytes) = (1, PAGES);
    (options.worker.importance_timeout_seconds, options.worker.load_timeout_seconds) = (patience, patience);
    (options.gateway.score_timeout_seconds, options.gateway.worker_timeout_seconds) = (patience, patience);
    if let Some(scorer) = &mut options.scorer {
        (scorer.cache_bytes, scorer.load_timeout_seconds) = (AUXILIARY, patience);
        scorer.service.request_timeout_seconds = patience;
    }
    for service in [&mut options.worker.service, &mut options.gateway.service] {
        (service.max_message_bytes, service.request_timeout_seconds) = (MESSAGE, patience);
    }
    options
}

/// A copy of a model directory's text files whose tokenizer has a text for every token of a wider vocabulary: random
/// weights draw from all of it, and a token without a text could not be seen to arrive.
fn widened(from: &Path, to: &Path, vocabulary: usize) -> anyhow::Result<PathBuf> {
    std::fs::create_dir_all(to)?;
    for file in ["config.json", "prompt.json"] {
        std::fs::copy(from.join(file), to.join(file))
            .with_context(|| format!("cannot copy {}", from.join(file).display()))?;
    }
    let path = from.join("tokenizer.json");
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut tokenizer: Value = serde_json::from_str(&text)?;
    let words = tokenizer["model"]["vocab"].as_object_mut();
    let words = words.with_context(|| format!("{}: model.vocab is no object", path.display()))?;
    let known: std::collections::HashSet<u64> = words.values().filter_map(Value::as_u64).collect();
    for id in (0..vocabulary as u64).filter(|id| !known.contains(id)) {
        // No merge makes them: no text is tokenised differently.
        words.insert(format!("~{id}"), json!(id));
    }
    std::fs::write(to.join("tokenizer.json"), serde_json::to_vec(&tokenizer)?)?;
    Ok(to.to_owned())
}

/// A running fleet with a client.
#[derive(Debug)]
pub(crate) struct Stand {
    fleet: Fleet,
    pub(crate) client: GatewayClient<Channel>,
}

impl Stand {
    /// Precomputes texts.
    pub(crate) async fn ingest(&mut self, texts: &[String]) -> anyhow::Result<()> {
        let document = vec![("benchmark".to_owned(), texts.to_vec())];
        let sent = ingest::send(&mut self.client, document, "ingest");
        tokio::time::timeout(PATIENCE, sent).await.context("the ingest does not end")??;
        Ok(())
    }

    /// Asks once and waits for the end.
    pub(crate) async fn ask(&mut self, request: GenerateRequest) -> anyhow::Result<Answer> {
        ask(&mut self.client, request).await
    }

    pub(crate) async fn drain(self) {
        self.fleet.drain().await;
    }
}

/// Asks once and waits for the end.
pub(crate) async fn ask(
    client: &mut GatewayClient<Channel>,
    request: GenerateRequest,
) -> anyhow::Result<Answer> {
    tokio::time::timeout(PATIENCE, answer(client, request)).await.context("the answer does not end")?
}

async fn answer(client: &mut GatewayClient<Channel>, request: GenerateRequest) -> anyhow::Result<Answer> {
    let sent = Instant::now();
    let mut events = client.generate(request).await?.into_inner();
    let mut tokens = Vec::new();
    while let Some(event) = events.message().await? {
        match event.event {
            Some(Event::Token(_)) => tokens.push(Instant::now()),
            Some(Event::Done(done)) => return Ok(Answer { sent, tokens, ended: Instant::now(), done }),
            _ => {}
        }
    }
    anyhow::bail!("the answer ended without its final message")
}

/// One answer as the client saw it.
#[derive(Debug)]
pub(crate) struct Answer {
    sent: Instant,
    /// When tokens arrived.
    tokens: Vec<Instant>,
    ended: Instant,
    pub(crate) done: Done,
}

impl Answer {
    /// From sending the request to the first token's arrival; an answer of nothing but an end token has none.
    pub(crate) fn ttft_ms(&self) -> f64 {
        (*self.tokens.first().unwrap_or(&self.ended) - self.sent).as_secs_f64() * 1e3
    }

    /// Milliseconds between tokens.
    pub(crate) fn gaps_ms(&self) -> impl Iterator<Item = f64> + '_ {
        gaps_ms(&self.tokens)
    }

    pub(crate) fn explain(&self) -> Explain {
        self.done.explain.clone().unwrap_or_default()
    }

    pub(crate) fn usage(&self) -> cacheclip_rpc::v1::Usage {
        self.done.usage.unwrap_or_default()
    }
}

/// Milliseconds between instants.
pub(crate) fn gaps_ms(instants: &[Instant]) -> impl Iterator<Item = f64> + '_ {
    instants.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64() * 1e3)
}

/// What one request cost.
#[derive(Debug)]
pub(crate) struct Cost {
    pub(crate) answer: Answer,
    /// All threads of gateway, scorer, worker, client and store.
    pub(crate) cpu_seconds: f64,
    /// Of the process that all of them but the store share.
    pub(crate) peak_rss_bytes: u64,
    pub(crate) memory: Option<Memory>,
}
