//! `cacheclip bench batch`: many answers at once.
//!
//! Throughput and waiting by the number of streams; then what a long prefill does to streams that are being written,
//! and what becomes of their pages when their callers hang up.

use super::bar;
use super::bed::{self, Bed, QUESTION, Stand, ask};
use super::fit::percentile;
use super::measure::{Machine, Runs, peak_rss_bytes, reported, reset_peak_rss, rss_bytes};
use super::memory::Memory;
use crate::demo::compare::request;
use crate::text;
use anyhow::Context as _;
use cacheclip_model::config::Config;
use cacheclip_model::pages::pages_for;
use cacheclip_rpc::v1::generate_event::Event;
use cacheclip_rpc::v1::{GenerateRequest, Sampling};
use serde::Serialize;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

/// Most tokens of a stream that is cut off: more than come while the long prefill runs.
const ENDLESS: u32 = 4096;
/// Longest wait for pages to come back.
const FREED: Duration = Duration::from_secs(60);
/// How often their number is read.
const POLL: Duration = Duration::from_millis(1);
/// Longest silence of all streams together.
const SILENCE: Duration = Duration::from_secs(3600);

/// Arguments of `bench batch`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    bed: bed::Arguments,
    /// Streams at the same time, each number in turn.
    #[arg(long, value_delimiter = ',', default_value = "1,4,16,32")]
    streams: Vec<usize>,
    /// Tokens of a stream's chunk, about; it is stored before.
    #[arg(long, default_value_t = 512)]
    tokens: usize,
    /// Tokens of an answer.
    #[arg(long, default_value_t = 64)]
    answer: u32,
    /// Rounds of each number.
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Streams that a long prefill joins; 0: none.
    #[arg(long, default_value_t = 8)]
    join_streams: usize,
    /// Tokens of that prefill, about.
    #[arg(long, default_value_t = 8192)]
    join_tokens: usize,
    /// Rows of prefill between two decode steps; absent: the worker's own choice.
    #[arg(long)]
    prefill_rows: Option<usize>,
}

#[derive(Debug, Serialize)]
struct Report {
    machine: Machine,
    shape: String,
    prompt_tokens: usize,
    answer_tokens: u32,
    parameters: usize,
    /// Of the process with all services but the store, models loaded, before the first request.
    idle_rss_bytes: u64,
    rows: Vec<Row>,
    join: Option<Join>,
}

/// So many streams.
#[derive(Debug, Serialize)]
struct Row {
    streams: usize,
    /// Generated, of all streams together, first to last.
    tokens_per_second: Runs,
    ttft_p50_ms: Runs,
    ttft_p99_ms: Runs,
    gap_p50_ms: Runs,
    gap_p99_ms: Runs,
    /// All processes, per generated token.
    cpu_seconds_per_token: Runs,
    peak_rss_bytes: u64,
    /// Of the round with that peak.
    memory: Option<Memory>,
    runs: usize,
}

/// A long prefill among running streams, and what is left when they are cut off.
#[derive(Debug, Serialize)]
struct Join {
    streams: usize,
    tokens: u32,
    without: Gaps,
    with: Gaps,
    ttft_ms: f64,
    /// Pages in use before the streams, with all of them, and after their callers hung up.
    pages_before: f64,
    pages_during: f64,
    pages_after: f64,
    /// From hanging up to the last page's return; `None`: they did not come back in time.
    freed_ms: Option<f64>,
    /// Keys and values that the pages of all streams have room for: pages are reserved to an answer's longest end.
    kv_bytes: u64,
    peak_rss_bytes: u64,
    memory: Option<Memory>,
}

/// Time between two tokens of one stream.
#[derive(Debug, Serialize)]
struct Gaps {
    count: usize,
    p50_ms: f64,
    p99_ms: f64,
    most_ms: f64,
}

