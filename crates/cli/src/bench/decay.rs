//! `cacheclip bench decay`: whether reuse wears out.
//!
//! Prompts of chunks from one corpus, no two in the same order. What is stored must not grow, every chunk must be
//! found, the same share must be recomputed, and the time of reuse over that of the full prefills between must stay what
//! it was: full prefill is the clock, because the machine's own speed changes while this runs.

use super::bed::{self, Bed, Cost, QUESTION, Stand};
use super::fit::{Drift, median};
use super::measure::{Machine, Runs};
use super::tuning::Tuning;
use super::{bar, draw};
use crate::demo::compare::request;
use crate::text;
use anyhow::Context as _;
use cacheclip_bench::plot::{Chart, Scale, Series};
use cacheclip_rpc::v1::{GenerateRequest, StatResponse};
use rand::SeedableRng as _;
use serde::Serialize;
use std::collections::HashSet;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Longest wait for the last write-behind to reach the store.
const SETTLING: Duration = Duration::from_secs(60);
/// The store has settled when it has not changed for so long.
const QUIET: Duration = Duration::from_secs(1);

/// Arguments of `bench decay`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    bed: bed::Arguments,
    #[command(flatten)]
    tuning: Tuning,
    /// Prompts, those that are prefilled in full among them.
    #[arg(long, default_value_t = 1000)]
    prompts: usize,
    /// Every so many prompts, one is prefilled in full.
    #[arg(long, default_value_t = 20)]
    every: usize,
    /// Chunks of the corpus.
    #[arg(long, default_value_t = 64)]
    corpus: usize,
    /// Chunks of a prompt.
    #[arg(long, default_value_t = 8)]
    chunks: usize,
    /// Tokens per chunk, about.
    #[arg(long, default_value_t = 128)]
    chunk: usize,
    /// Share of the reused tokens to recompute.
    #[arg(long, default_value_t = 0.1, value_parser = text::share)]
    ratio: f32,
    /// Draw the time ratio over the prompts into this file.
    #[arg(long)]
    svg: Option<PathBuf>,
}

#[derive(Debug, Serialize)]
struct Report {
    machine: Machine,
    shape: String,
    prompts: usize,
    ratio: f32,
    tokens: Runs,
    before: Stored,
    after: Stored,
    /// Chunk tokens that came from the store, of all.
    hit_tokens_share: f64,
    recomputed_tokens: Runs,
    realised_ratio: Runs,
    /// Requests by the rung of their selection: one entry if nothing was degraded.
    rungs: std::collections::BTreeMap<String, usize>,
    ttft_reuse_ms: Runs,
    ttft_full_ms: Runs,
    /// Each full prefill with the median of the reuses after it: prompt, reuse over full in time and in CPU seconds.
    points: Vec<Point>,
    time_ratio_drift: Option<Drift>,
    cpu_ratio_drift: Option<Drift>,
    recomputed_drift: Option<Drift>,
    peak_rss_bytes: Runs,
}

