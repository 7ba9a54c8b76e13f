//! One row of timing on a shape where compute, not RPC, is what a request waits for.

use super::compare::{Answer, ask, request};
use super::report::{Stage, TimingRow};
use crate::ingest;
use cacheclip::fleet::{Fleet, Options};
use cacheclip_bench::{Family, world};
use cacheclip_rpc::v1::GenerateRequest;

/// Times full prefill and reuse are measured, in turns.
const ROUNDS: usize = 3;
/// Reports per chunk: chunks of about 130 tokens.
const REPORTS: usize = 2;

/// Full prefill against reuse at the default ratio, 2K tokens, all services involved.
pub(crate) async fn measure(options: Options) -> anyhow::Result<TimingRow> {
    let corpora = [world::generate(11, 4, 1, &Family::ALL), world::generate(12, 4, 1, &Family::ALL)];
    let texts: Vec<&str> = corpora.iter().flat_map(|c| c.documents.iter().map(|d| d.text.as_str())).collect();
    let chunks: Vec<String> = texts.chunks(REPORTS).map(|reports| reports.join(" ")).collect();
    let question = &corpora[0].questions[0].text;
    let fleet = Fleet::start(options).await?;
    let mut client = fleet.client().await?;
    let asked = |policy: &str| request(chunks.clone(), question, policy, 1);

    let cold = GenerateRequest { salt: "cold".into(), ..asked("cacheclip") };
    let cold = ask(&mut client, cold).await?;
    ingest::send(&mut client, vec![("timing".into(), chunks.clone())], "ingest (timing row)").await?;
    let (mut full, mut reuse) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        full.push(ask(&mut client, asked("full")).await?);
        reuse.push(ask(&mut client, asked("cacheclip")).await?);
    }
    fleet.drain().await;
    let (full, reuse) = (middle(full), middle(reuse));
    let explain = reuse.done.explain.clone().unwrap_or_default();
    let usage = reuse.done.usage.unwrap_or_default();
    Ok(TimingRow {
        shape: "SmolLM2-135M, random weights, f32, CPU".into(),
        prompt_tokens: usage.prompt_tokens,
        chunks: chunks.len(),
        rounds: ROUNDS,
        realised_ratio: explain.realised_ratio,
        cold_ms: cold.ttft_ms,
        full_ms: full.ttft_ms,
        reuse_ms: reuse.ttft_ms,
        speedup: full.ttft_ms / reuse.ttft_ms,
        stages: explain
            .stages
            .into_iter()
            .map(|stage| Stage { name: stage.name, ms: stage.seconds * 1e3 })
            .collect(),
    })
}

/// The run with the median time to first token.
fn middle(mut runs: Vec<Answer>) -> Answer {
    runs.sort_by(|a, b| a.ttft_ms.total_cmp(&b.ttft_ms));
    runs.swap_remove(runs.len() / 2)
}
