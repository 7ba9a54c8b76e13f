//! `cacheclip bench speed`: time to the first token by reuse beside full prefill of the same prompt.
//!
//! Everything a request costs is counted, as its caller sees it: tokenising, lookup, scoring with an auxiliary model of
//! 30M parameters, transfer from a cache-store in a process of its own, verification, decoding, rotation, repair,
//! question. The worker keeps no chunks in RAM, and every round has its chunks in another order.

use super::measure::{Machine, Runs, cpu_seconds, peak_rss_bytes, use_threads};
use super::process::Store;
use crate::demo::compare::{ask, request};
use crate::{ingest, text};
use cacheclip::fleet::{Fleet, Options};
use cacheclip_bench::{Family, world};
use cacheclip_prompt::Composer;
use cacheclip_rpc::v1::gateway_client::GatewayClient;
use cacheclip_rpc::v1::{Done, GenerateRequest};
use indicatif::{ProgressBar, ProgressStyle};
use rand::SeedableRng as _;
use rand::seq::SliceRandom as _;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use tonic::transport::Channel;

/// Bytes of paged KV: room for the longest prompt of either shape.
const PAGES: u64 = 4 << 30;

/// Arguments of `bench speed`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Shape of the primary's random weights.
    #[arg(long, default_value = "smollm2-135m")]
    shape: String,
    /// Tokens in chunks, about.
    #[arg(long, value_delimiter = ',', default_value = "1024,2048,4096")]
    tokens: Vec<usize>,
    /// Shares of the reused tokens to recompute.
    #[arg(long, value_delimiter = ',', default_value = "0.2,0.1,0", value_parser = text::share)]
    ratios: Vec<f32>,
    /// Tokens per chunk, about.
    #[arg(long, default_value_t = 512)]
    chunk: usize,
    /// Rounds.
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Threads of every kernel.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Directory with the models `primary/` and `aux/`: their tokenizers are used.
    #[arg(long, default_value = "models/tiny")]
    models: PathBuf,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    machine: Machine,
    shape: String,
    chunk_tokens: usize,
    rows: Vec<Row>,
    peak_rss_bytes: u64,
}

#[derive(Debug, Serialize)]
struct Row {
    /// Of the prompt.
    tokens: u32,
    chunks: usize,
    ratio: f32,
    realised_ratio: f32,
    ttft_full_ms: Runs,
    ttft_reuse_ms: Runs,
    /// Full prefill over reuse, round by round.
    speedup: Runs,
    /// Median milliseconds of each stage of reuse.
    stages_ms: BTreeMap<String, f64>,
    /// CPU seconds of one request, all processes.
    cpu_seconds_full: Runs,
    cpu_seconds_reuse: Runs,
    /// Prompt tokens per second of full prefill.
    full_tokens_per_second: f64,
    hits: u32,
}

pub(crate) async fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    use_threads(arguments.threads)?;
    let machine = Machine::here();
    let data = tempfile::tempdir()?;
    let store = Store::start(data.path())?;
    let mut options = Options::embedded(&arguments.models, data.path());
    options.stores = vec![store.endpoint.clone()];
    options.worker.random_shape = Some(arguments.shape.clone());
    (options.worker.ram_bytes, options.worker.page_bytes) = (1, PAGES);
    options.gateway.service.max_message_bytes = 64 << 20;
    options.worker.service.max_message_bytes = 64 << 20;
    if let Some(scorer) = &mut options.scorer {
        scorer.random_shape = Some("aux-30m".into());
        scorer.cache_bytes = 4 << 30;
    }
    let fleet = Fleet::start(options).await?;
    let mut client = fleet.client().await?;
    let composer = Composer::from_dir(&arguments.models.join("primary"))?;
    let bar =
        ProgressBar::new((arguments.tokens.len() * arguments.runs * (arguments.ratios.len() + 1)) as u64);
    bar.set_style(ProgressStyle::with_template("speed [{bar:40}] {pos}/{len} {msg}")?.progress_chars("=> "));
    let mut rows = Vec::new();
    for (seed, &tokens) in arguments.tokens.iter().enumerate() {
        let chunks = chunks(&composer, tokens, arguments.chunk, seed as u64 * 1000)?;
        ingest::send(&mut client, vec![(format!("{tokens} tokens"), chunks.clone())], "ingest").await?;
        rows.extend(measure(&arguments, &mut client, &store, chunks, &bar).await?);
    }
    bar.finish_and_clear();
    fleet.drain().await;
    let report = Report {
        machine,
        shape: arguments.shape.clone(),
        chunk_tokens: arguments.chunk,
        rows,
        peak_rss_bytes: peak_rss_bytes(),
    };
    if arguments.json {
        return text::json(&report);
    }
    report.print(arguments.runs);
    Ok(ExitCode::SUCCESS)
}

/// Texts of about `each` tokens that have `tokens` together, no two alike.
fn chunks(composer: &Composer, tokens: usize, each: usize, mut seed: u64) -> anyhow::Result<Vec<String>> {
    let (mut chunks, mut chunk, mut length) = (Vec::new(), Vec::new(), 0);
    let count = (tokens / each).max(1);
    while chunks.len() < count {
        seed += 1;
        for document in world::generate(seed, 4, 1, &Family::ALL).documents {
            length += composer.chunk(&document.text)?.ids.len();
            chunk.push(document.text);
            if length >= each.min(tokens) {
                chunks.push(chunk.join(" "));
                (chunk, length) = (Vec::new(), 0);
            }
        }
    }
    chunks.truncate(count);
    Ok(chunks)
}

