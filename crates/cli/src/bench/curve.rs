//! `cacheclip bench curve`: what a first token costs as a function of the prompt's length.

use super::bed::{self, Bed};
use super::fit::Fit;
use super::measure::Machine;
use super::reuse::{self, HEADER, Plan, Row, Variant};
use super::tuning::Tuning;
use super::{bar, draw};
use crate::text;
use cacheclip_bench::plot::{Chart, Scale, Series};
use serde::Serialize;
use std::path::PathBuf;
use std::process::ExitCode;

/// Arguments of `bench curve`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    bed: bed::Arguments,
    #[command(flatten)]
    tuning: Tuning,
    /// Tokens in chunks of the shortest prompt, about; each further one has twice as many.
    #[arg(long, default_value_t = 1024)]
    from: usize,
    /// No prompt has more tokens in chunks.
    #[arg(long, default_value_t = 32_768)]
    to: usize,
    /// Longest prompt that is prefilled in full, too: the time grows with the square.
    #[arg(long, default_value_t = 32_768)]
    full_up_to: usize,
    /// Shares of the reused tokens to recompute.
    #[arg(long, value_delimiter = ',', default_value = "0.2,0.1,0", value_parser = text::share)]
    ratios: Vec<f32>,
    /// Tokens per chunk, about.
    #[arg(long, default_value_t = 512)]
    chunk: usize,
    /// Rounds.
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Draw the curves into this file.
    #[arg(long)]
    svg: Option<PathBuf>,
}

#[derive(Debug, Serialize)]
struct Report {
    machine: Machine,
    shape: String,
    chunk_tokens: usize,
    rows: Vec<Row>,
    curves: Vec<Curve>,
}

/// One way to the first token over all lengths.
#[derive(Debug, Serialize)]
struct Curve {
    /// `None`: full prefill.
    ratio: Option<f32>,
    /// Tokens of the prompt and median milliseconds.
    points: Vec<(f64, f64)>,
    fit: Option<Fit>,
}

pub(crate) async fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    anyhow::ensure!(
        arguments.from > 0 && arguments.from <= arguments.to,
        "from: between 1 and {}",
        arguments.to
    );
    let common = &arguments.bed.common;
    let bed = Bed::start(&arguments.bed, false).await?;
    let machine = Machine::here();
    let mut stands = vec![bed.fleet(|options| options.worker.loading = arguments.tuning.loading).await?];
    let lengths: Vec<usize> = std::iter::successors(Some(arguments.from), |length| Some(length * 2))
        .take_while(|&length| length <= arguments.to)
        .collect();
    let plan = |length: usize| Plan {
        variants: vec![Variant { link: None, stand: 0, pipeline: true }],
        ratios: arguments.ratios.clone(),
        runs: arguments.runs,
        full: length <= arguments.full_up_to,
    };
    let each = arguments.chunk.min(arguments.from);
    let chunks = bed.texts(lengths.iter().max().copied().unwrap_or(0) / each, each, 0)?;
    stands[0].ingest(&chunks).await?;
    let bar = bar("curve", lengths.iter().map(|&length| plan(length).requests()).sum())?;
    let mut rows = Vec::new();
    for &length in &lengths {
        let chunks = chunks[..length / each].to_vec();
        rows.extend(reuse::measure(&bed, &mut stands, &plan(length), chunks, &bar).await?);
    }
    bar.finish_and_clear();
    for stand in stands {
        stand.drain().await;
    }
    let report = Report {
        machine,
        shape: common.shape.clone(),
        chunk_tokens: each,
        curves: curves(&arguments.ratios, &rows),
        rows,
    };
    if let Some(path) = &arguments.svg {
        draw(&report.chart(), path)?;
    }
    if common.json {
        return text::json(&report);
    }
    report.print(arguments.runs);
    Ok(ExitCode::SUCCESS)
}

fn curves(ratios: &[f32], rows: &[Row]) -> Vec<Curve> {
    let curve = |ratio: Option<f32>| {
        // Full prefill stands in the rows of every ratio.
        let of_ratio = rows.iter().filter(|row| Some(row.ratio) == ratio.or(ratios.first().copied()));
        let cost = |row: &Row| match ratio {
            Some(_) => Some(row.ttft_reuse_ms.median),
            None => row.ttft_full_ms.as_ref().map(|runs| runs.median),
        };
        let points: Vec<(f64, f64)> =
            of_ratio.filter_map(|row| Some((f64::from(row.tokens), cost(row)?))).collect();
        Curve { ratio, fit: Fit::of(&points), points }
    };
    std::iter::once(None).chain(ratios.iter().copied().map(Some)).map(curve).collect()
}

impl Curve {
    fn name(&self) -> String {
        self.ratio.map_or("full prefill".into(), |ratio| format!("reuse, {ratio} recomputed"))
    }

    fn series(&self) -> Series {
        let at = |&(tokens, _): &(f64, f64)| Some((tokens, self.fit.as_ref()?.at(tokens)));
        Series {
            name: self.name(),
            dots: self.points.clone(),
            line: self.points.iter().filter_map(at).collect(),
        }
    }
}

impl Report {
    fn chart(&self) -> Chart {
        Chart {
            title: format!("First token, {}, {} threads", self.shape, self.machine.threads),
            x: "prompt, tokens".into(),
            y: "milliseconds (dots: median, lines: fit)".into(),
            scale: Scale::Logarithmic,
            series: self.curves.iter().map(Curve::series).collect(),
        }
    }

    fn print(&self, runs: usize) {
        text::line(format_args!(
            "{}; {}, chunks of {} tokens; median [least, most] of {runs} rounds",
            self.machine.text(),
            self.shape,
            self.chunk_tokens
        ));
        text::table(&HEADER, &self.rows.iter().map(Row::cells).collect::<Vec<_>>());
        for curve in &self.curves {
            let fit = curve.fit.as_ref().map_or("not measured".into(), Fit::text);
            text::line(format_args!("{}: {fit}", curve.name()));
        }
    }
}