pub(crate) async fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let common = &arguments.bed.common;
    let bed = Bed::start(&arguments.bed, false).await?;
    let machine = Machine::here();
    let most = arguments.streams.iter().max().copied().unwrap_or(0).max(arguments.join_streams);
    let mut stand = bed
        .fleet(|options| {
            options.worker.queue = options.worker.queue.max(4 * most);
            options.scorer.iter_mut().for_each(|scorer| scorer.queue = scorer.queue.max(2 * most));
            options.worker.prefill_rows = arguments.prefill_rows.unwrap_or(options.worker.prefill_rows);
        })
        .await?;
    let idle_rss_bytes = rss_bytes();
    let chunks = bed.texts(most, arguments.tokens, 0)?;
    stand.ingest(&chunks).await?;
    let bar = bar("batch", (arguments.streams.len() * (arguments.runs + 1)) as u64)?;
    let mut rows = Vec::new();
    for &streams in &arguments.streams {
        let mut rounds = Vec::new();
        // The first round is thrown away: pages are touched.
        for round in 0..=arguments.runs {
            let measured = together(&bed, &stand, &chunks[..streams], arguments.answer).await?;
            rounds.extend((round > 0).then_some(measured));
            bar.inc(1);
        }
        rows.push(row(streams, &rounds));
    }
    bar.finish_and_clear();
    let join = match arguments.join_streams {
        0 => None,
        streams => Some(join(&arguments, &bed, &mut stand, &chunks[..streams]).await?),
    };
    stand.drain().await;
    let report = Report {
        machine,
        shape: common.shape.clone(),
        prompt_tokens: arguments.tokens,
        answer_tokens: arguments.answer,
        parameters: bed.config.parameters(),
        idle_rss_bytes,
        rows,
        join,
    };
    if common.json {
        return text::json(&report);
    }
    report.print();
    Ok(ExitCode::SUCCESS)
}

/// An answer of so many tokens: what no text contains is what stops it.
fn stream(chunk: &str, answer: u32) -> GenerateRequest {
    let sampling = Sampling { max_tokens: answer, stop: vec!["\0".into()], ..Default::default() };
    let asked = request(vec![chunk.to_owned()], QUESTION, "cacheclip", answer);
    GenerateRequest { sampling: Some(sampling), ..asked }
}

/// One round of so many streams.
#[derive(Debug)]
struct Round {
    generated: u32,
    seconds: f64,
    ttft_ms: Vec<f64>,
    gaps_ms: Vec<f64>,
    cpu_seconds: f64,
    peak_rss_bytes: u64,
    memory: Option<Memory>,
}

async fn together(bed: &Bed, stand: &Stand, chunks: &[String], answer: u32) -> anyhow::Result<Round> {
    let used = || super::measure::cpu_seconds("self") + bed.store.cpu_seconds();
    reset_peak_rss();
    let (before, began) = (used(), Instant::now());
    let mut asking = JoinSet::new();
    for chunk in chunks {
        let (mut client, request) = (stand.client.clone(), stream(chunk, answer));
        asking.spawn(async move { ask(&mut client, request).await });
    }
    let mut answers = Vec::new();
    // Each of them has a deadline of its own.
    while let Some(answer) = asking.join_next().await {
        answers.push(answer??);
    }
    Ok(Round {
        seconds: began.elapsed().as_secs_f64(),
        cpu_seconds: used() - before,
        generated: answers.iter().map(|answer| answer.usage().completion_tokens).sum(),
        ttft_ms: answers.iter().map(bed::Answer::ttft_ms).collect(),
        gaps_ms: answers.iter().flat_map(bed::Answer::gaps_ms).collect(),
        peak_rss_bytes: peak_rss_bytes(),
        memory: bed.memory()?,
    })
}