/// What one request cost.
struct Cost {
    ttft_ms: f64,
    cpu_seconds: f64,
    done: Done,
}

async fn measure(
    arguments: &Arguments,
    client: &mut GatewayClient<Channel>,
    store: &Store,
    mut chunks: Vec<String>,
    bar: &ProgressBar,
) -> anyhow::Result<Vec<Row>> {
    let mut random = rand::rngs::StdRng::seed_from_u64(7);
    let question = "What is the code of the bell ?";
    let mut full = Vec::new();
    let mut reused: Vec<Vec<Cost>> = arguments.ratios.iter().map(|_| Vec::new()).collect();
    // The first round is thrown away: pages are touched and connections made.
    for round in 0..=arguments.runs {
        chunks.shuffle(&mut random);
        let asked = |policy: &str| request(chunks.clone(), question, policy, 1);
        let mut costs = vec![cost(client, store, asked("full")).await?];
        for &ratio in &arguments.ratios {
            let request = GenerateRequest { ratio: Some(ratio), ..asked("cacheclip") };
            costs.push(cost(client, store, request).await?);
        }
        if round == 0 {
            continue;
        }
        bar.inc(costs.len() as u64);
        let mut costs = costs.into_iter();
        full.extend(costs.next());
        reused.iter_mut().zip(costs).for_each(|(into, cost)| into.push(cost));
    }
    let rows = arguments.ratios.iter().zip(reused);
    Ok(rows.map(|(&ratio, reused)| row(ratio, chunks.len(), &full, &reused)).collect())
}

async fn cost(
    client: &mut GatewayClient<Channel>,
    store: &Store,
    request: GenerateRequest,
) -> anyhow::Result<Cost> {
    let before = cpu_seconds("self") + store.cpu_seconds();
    let answer = ask(client, request).await?;
    let cpu_seconds = cpu_seconds("self") + store.cpu_seconds() - before;
    Ok(Cost { ttft_ms: answer.ttft_ms, cpu_seconds, done: answer.done })
}

fn row(ratio: f32, chunks: usize, full: &[Cost], reused: &[Cost]) -> Row {
    let runs = |of: &dyn Fn(&Cost) -> f64, costs: &[Cost]| Runs::of(costs.iter().map(of).collect());
    let explain = |cost: &Cost| cost.done.explain.clone().unwrap_or_default();
    let mut stages: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for stage in reused.iter().flat_map(|cost| explain(cost).stages) {
        stages.entry(stage.name).or_default().push(stage.seconds * 1e3);
    }
    let ttft_full_ms = runs(&|cost| cost.ttft_ms, full);
    let tokens = full.last().and_then(|cost| cost.done.usage.as_ref()).map_or(0, |usage| usage.prompt_tokens);
    let last = reused.last().map(explain).unwrap_or_default();
    Row {
        tokens,
        chunks,
        ratio,
        realised_ratio: last.realised_ratio,
        ttft_reuse_ms: runs(&|cost| cost.ttft_ms, reused),
        speedup: Runs::of(
            full.iter().zip(reused).map(|(full, reuse)| full.ttft_ms / reuse.ttft_ms).collect(),
        ),
        stages_ms: stages.into_iter().map(|(name, values)| (name, Runs::of(values).median)).collect(),
        cpu_seconds_full: runs(&|cost| cost.cpu_seconds, full),
        cpu_seconds_reuse: runs(&|cost| cost.cpu_seconds, reused),
        full_tokens_per_second: f64::from(tokens) / ttft_full_ms.median * 1e3,
        ttft_full_ms,
        hits: last.chunks.iter().filter(|chunk| chunk.hit).count() as u32,
    }
}

impl Report {
    fn print(&self, runs: usize) {
        text::line(format_args!(
            "{}; {}, random weights, chunks of {} tokens; median [least, most] of {runs} rounds",
            self.machine.text(),
            self.shape,
            self.chunk_tokens
        ));
        let cells = |row: &Row| {
            vec![
                row.tokens.to_string(),
                format!("{:.2}", row.ratio),
                format!("{:.3}", row.realised_ratio),
                format!("{}/{}", row.hits, row.chunks),
                row.ttft_full_ms.text(0),
                row.ttft_reuse_ms.text(0),
                row.speedup.text(2),
                format!("{:.2} / {:.2}", row.cpu_seconds_full.median, row.cpu_seconds_reuse.median),
            ]
        };
        let header =
            ["tokens", "ratio", "realised", "hits", "full ms", "reuse ms", "speed-up", "CPU s full / reuse"];
        text::table(&header, &self.rows.iter().map(cells).collect::<Vec<_>>());
        for row in &self.rows {
            let stages: Vec<String> =
                row.stages_ms.iter().map(|(name, ms)| format!("{name} {ms:.1}")).collect();
            text::line(format_args!("{} at {:.2}, ms: {}", row.tokens, row.ratio, stages.join(", ")));
        }
    }
}
