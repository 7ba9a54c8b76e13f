//! `cacheclip bench`: how fast, beside whom, and where the time goes.

mod alone;
mod batch;
mod bed;
mod codec;
mod curve;
mod decay;
mod fit;
mod limits;
mod load;
mod measure;
mod memory;
mod peers;
mod process;
mod reuse;
mod scorer;
mod speed;
mod store;
mod tuning;
mod work;

use anyhow::Context as _;
use cacheclip_bench::plot::{Bars, Chart};
use clap::Subcommand;
use indicatif::{ProgressBar, ProgressStyle};
use std::path::Path;
use std::process::ExitCode;

/// What is measured.
#[derive(Debug, Subcommand)]
pub(crate) enum Bench {
    /// The engine's prefill and decoding beside PyTorch and llama.cpp, in turns, on random weights of a true shape.
    Peers(peers::Arguments),
    /// Time to the first token by reuse and by full prefill of the same prompt, everything counted: gateway, scorer,
    /// a cache-store in a process of its own, worker.
    Speed(speed::Arguments),
    /// The same as a function of the prompt's length, with its linear and quadratic parts.
    Curve(curve::Arguments),
    /// Whether reuse wears out: many prompts over one corpus, no two in the same order, beside full prefills.
    Decay(decay::Arguments),
    /// Many requests at once over a slow link to the store: load each chunk, compute it, or choose.
    Load(load::Arguments),
    /// The scorer's joint pass over cached auxiliary KV, beside plain weight products of the same machine.
    Scorer(scorer::Arguments),
    /// Many answers at once: throughput, what a long prefill does to running answers, what callers who leave free.
    Batch(batch::Arguments),
    /// The store beside Redis, a raw socket and plain files: gets, durable puts, cold reads, lookups, slow readers,
    /// starts.
    Store(store::Arguments),
    /// Ways to store KV: how small each makes it, and how fast.
    Codec(codec::Arguments),
}

pub(crate) async fn run(bench: Bench) -> anyhow::Result<ExitCode> {
    match bench {
        // Nothing of it is asynchronous, and it takes minutes.
        Bench::Peers(arguments) => tokio::task::spawn_blocking(move || peers::run(&arguments)).await?,
        Bench::Speed(arguments) => speed::run(arguments).await,
        Bench::Curve(arguments) => curve::run(arguments).await,
        Bench::Decay(arguments) => decay::run(arguments).await,
        Bench::Load(arguments) => load::run(arguments).await,
        Bench::Scorer(arguments) => tokio::task::spawn_blocking(move || scorer::run(&arguments)).await?,
        Bench::Batch(arguments) => batch::run(arguments).await,
        Bench::Store(arguments) => store::run(arguments).await,
        // Nothing of it is asynchronous.
        Bench::Codec(arguments) => tokio::task::spawn_blocking(move || codec::run(&arguments)).await?,
    }
}

/// Progress on standard error.
fn bar(label: &'static str, length: u64) -> anyhow::Result<ProgressBar> {
    let bar = ProgressBar::new(length);
    let style = ProgressStyle::with_template("{prefix} [{bar:40}] {pos}/{len} {msg}")?;
    bar.set_style(style.progress_chars("=> "));
    bar.set_prefix(label);
    Ok(bar)
}

/// Writes a chart.
fn draw(chart: &Chart, path: &Path) -> anyhow::Result<()> {
    write(path, &chart.svg()?)
}

/// Writes bars.
fn draw_bars(bars: &Bars, path: &Path) -> anyhow::Result<()> {
    write(path, &bars.svg()?)
}

fn write(path: &Path, svg: &str) -> anyhow::Result<()> {
    std::fs::write(path, svg).with_context(|| format!("cannot write {}", path.display()))
}
