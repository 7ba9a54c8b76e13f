//! `cacheclip bench speed`: time to the first token by reuse beside full prefill of the same prompt.
//!
//! Everything a request costs is counted, as its caller sees it: tokenising, lookup, scoring with an auxiliary model of
//! 30M parameters, transfer from a cache-store in a process of its own, verification, decoding, rotation, repair,
//! question. The worker keeps no chunks in RAM, and every round has its chunks in another order.

use super::bar;
use super::bed::{self, Bed};
use super::measure::Machine;
use super::reuse::{self, HEADER, Plan, Row, Variant};
use super::tuning::{Tuning, on_off};
use crate::text;
use cacheclip::fleet::Options;
use cacheclip_gpu_worker::Loading;
use serde::Serialize;
use std::process::ExitCode;

/// Arguments of `bench speed`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    bed: bed::Arguments,
    #[command(flatten)]
    tuning: Tuning,
    /// Tokens in chunks, about.
    #[arg(long, value_delimiter = ',', default_value = "1024,2048,4096")]
    tokens: Vec<usize>,
    /// Shares of the reused tokens to recompute.
    #[arg(long, value_delimiter = ',', default_value = "0.2,0.1,0", value_parser = text::share)]
    ratios: Vec<f32>,
    /// Tokens per chunk, about; a shorter prompt is one chunk.
    #[arg(long, default_value_t = 512)]
    chunk: usize,
    /// Rounds.
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Put the store behind a link of so many millions of bytes per second, each in turn.
    #[arg(long, value_delimiter = ',')]
    link_mb_per_s: Vec<f64>,
    /// Compute a layer while the next one is loaded: on, off, or both in turns.
    #[arg(long, value_delimiter = ',', default_value = "on", value_parser = on_off)]
    pipeline: Vec<bool>,
}

#[derive(Debug, Serialize)]
struct Report {
    machine: Machine,
    shape: String,
    chunk_tokens: usize,
    loading: Loading,
    rows: Vec<Row>,
    break_even: Vec<BreakEven>,
    /// The highest of the rows.
    peak_rss_bytes: u64,
}

/// The shortest prompt measured that reuse answers sooner than full prefill.
#[derive(Debug, Serialize)]
struct BreakEven {
    ratio: f32,
    link_mb_per_s: Option<f64>,
    pipeline: bool,
    /// `None`: none of those measured.
    tokens: Option<u32>,
}

pub(crate) async fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let common = &arguments.bed.common;
    let bed = Bed::start(&arguments.bed, !arguments.link_mb_per_s.is_empty()).await?;
    let machine = Machine::here();
    let mut stands = Vec::new();
    for &on in &arguments.pipeline {
        let tune = |options: &mut Options| {
            (options.worker.pipeline, options.worker.loading) = (on, arguments.tuning.loading);
        };
        stands.push(bed.fleet(tune).await?);
    }
    let plan = Plan {
        variants: variants(&arguments),
        ratios: arguments.ratios.clone(),
        runs: arguments.runs,
        full: true,
    };
    let bar = bar("speed", plan.requests() * arguments.tokens.len() as u64)?;
    let mut rows = Vec::new();
    for (seed, &tokens) in arguments.tokens.iter().enumerate() {
        let each = arguments.chunk.min(tokens).max(1);
        let chunks = bed.texts((tokens / each).max(1), each, seed as u64)?;
        stands[0].ingest(&chunks).await?;
        rows.extend(reuse::measure(&bed, &mut stands, &plan, chunks, &bar).await?);
    }
    bar.finish_and_clear();
    for stand in stands {
        stand.drain().await;
    }
    let report = Report {
        machine,
        shape: common.shape.clone(),
        chunk_tokens: arguments.chunk,
        loading: arguments.tuning.loading,
        break_even: break_even(&plan, &rows),
        peak_rss_bytes: rows.iter().map(|row| row.peak_rss_bytes).max().unwrap_or(0),
        rows,
    };
    if common.json {
        return text::json(&report);
    }
    report.print(arguments.runs);
    Ok(ExitCode::SUCCESS)
}

/// Every link with every fleet.
fn variants(arguments: &Arguments) -> Vec<Variant> {
    let links: Vec<Option<f64>> = match &arguments.link_mb_per_s[..] {
        [] => vec![None],
        rates => rates.iter().copied().map(Some).collect(),
    };
    let fleets = arguments.pipeline.iter().enumerate();
    let with = |link| fleets.clone().map(move |(stand, &pipeline)| Variant { link, stand, pipeline });
    links.into_iter().flat_map(with).collect()
}

fn break_even(plan: &Plan, rows: &[Row]) -> Vec<BreakEven> {
    let cells =
        plan.variants.iter().flat_map(|variant| plan.ratios.iter().map(move |&ratio| (variant, ratio)));
    let of = |(variant, ratio): (&Variant, f32)| {
        let same = |row: &&Row| {
            row.ratio == ratio && row.link_mb_per_s == variant.link && row.pipeline == variant.pipeline
        };
        let faster = |row: &&Row| row.speedup.as_ref().is_some_and(|speedup| speedup.median > 1.0);
        let tokens = rows.iter().filter(same).filter(faster).map(|row| row.tokens).min();
        BreakEven { ratio, link_mb_per_s: variant.link, pipeline: variant.pipeline, tokens }
    };
    cells.map(of).collect()
}

impl Report {
    fn print(&self, runs: usize) {
        text::line(format_args!(
            "{}; {}, random weights, chunks of {} tokens; median [least, most] of {runs} rounds",
            self.machine.text(),
            self.shape,
            self.chunk_tokens
        ));
        text::table(&HEADER, &self.rows.iter().map(Row::cells).collect::<Vec<_>>());
        for row in &self.rows {
            let stages: Vec<String> =
                row.stages_ms.iter().map(|(name, ms)| format!("{name} {ms:.1}")).collect();
            let (tokens, ratio, variant) = (row.tokens, row.ratio, row.variant());
            text::line(format_args!("{tokens} at {ratio:.2} {variant}, ms: {}", stages.join(", ")));
        }
        for even in &self.break_even {
            let tokens =
                even.tokens.map_or("none of these lengths".into(), |tokens| format!("{tokens} tokens"));
            let (ratio, variant) = (even.ratio, reuse::variant(even.link_mb_per_s, even.pipeline));
            text::line(format_args!("reuse at {ratio:.2} {variant} is ahead from {tokens} on"));
        }
    }
}
