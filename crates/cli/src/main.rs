//! The `cacheclip` command line: demo, serve, ask, ingest, delete, verify, eval, bench, world.

mod ask;
mod bench;
mod delete;
mod demo;
mod eval;
mod ingest;
mod serve;
mod text;
mod verify;

use cacheclip_service::telemetry;
use clap::{Parser, Subcommand};
use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: cacheclip_service::Allocator = cacheclip_service::Allocator;

/// Answers questions over retrieved chunks whose KV was computed once and is reused in every order.
#[derive(Debug, Parser)]
#[command(name = "cacheclip", version, after_help = "Start with: cacheclip demo")]
struct Arguments {
    /// Log filter, e.g. info or cacheclip=debug. Logs go to standard error.
    #[arg(long, global = true, env = "CACHECLIP_LOG", default_value = "error", value_name = "FILTER")]
    log: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start all four services in this process, ingest a small corpus, and compare full prefill, stale reuse
    /// and CacheClip on 24 questions. Exit code 1 unless reuse keeps the answers.
    Demo(demo::Arguments),
    /// Run all four services in this process until SIGTERM: embedded index, local directory.
    Serve(serve::Arguments),
    /// Ask one question over chunks of text.
    Ask(ask::Arguments),
    /// Precompute the KV of text files, one chunk per paragraph.
    Ingest(ingest::Arguments),
    /// Delete the KV of an ingested document from stores, workers and scorers. Exit code 3 while one of them has not
    /// answered: ask again until it is 0.
    Delete(delete::Arguments),
    /// Check every byte of a store's data directory or bucket, changing nothing. Exit code 0: all containers are good; 1: some
    /// are damaged; 2: something could not be read, and nothing that could be was damaged.
    Verify(verify::Arguments),
    /// Evaluate quality: task families × policies × ratios, as a share of the same model's full prefill.
    Eval(eval::Arguments),
    /// Measure: speed by reuse, and the engine beside PyTorch and llama.cpp.
    #[command(subcommand)]
    Bench(bench::Bench),
    /// Print every metric of every service: names, kinds, labels, meanings.
    Metrics {
        /// As the page docs/metrics.md instead of JSON.
        #[arg(long)]
        markdown: bool,
    },
    /// Print the corpus that `demo --seed` generates, with its questions and answers, as JSON.
    World {
        /// The same seed gives the same corpus.
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Questions to generate.
        #[arg(long, default_value_t = demo::QUESTIONS)]
        questions: usize,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return text::fail(&error.into(), cacheclip_service::FAILED_START),
    };
    let otlp_endpoint = match &arguments.command {
        Command::Serve(serve) => serve.otlp_endpoint.clone(),
        _ => None,
    };
    let telemetry =
        telemetry::TelemetryOptions { filter: arguments.log, otlp_endpoint, ..Default::default() };
    {
        // Spans are sent from this runtime.
        let _entered = runtime.enter();
        if let Err(error) = telemetry::init(&telemetry) {
            return text::fail(&error.into(), cacheclip_service::BAD_CONFIG);
        }
    }
    let result = runtime.block_on(async {
        match arguments.command {
            Command::Demo(arguments) => demo::run(arguments).await,
            Command::Serve(arguments) => serve::run(arguments).await,
            Command::Ask(arguments) => ask::run(arguments).await,
            Command::Ingest(arguments) => ingest::run(arguments).await,
            Command::Delete(arguments) => delete::run(arguments).await,
            Command::Verify(arguments) => Ok(verify::run(&arguments).await),
            Command::Eval(arguments) => eval::run(&arguments),
            Command::Bench(bench) => bench::run(bench).await,
            Command::Metrics { markdown: true } => {
                text::piece(&cacheclip::metrics::page());
                Ok(ExitCode::SUCCESS)
            }
            Command::Metrics { markdown: false } => text::json(&cacheclip::metrics::all()),
            Command::World { seed, questions } => text::json(&cacheclip_bench::world::generate(
                seed,
                demo::DISTRICTS,
                questions,
                &cacheclip_bench::Family::RELIABLE,
            )),
        }
    });
    runtime.block_on(telemetry::flush());
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    match result {
        Ok(code) => code,
        Err(error) => text::fail(&error, cacheclip_service::FAILED_START),
    }
}
