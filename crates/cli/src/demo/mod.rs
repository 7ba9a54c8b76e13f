//! `cacheclip demo`: the whole path in one process, judged by its own output.

pub(crate) mod compare;
mod report;
mod timing;

use crate::{ingest, text};
use cacheclip::fleet::{Fleet, Options};
use cacheclip_bench::{Corpus, Family};
use indicatif::{ProgressBar, ProgressStyle};
use report::{Report, Summary};
use std::path::PathBuf;
use std::process::ExitCode;

/// Questions the demo asks.
pub(crate) const QUESTIONS: usize = 24;
/// Districts of a generated corpus, four reports each.
pub(crate) const DISTRICTS: usize = 6;
/// Corpus and questions that ship with the program.
const SHIPPED: &str = include_str!("../../demo/corpus.json");

/// Arguments of `demo`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Generate a corpus and 24 questions from this seed instead of the shipped ones.
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Print everything as JSON instead of tables.
    #[arg(long)]
    json: bool,
    /// Leave out the timing row on the larger shape.
    #[arg(long)]
    no_timing: bool,
    /// Share of the reused tokens to recompute, 0 to 1.
    #[arg(long, value_parser = text::share)]
    ratio: Option<f32>,
    /// Directory with the models `primary/` and `aux/`.
    #[arg(long, default_value = "models/tiny")]
    models: PathBuf,
}

pub(crate) async fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let corpus: Corpus = match arguments.seed {
        Some(seed) => cacheclip_bench::world::generate(seed, DISTRICTS, QUESTIONS, &Family::RELIABLE),
        None => serde_json::from_str(SHIPPED)?,
    };
    let data = tempfile::tempdir()?;
    if !arguments.json {
        text::line("Starting gateway, cache-store, aux-scorer and gpu-worker in this process …");
    }
    let fleet = Fleet::start(Options::embedded(&arguments.models, &data.path().join("tiny"))).await?;
    let mut client = fleet.client().await?;
    let documents = corpus.documents.iter().map(|d| (d.name.clone(), vec![d.text.clone()])).collect();
    let total = ingest::send(&mut client, documents, "ingest").await?;
    if !arguments.json {
        text::line(format_args!(
            "Ingested {} reports ({} tokens): their KV is computed once, here, and reused below in ever new orders.",
            total.chunks, total.tokens
        ));
    }
    let bar = ProgressBar::new(corpus.questions.len() as u64);
    bar.set_style(ProgressStyle::with_template("questions [{bar:40}] {pos}/{len}")?.progress_chars("=> "));
    let mut questions = Vec::new();
    for question in &corpus.questions {
        questions.push(compare::ask_all_ways(&mut client, &corpus, question, arguments.ratio).await?);
        bar.inc(1);
    }
    bar.finish_and_clear();
    fleet.drain().await;
    let timing_row = if arguments.no_timing {
        None
    } else {
        if !arguments.json {
            text::line("Timing a larger shape (SmolLM2-135M, random weights, 2K tokens) …");
        }
        let mut options = Options::embedded(&arguments.models, &data.path().join("large"));
        options.worker.random_shape = Some("smollm2-135m".into());
        Some(timing::measure(options).await?)
    };
    let summary = Summary::judge(&questions, timing_row.as_ref());
    let report = Report { seed: arguments.seed, questions, timing_row, summary };
    if arguments.json {
        text::json(&report)?;
    } else {
        report.print(&corpus);
    }
    Ok(if report.summary.passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
