//! `cacheclip bench load`: many requests at once, whose chunks come over a slow link or are computed instead.
//!
//! Each mode of loading gets a fleet of its own on the same store and the same requests. Every chunk is asked for once,
//! one request at a time, before what counts: the scorer then has its auxiliary KV, and the worker has seen the link.

use super::bar;
use super::bed::{self, Bed, QUESTION, Stand, ask};
use super::fit::percentile;
use super::measure::{Machine, Runs, cpu_seconds, peak_rss_bytes, reset_peak_rss};
use super::tuning::loading;
use crate::demo::compare::request;
use crate::text;
use anyhow::Context as _;
use cacheclip_gpu_worker::Loading;
use cacheclip_rpc::v1::{GenerateRequest, Tier};
use rand::SeedableRng as _;
use serde::Serialize;
use std::process::ExitCode;
use std::time::Instant;
use tokio::task::JoinSet;

/// Arguments of `bench load`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    bed: bed::Arguments,
    /// Requests at the same time.
    #[arg(long, default_value_t = 64)]
    requests: usize,
    /// Tokens of a request's chunks, about.
    #[arg(long, default_value_t = 2048)]
    tokens: usize,
    /// Tokens per chunk, about.
    #[arg(long, default_value_t = 512)]
    chunk: usize,
    /// Chunks that requests draw theirs from. The worker keeps none of them.
    #[arg(long, default_value_t = 32)]
    corpus: usize,
    /// Millions of bytes per second of the store's link.
    #[arg(long, value_delimiter = ',', default_value = "25,50,200")]
    link_mb_per_s: Vec<f64>,
    /// Ways to decide: auto, always, never.
    #[arg(long, value_delimiter = ',', default_value = "auto,always,never", value_parser = loading)]
    loading: Vec<Loading>,
    /// Share of the reused tokens to recompute.
    #[arg(long, default_value_t = 0.2, value_parser = text::share)]
    ratio: f32,
    /// Rounds: all modes in turns.
    #[arg(long, default_value_t = 1)]
    runs: usize,
}

#[derive(Debug, Serialize)]
struct Report {
    machine: Machine,
    shape: String,
    requests: usize,
    chunk_tokens: usize,
    ratio: f32,
    rows: Vec<Row>,
    choices: Vec<Choice>,
}

/// One way to decide at one rate.
#[derive(Debug, Serialize)]
struct Row {
    link_mb_per_s: f64,
    loading: Loading,
    /// Of a prompt.
    tokens: u32,
    ttft_p50_ms: Runs,
    ttft_p99_ms: Runs,
    /// Until the last answer.
    wall_seconds: Runs,
    /// All processes, all requests.
    cpu_seconds: Runs,
    /// Chunks that came over the link, of all; the rest was computed.
    loaded_share: Runs,
    /// Requests that got no answer, over all rounds.
    failed: usize,
    /// What the first of them was told.
    failure: Option<String>,
    peak_rss_bytes: u64,
    runs: usize,
}

/// What choosing is worth at one rate.
#[derive(Debug, Serialize)]
struct Choice {
    link_mb_per_s: f64,
    /// p99 of choosing over the better p99 of always loading and never loading, round by round.
    p99_over_better: Runs,
    loaded_share: Runs,
}

/// One round of one mode.
#[derive(Debug)]
struct Round {
    tokens: u32,
    ttft_ms: Vec<f64>,
    wall_seconds: f64,
    cpu_seconds: f64,
    loaded: usize,
    chunks: usize,
    failures: Vec<String>,
    peak_rss_bytes: u64,
}

