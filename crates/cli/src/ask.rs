//! `cacheclip ask`: one question, tokens as they come, then why it cost what it cost.

use crate::text;
use anyhow::Context as _;
use cacheclip::fleet;
use cacheclip_rpc::v1::{Chunk, Explain, GenerateRequest, Sampling, generate_event::Event};
use std::path::PathBuf;
use std::process::ExitCode;

/// Arguments of `ask`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The prompt's tail, after the chunks.
    question: String,
    /// Files that are one chunk each, in the order of the prompt.
    #[arg(long = "chunk", value_name = "FILE")]
    chunks: Vec<PathBuf>,
    /// Gateway to ask.
    #[arg(long, default_value = "http://127.0.0.1:7070")]
    gateway: String,
    /// cacheclip, cacheclip-paper, stale or full.
    #[arg(long, default_value = "cacheclip")]
    policy: String,
    /// Share of the reused tokens to recompute, 0 to 1.
    #[arg(long, value_parser = text::share)]
    ratio: Option<f32>,
    /// Most tokens to generate.
    #[arg(long, default_value_t = 64)]
    max_tokens: u32,
    /// Print the explain record, too.
    #[arg(long)]
    explain: bool,
}

pub(crate) async fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let mut client = fleet::connect(&arguments.gateway).await?;
    let read = |path: &PathBuf| {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Chunk { text: text.trim_end().to_owned(), corpus: String::new() })
    };
    let request = GenerateRequest {
        chunks: arguments.chunks.iter().map(read).collect::<anyhow::Result<_>>()?,
        question: arguments.question,
        policy: arguments.policy,
        ratio: arguments.ratio,
        sampling: Some(Sampling { max_tokens: arguments.max_tokens, ..Default::default() }),
        ..Default::default()
    };
    let mut events = client.generate(request).await?.into_inner();
    while let Some(event) = events.message().await? {
        match event.event {
            Some(Event::Token(token)) => text::piece(&token.text),
            Some(Event::Done(done)) => {
                text::line("");
                if let Some(explain) = done.explain.filter(|_| arguments.explain) {
                    print(&explain);
                }
            }
            _ => {}
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn print(explain: &Explain) {
    text::line(format_args!(
        "policy {} on rung {}, realised ratio {:.3}: rows {} exact, {} repaired, {} stale, {} question; first token {:.1} ms",
        explain.policy,
        explain.rung,
        explain.realised_ratio,
        explain.rows_exact,
        explain.rows_repaired,
        explain.rows_stale,
        explain.rows_question,
        explain.ttft_seconds * 1e3,
    ));
    for chunk in &explain.chunks {
        let how = if chunk.hit { "hit" } else { "miss" };
        let by = if chunk.hit { chunk.tier().label() } else { chunk.reason().label() };
        text::line(format_args!(
            "  chunk {}: {} tokens, {how} ({by}), {} recomputed",
            chunk.index, chunk.tokens, chunk.recomputed
        ));
    }
    for stage in &explain.stages {
        text::line(format_args!("  {:<12} {:>9.2} ms", stage.name, stage.seconds * 1e3));
    }
}