fn row(streams: usize, rounds: &[Round]) -> Row {
    let runs = |of: &dyn Fn(&Round) -> f64| Runs::of(rounds.iter().map(of).collect());
    Row {
        streams,
        tokens_per_second: runs(&|round| f64::from(round.generated) / round.seconds),
        ttft_p50_ms: runs(&|round| percentile(&round.ttft_ms, 0.5)),
        ttft_p99_ms: runs(&|round| percentile(&round.ttft_ms, 0.99)),
        gap_p50_ms: runs(&|round| percentile(&round.gaps_ms, 0.5)),
        gap_p99_ms: runs(&|round| percentile(&round.gaps_ms, 0.99)),
        cpu_seconds_per_token: runs(&|round| round.cpu_seconds / f64::from(round.generated)),
        peak_rss_bytes: rounds.iter().map(|round| round.peak_rss_bytes).max().unwrap_or(0),
        memory: Memory::highest(rounds.iter().map(|round| round.memory)),
        runs: rounds.len(),
    }
}

/// Tokens of streams that have no end of their own, as they arrive.
struct Running {
    /// Dropping them hangs up.
    streams: JoinSet<anyhow::Result<()>>,
    arriving: mpsc::Receiver<(usize, Instant)>,
    seen: Vec<Vec<Instant>>,
}

impl Running {
    fn start(stand: &Stand, chunks: &[String], longest: u32) -> Self {
        let (arrived, arriving) = mpsc::channel(1024);
        let mut streams = JoinSet::new();
        for (index, chunk) in chunks.iter().enumerate() {
            let (mut client, arrived) = (stand.client.clone(), arrived.clone());
            let request = stream(chunk, longest);
            streams.spawn(async move {
                let mut events = client.generate(request).await?.into_inner();
                while let Some(event) = events.message().await? {
                    if let Some(Event::Token(_)) = event.event {
                        arrived.send((index, Instant::now())).await?;
                    }
                }
                Ok(())
            });
        }
        Self { streams, arriving, seen: chunks.iter().map(|_| Vec::new()).collect() }
    }

    /// Waits for the next token, of whichever stream. None may end by itself: what is measured is all of them.
    async fn next(&mut self) -> anyhow::Result<()> {
        let next = async {
            tokio::select! {
                Some(ended) = self.streams.join_next() => {
                    ended??;
                    anyhow::bail!("a stream has ended before it was cut off: its answer was complete");
                }
                Some(arrived) = self.arriving.recv() => Ok(arrived),
                else => anyhow::bail!("there are no streams"),
            }
        };
        let (index, at) = tokio::time::timeout(SILENCE, next).await.context("the streams fell silent")??;
        self.seen[index].push(at);
        Ok(())
    }

    /// Waits until every stream has so many tokens.
    async fn each(&mut self, tokens: usize) -> anyhow::Result<()> {
        while self.seen.iter().any(|seen| seen.len() < tokens) {
            self.next().await?;
        }
        Ok(())
    }

    /// Forgets what came, but each stream's last token.
    fn forget(&mut self) {
        self.seen.iter_mut().for_each(|seen| drop(seen.drain(..seen.len().saturating_sub(1))));
    }

    fn gaps(&self) -> Gaps {
        let gaps: Vec<f64> = self.seen.iter().flat_map(|seen| bed::gaps_ms(seen)).collect();
        let [p50_ms, p99_ms, most_ms] = [0.5, 0.99, 1.0].map(|share| percentile(&gaps, share));
        Gaps { count: gaps.len(), p50_ms, p99_ms, most_ms }
    }
}