pub(crate) async fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let each = (arguments.tokens / arguments.chunk).max(1);
    anyhow::ensure!(each <= arguments.corpus, "corpus: at least the {each} chunks of one request");
    let bed = Bed::start(&arguments.bed, true).await?;
    let machine = Machine::here();
    let corpus = bed.texts(arguments.corpus, arguments.chunk, 0)?;
    let mut first = bed.fleet(|_| ()).await?;
    first.ingest(&corpus).await?;
    first.drain().await;
    let warm: Vec<_> = corpus.chunks(each).map(|chunks| prompt(chunks.to_vec(), arguments.ratio)).collect();
    let requests = requests(&arguments, &corpus, each);
    let cells: Vec<(f64, Loading)> = arguments
        .link_mb_per_s
        .iter()
        .flat_map(|&rate| arguments.loading.iter().map(move |&mode| (rate, mode)))
        .collect();
    let bar = bar("load", (arguments.runs * cells.len()) as u64)?;
    let mut rounds: Vec<Vec<Round>> = cells.iter().map(|_| Vec::new()).collect();
    for _ in 0..arguments.runs {
        for (&(rate, mode), rounds) in cells.iter().zip(&mut rounds) {
            bar.set_message(format!("{mode:?} at {rate} MB/s"));
            rounds.push(round(&bed, rate, mode, &warm, &requests).await?);
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    let rows: Vec<Row> =
        cells.iter().zip(&rounds).map(|(&(rate, mode), rounds)| row(rate, mode, rounds)).collect();
    let report = Report {
        machine,
        shape: arguments.bed.common.shape.clone(),
        requests: arguments.requests,
        chunk_tokens: arguments.chunk,
        ratio: arguments.ratio,
        choices: choices(&arguments, &cells, &rounds),
        rows,
    };
    if arguments.bed.common.json {
        return text::json(&report);
    }
    report.print();
    Ok(ExitCode::SUCCESS)
}

fn prompt(chunks: Vec<String>, ratio: f32) -> GenerateRequest {
    GenerateRequest { ratio: Some(ratio), ..request(chunks, QUESTION, "cacheclip", 1) }
}

/// The same for every mode and rate.
fn requests(arguments: &Arguments, corpus: &[String], each: usize) -> Vec<GenerateRequest> {
    let mut random = rand::rngs::StdRng::seed_from_u64(13);
    let mut one = || {
        let drawn = rand::seq::index::sample(&mut random, corpus.len(), each);
        prompt(drawn.into_iter().map(|index| corpus[index].clone()).collect(), arguments.ratio)
    };
    (0..arguments.requests).map(|_| one()).collect()
}

async fn round(
    bed: &Bed,
    rate: f64,
    mode: Loading,
    warm: &[GenerateRequest],
    requests: &[GenerateRequest],
) -> anyhow::Result<Round> {
    let mut stand = bed
        .fleet(|options| {
            // Nobody is turned away: what is compared is how long they wait.
            options.worker.queue = 8 * requests.len();
            options.scorer.iter_mut().for_each(|scorer| scorer.queue = 2 * requests.len());
            let services = [&mut options.worker.service, &mut options.gateway.service];
            services.into_iter().for_each(|service| service.max_concurrent_requests = 256 + requests.len());
            options.worker.loading = mode;
        })
        .await?;
    bed.shape(Some(rate));
    for request in warm {
        stand.ask(request.clone()).await.context("a request before those that count")?;
    }
    let round = at_once(bed, &stand, requests).await;
    bed.shape(None);
    stand.drain().await;
    round
}

/// All requests at the same time.
async fn at_once(bed: &Bed, stand: &Stand, requests: &[GenerateRequest]) -> anyhow::Result<Round> {
    let used = || cpu_seconds("self") + bed.store.cpu_seconds();
    reset_peak_rss();
    let (before, began) = (used(), Instant::now());
    let mut asking = JoinSet::new();
    for request in requests {
        let (mut client, request) = (stand.client.clone(), request.clone());
        asking.spawn(async move { ask(&mut client, request).await });
    }
    let (mut answers, mut failures) = (Vec::new(), Vec::new());
    // Each of them has a deadline of its own.
    while let Some(asked) = asking.join_next().await {
        match asked? {
            Ok(answer) => answers.push(answer),
            Err(error) => failures.push(format!("{error:#}")),
        }
    }
    let (wall_seconds, cpu_seconds) = (began.elapsed().as_secs_f64(), used() - before);
    let chunks: Vec<_> = answers.iter().flat_map(|answer| answer.explain().chunks).collect();
    Ok(Round {
        tokens: answers.first().map_or(0, |answer| answer.usage().prompt_tokens),
        ttft_ms: answers.iter().map(bed::Answer::ttft_ms).collect(),
        wall_seconds,
        cpu_seconds,
        loaded: chunks.iter().filter(|chunk| chunk.tier() != Tier::Computed).count(),
        chunks: chunks.len(),
        failures,
        peak_rss_bytes: peak_rss_bytes(),
    })
}

impl Round {
    fn p99(&self) -> f64 {
        percentile(&self.ttft_ms, 0.99)
    }

    fn loaded_share(&self) -> f64 {
        self.loaded as f64 / self.chunks as f64
    }
}

fn row(rate: f64, mode: Loading, rounds: &[Round]) -> Row {
    let runs = |of: &dyn Fn(&Round) -> f64| Runs::of(rounds.iter().map(of).collect());
    Row {
        link_mb_per_s: rate,
        loading: mode,
        tokens: rounds.first().map_or(0, |round| round.tokens),
        ttft_p50_ms: runs(&|round| percentile(&round.ttft_ms, 0.5)),
        ttft_p99_ms: runs(&Round::p99),
        wall_seconds: runs(&|round| round.wall_seconds),
        cpu_seconds: runs(&|round| round.cpu_seconds),
        loaded_share: runs(&Round::loaded_share),
        failed: rounds.iter().map(|round| round.failures.len()).sum(),
        failure: rounds.iter().flat_map(|round| &round.failures).next().cloned(),
        peak_rss_bytes: rounds.iter().map(|round| round.peak_rss_bytes).max().unwrap_or(0),
        runs: rounds.len(),
    }
}

/// At each rate where all modes were measured.
fn choices(arguments: &Arguments, cells: &[(f64, Loading)], rounds: &[Vec<Round>]) -> Vec<Choice> {
    let of = |rate: f64, mode: Loading| {
        let at = cells.iter().position(|&(r, m)| r == rate && m == mode)?;
        Some(&rounds[at])
    };
    let choice = |&rate: &f64| {
        let [auto, always, never] =
            [Loading::Auto, Loading::Always, Loading::Never].map(|mode| of(rate, mode));
        let (auto, others) = (auto?, always?.iter().zip(never?));
        let better = others.map(|(always, never)| always.p99().min(never.p99()));
        Some(Choice {
            link_mb_per_s: rate,
            p99_over_better: Runs::of(
                auto.iter().zip(better).map(|(auto, better)| auto.p99() / better).collect(),
            ),
            loaded_share: Runs::of(auto.iter().map(Round::loaded_share).collect()),
        })
    };
    arguments.link_mb_per_s.iter().filter_map(choice).collect()
}

impl Report {
    fn print(&self) {
        let machine = self.machine.text();
        let Self { shape, requests, chunk_tokens, ratio, .. } = self;
        text::line(format_args!(
            "{machine}; {shape}, {requests} requests at once, chunks of {chunk_tokens} tokens, {ratio} recomputed"
        ));
        let cells = |row: &Row| {
            vec![
                format!("{:.0} MB/s", row.link_mb_per_s),
                format!("{:?}", row.loading).to_lowercase(),
                row.tokens.to_string(),
                row.ttft_p50_ms.text(0),
                row.ttft_p99_ms.text(0),
                row.wall_seconds.text(1),
                row.cpu_seconds.text(1),
                format!("{:.0} %", row.loaded_share.median * 100.0),
                row.failed.to_string(),
                format!("{:.0}", row.peak_rss_bytes as f64 / 1e6),
            ]
        };
        let header = [
            "link",
            "loading",
            "tokens",
            "p50 ms",
            "p99 ms",
            "wall s",
            "CPU s",
            "loaded",
            "failed",
            "peak RSS MB",
        ];
        text::table(&header, &self.rows.iter().map(cells).collect::<Vec<_>>());
        for Row { loading, link_mb_per_s, failure, .. } in &self.rows {
            if let Some(failure) = failure {
                text::line(format_args!("{loading:?} at {link_mb_per_s} MB/s failed: {failure}"));
            }
        }
        for Choice { link_mb_per_s, p99_over_better, loaded_share } in &self.choices {
            let (ratio, share) = (p99_over_better.text(2), loaded_share.median * 100.0);
            text::line(format_args!(
                "{link_mb_per_s} MB/s: choosing loads {share:.0} %, its p99 is {ratio} of the better of the two"
            ));
        }
    }
}