/// What the store holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
struct Stored {
    objects: u64,
    bytes: u64,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct Point {
    prompt: usize,
    time_ratio: f64,
    cpu_ratio: f64,
}

/// A full prefill and the reuses that follow it.
#[derive(Debug)]
struct Block {
    prompt: usize,
    full: Cost,
    reused: Vec<Cost>,
}

pub(crate) async fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    anyhow::ensure!(arguments.every >= 2, "every: at least 2, so that there is reuse between full prefills");
    anyhow::ensure!(arguments.chunks <= arguments.corpus, "chunks: no more than the corpus has");
    let bed = Bed::start(&arguments.bed, false).await?;
    let machine = Machine::here();
    let mut stand = bed.fleet(|options| options.worker.loading = arguments.tuning.loading).await?;
    let corpus = bed.texts(arguments.corpus, arguments.chunk, 0)?;
    stand.ingest(&corpus).await?;
    let mut orders = Orders::new(arguments.corpus, arguments.chunks);
    // Not counted: these touch pages, make connections and store the prefix.
    ask(&bed, &mut stand, &corpus, orders.next()?, None).await?;
    ask(&bed, &mut stand, &corpus, orders.next()?, Some(arguments.ratio)).await?;
    let before = settled(&bed).await?;
    let bar = bar("decay", arguments.prompts as u64)?;
    let mut blocks: Vec<Block> = Vec::new();
    for prompt in 0..arguments.prompts {
        let full = prompt % arguments.every == 0;
        let ratio = (!full).then_some(arguments.ratio);
        let cost = ask(&bed, &mut stand, &corpus, orders.next()?, ratio).await?;
        match blocks.last_mut().filter(|_| !full) {
            Some(block) => block.reused.push(cost),
            None => blocks.push(Block { prompt, full: cost, reused: Vec::new() }),
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    let after = settled(&bed).await?;
    stand.drain().await;
    let report = Report::of(machine, &arguments, (before, after), &blocks);
    if let Some(path) = &arguments.svg {
        draw(&report.chart(), path)?;
    }
    if arguments.bed.common.json {
        return text::json(&report);
    }
    report.print();
    Ok(ExitCode::SUCCESS)
}

/// Asks over the chunks of the corpus in an order; without a ratio, by full prefill.
async fn ask(
    bed: &Bed,
    stand: &mut Stand,
    corpus: &[String],
    order: Vec<usize>,
    ratio: Option<f32>,
) -> anyhow::Result<Cost> {
    let chunks = order.into_iter().map(|index| corpus[index].clone()).collect();
    let policy = if ratio.is_some() { "cacheclip" } else { "full" };
    bed.cost(stand, GenerateRequest { ratio, ..request(chunks, QUESTION, policy, 1) }).await
}

/// What the store holds once it has stopped changing: chunks are written behind the answers.
async fn settled(bed: &Bed) -> anyhow::Result<Stored> {
    let settle = async {
        let mut last = Stored::from(bed.store.stat().await?);
        loop {
            tokio::time::sleep(QUIET).await;
            let now = Stored::from(bed.store.stat().await?);
            if now == last {
                return anyhow::Ok(now);
            }
            last = now;
        }
    };
    tokio::time::timeout(SETTLING, settle).await.context("the store does not stop changing")?
}

impl From<StatResponse> for Stored {
    fn from(stat: StatResponse) -> Self {
        Self { objects: stat.objects, bytes: stat.disk_used_bytes }
    }
}

/// Draws some chunks of a corpus, never twice in the same order.
struct Orders {
    random: rand::rngs::StdRng,
    corpus: usize,
    chunks: usize,
    seen: HashSet<Vec<usize>>,
}

impl Orders {
    /// Draws in a row that may be old ones before a corpus counts as used up.
    const ATTEMPTS: usize = 1000;

    fn new(corpus: usize, chunks: usize) -> Self {
        Self { random: rand::rngs::StdRng::seed_from_u64(11), corpus, chunks, seen: HashSet::new() }
    }

    fn next(&mut self) -> anyhow::Result<Vec<usize>> {
        for _ in 0..Self::ATTEMPTS {
            let order = rand::seq::index::sample(&mut self.random, self.corpus, self.chunks).into_vec();
            if self.seen.insert(order.clone()) {
                return Ok(order);
            }
        }
        anyhow::bail!("corpus: {} chunks, {} at a time, have too few orders", self.corpus, self.chunks)
    }
}

impl Report {
    fn of(machine: Machine, arguments: &Arguments, stored: (Stored, Stored), blocks: &[Block]) -> Self {
        let reused: Vec<&Cost> = blocks.iter().flat_map(|block| &block.reused).collect();
        let values = |of: &dyn Fn(&Cost) -> f64| reused.iter().map(|cost| of(cost)).collect::<Vec<f64>>();
        let recomputed = values(&|cost| f64::from(cost.answer.usage().recomputed_tokens));
        let mut rungs = std::collections::BTreeMap::new();
        reused.iter().for_each(|cost| *rungs.entry(cost.answer.explain().rung).or_default() += 1);
        let chunks: Vec<_> = reused.iter().flat_map(|cost| cost.answer.explain().chunks).collect();
        let tokens = |hit_only: bool| -> u32 {
            chunks.iter().filter(|chunk| chunk.hit || !hit_only).map(|chunk| chunk.tokens).sum()
        };
        let points: Vec<Point> =
            blocks.iter().filter(|block| !block.reused.is_empty()).map(Block::point).collect();
        let drift = |of: &dyn Fn(&Point) -> f64| Drift::of(&points.iter().map(of).collect::<Vec<_>>());
        Self {
            machine,
            shape: arguments.bed.common.shape.clone(),
            prompts: arguments.prompts,
            ratio: arguments.ratio,
            tokens: Runs::of(values(&|cost| f64::from(cost.answer.usage().prompt_tokens))),
            before: stored.0,
            after: stored.1,
            hit_tokens_share: f64::from(tokens(true)) / f64::from(tokens(false)),
            recomputed_drift: Drift::of(&recomputed),
            recomputed_tokens: Runs::of(recomputed),
            realised_ratio: Runs::of(values(&|cost| f64::from(cost.answer.explain().realised_ratio))),
            rungs,
            ttft_reuse_ms: Runs::of(values(&|cost| cost.answer.ttft_ms())),
            ttft_full_ms: Runs::of(blocks.iter().map(|block| block.full.answer.ttft_ms()).collect()),
            time_ratio_drift: drift(&|point| point.time_ratio),
            cpu_ratio_drift: drift(&|point| point.cpu_ratio),
            points,
            peak_rss_bytes: Runs::of(values(&|cost| cost.peak_rss_bytes as f64)),
        }
    }

    fn chart(&self) -> Chart {
        let series = |name: &str, of: &dyn Fn(&Point) -> f64| Series {
            name: name.into(),
            dots: self.points.iter().map(|point| (point.prompt as f64, of(point))).collect(),
            line: Vec::new(),
        };
        Chart {
            title: format!("Reuse over full prefill, {}, {} prompts", self.shape, self.prompts),
            x: "prompt".into(),
            y: "reuse over full prefill".into(),
            scale: Scale::Linear,
            series: vec![
                series("time to the first token", &|point| point.time_ratio),
                series("CPU seconds", &|point| point.cpu_ratio),
            ],
        }
    }

    fn print(&self) {
        let machine = self.machine.text();
        let Self { shape, prompts, ratio, before, after, hit_tokens_share, .. } = self;
        text::line(format_args!(
            "{machine}; {shape}, {prompts} prompts in orders of their own, {ratio} recomputed"
        ));
        let drift = |drift: &Option<Drift>| drift.as_ref().map_or("too few to say".into(), Drift::text);
        let rows = [
            ("objects in the store", format!("{} before, {} after", before.objects, after.objects)),
            ("bytes in the store", format!("{} before, {} after", before.bytes, after.bytes)),
            ("hit tokens", format!("{:.2} %", hit_tokens_share * 100.0)),
            ("prompt tokens", self.tokens.text(0)),
            ("recomputed tokens", self.recomputed_tokens.text(0)),
            ("realised ratio", self.realised_ratio.text(4)),
            ("rungs", format!("{:?}", self.rungs)),
            ("reuse, ms", self.ttft_reuse_ms.text(0)),
            ("full, ms", self.ttft_full_ms.text(0)),
            ("drift of recomputed tokens", drift(&self.recomputed_drift)),
            ("drift of time over full", drift(&self.time_ratio_drift)),
            ("drift of CPU over full", drift(&self.cpu_ratio_drift)),
        ];
        let rows: Vec<Vec<String>> = rows.map(|(name, value)| vec![name.to_owned(), value]).into();
        text::table(&["", "median [least, most]"], &rows);
    }
}

impl Block {
    fn point(&self) -> Point {
        let ratio = |of: &dyn Fn(&Cost) -> f64| {
            median(&self.reused.iter().map(of).collect::<Vec<f64>>()) / of(&self.full)
        };
        Point {
            prompt: self.prompt,
            time_ratio: ratio(&|cost| cost.answer.ttft_ms()),
            cpu_ratio: ratio(&|cost| cost.cpu_seconds),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_order_is_a_new_one_until_there_are_no_more() {
        let mut orders = Orders::new(3, 2);
        let drawn: HashSet<Vec<usize>> = (0..6).map(|_| orders.next().expect("six orders")).collect();
        assert_eq!(drawn.len(), 6);
        assert!(orders.next().expect_err("used up").to_string().contains("too few orders"));
    }
}