/// Pages in use once they are no more than `pages`, and the milliseconds that took; `None`: not in time.
async fn settled(pages: f64) -> anyhow::Result<(f64, Option<f64>)> {
    let begun = Instant::now();
    loop {
        let (used, waited) = (pages_used()?, begun.elapsed());
        if used <= pages || waited > FREED {
            return Ok((used, (used <= pages).then_some(waited.as_secs_f64() * 1e3)));
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Lets a full prefill join streams that are being written, then hangs up on all of them.
async fn join(
    arguments: &Arguments,
    bed: &Bed,
    stand: &mut Stand,
    chunks: &[String],
) -> anyhow::Result<Join> {
    let each = arguments.tokens.min(arguments.join_tokens).max(1);
    let long = bed.texts((arguments.join_tokens / each).max(1), each, 1)?;
    let longest =
        (bed.config.max_positions.saturating_sub(2 * arguments.tokens).max(1)).min(ENDLESS as usize) as u32;
    // An answer's last token is there a moment before its pages are free: they are not what these streams hold.
    let pages_before = settled(0.0).await?.0;
    reset_peak_rss();
    let mut running = Running::start(stand, chunks, longest);
    // A stream's first gap may hold the prefill of another one: it does not count.
    for tokens in [1, 2] {
        running.each(tokens).await?;
        running.forget();
    }
    let enough = 1 + arguments.answer as usize;
    running.each(enough).await?;
    let without = running.gaps();
    running.forget();
    let pages_during = pages_used()?;
    let mut client = stand.client.clone();
    let joining = ask(&mut client, request(long, QUESTION, "full", 1));
    tokio::pin!(joining);
    let joined = loop {
        tokio::select! {
            joined = &mut joining => break joined?,
            next = running.next() => next?,
        }
    };
    let with = running.gaps();
    let (peak_rss_bytes, memory) = (peak_rss_bytes(), bed.memory()?);
    drop(running);
    let (pages_after, freed_ms) = settled(pages_before).await?;
    Ok(Join {
        streams: chunks.len(),
        tokens: joined.usage().prompt_tokens,
        without,
        with,
        ttft_ms: joined.ttft_ms(),
        pages_before,
        pages_during,
        pages_after,
        freed_ms,
        kv_bytes: pages_during as u64 * page_bytes(&bed.config),
        peak_rss_bytes,
        memory,
    })
}

/// f32 keys and values of all layers in one page.
fn page_bytes(config: &Config) -> u64 {
    // The tokens of a page, as many as need no second one.
    let tokens = (1..).take_while(|&tokens| pages_for(tokens) == 1).count();
    (2 * tokens * config.layers * config.kv_heads * config.head_dim * size_of::<f32>()) as u64
}

/// Pages that the worker says are in use; it shares this process.
fn pages_used() -> anyhow::Result<f64> {
    reported("cacheclip_worker_pages_used")
}

impl Report {
    fn print(&self) {
        let Self { shape, prompt_tokens, answer_tokens, idle_rss_bytes, .. } = self;
        let (machine, idle) = (self.machine.text(), *idle_rss_bytes as f64 / 1e6);
        text::line(format_args!(
            "{machine}; {shape}, prompts of {prompt_tokens} tokens, answers of {answer_tokens}; {idle:.0} MB when idle"
        ));
        let cells = |row: &Row| {
            vec![
                row.streams.to_string(),
                row.tokens_per_second.text(1),
                row.ttft_p50_ms.text(0),
                row.ttft_p99_ms.text(0),
                row.gap_p50_ms.text(1),
                row.gap_p99_ms.text(1),
                row.cpu_seconds_per_token.text(3),
                format!("{:.0}", row.peak_rss_bytes as f64 / 1e6),
                Memory::cell(row.memory.as_ref()),
            ]
        };
        let header = [
            "streams",
            "tokens/s",
            "first token p50 ms",
            "p99 ms",
            "gap p50 ms",
            "p99 ms",
            "CPU s / token",
            "peak RSS MB",
            "of promised",
        ];
        text::table(&header, &self.rows.iter().map(cells).collect::<Vec<_>>());
        let Some(join) = &self.join else { return };
        let Join { streams, tokens, without, with, ttft_ms, pages_before, pages_during, pages_after, .. } =
            join;
        for (what, gaps) in [("alone", without), ("with a prefill", with)] {
            let Gaps { count, p50_ms, p99_ms, most_ms } = gaps;
            text::line(format_args!(
                "{streams} streams {what}: {count} gaps, p50 {p50_ms:.1}, p99 {p99_ms:.1}, most {most_ms:.1} ms"
            ));
        }
        text::line(format_args!("the prefill: {tokens} tokens, first token after {ttft_ms:.0} ms"));
        let freed = join.freed_ms.map_or("not in time".into(), |ms| format!("within {ms:.1} ms"));
        text::line(format_args!(
            "pages in use: {pages_before} before, {pages_during} while all run, {pages_after} after hanging up, {freed}"
        ));
    }
}
