//! `cacheclip bench`: how fast, beside whom, and where the time goes.

mod limits;
mod measure;
mod peers;
mod process;
mod speed;

use clap::Subcommand;
use std::process::ExitCode;

/// What is measured.
#[derive(Debug, Subcommand)]
pub(crate) enum Bench {
    /// The engine's prefill and decoding beside PyTorch and llama.cpp, in turns, on random weights of a true shape.
    Peers(peers::Arguments),
    /// Time to the first token by reuse and by full prefill of the same prompt, everything counted: gateway, scorer,
    /// a cache-store in a process of its own, worker.
    Speed(speed::Arguments),
}

pub(crate) async fn run(bench: Bench) -> anyhow::Result<ExitCode> {
    match bench {
        // Nothing of it is asynchronous, and it takes minutes.
        Bench::Peers(arguments) => tokio::task::spawn_blocking(move || peers::run(&arguments)).await?,
        Bench::Speed(arguments) => speed::run(arguments).await,
    }
}
