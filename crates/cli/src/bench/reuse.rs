//! Reuse beside full prefill of the same prompt, in turns: what `bench speed` and `bench curve` measure.

use super::bed::{Bed, Cost, QUESTION, Stand};
use super::measure::Runs;
use super::memory::Memory;
use crate::demo::compare::request;
use cacheclip_rpc::v1::{Explain, GenerateRequest};
use indicatif::ProgressBar;
use rand::SeedableRng as _;
use rand::seq::SliceRandom as _;
use serde::Serialize;
use std::collections::BTreeMap;

/// Something to measure in.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Variant {
    /// Millions of bytes per second of the store's link; `None`: no link.
    pub(crate) link: Option<f64>,
    /// Which fleet, by index.
    pub(crate) stand: usize,
    /// Whether that fleet's worker computes a layer while the next one is loaded.
    pub(crate) pipeline: bool,
}

/// What is measured.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) variants: Vec<Variant>,
    pub(crate) ratios: Vec<f32>,
    /// Rounds that count.
    pub(crate) runs: usize,
    /// Whether the prompt is prefilled in full, too.
    pub(crate) full: bool,
}

impl Plan {
    /// Requests that count.
    pub(crate) fn requests(&self) -> u64 {
        (self.runs * (usize::from(self.full) + self.variants.len() * self.ratios.len())) as u64
    }
}

/// One length, ratio and variant.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    /// Of the prompt.
    pub(crate) tokens: u32,
    pub(crate) chunks: usize,
    pub(crate) ratio: f32,
    pub(crate) realised_ratio: f32,
    /// Where the selection came from.
    pub(crate) rung: String,
    pub(crate) link_mb_per_s: Option<f64>,
    pub(crate) pipeline: bool,
    pub(crate) ttft_full_ms: Option<Runs>,
    pub(crate) ttft_reuse_ms: Runs,
    /// Full prefill over reuse, round by round.
    pub(crate) speedup: Option<Runs>,
    /// Median milliseconds of each stage of reuse.
    pub(crate) stages_ms: BTreeMap<String, f64>,
    /// CPU seconds of one request, all processes.
    pub(crate) cpu_seconds_full: Option<Runs>,
    pub(crate) cpu_seconds_reuse: Runs,
    /// Prompt tokens per second.
    pub(crate) full_tokens_per_second: Option<f64>,
    pub(crate) reuse_tokens_per_second: f64,
    /// Chunks that came from the store in the last round, and why the others did not.
    pub(crate) hits: u32,
    pub(crate) misses: BTreeMap<&'static str, u32>,
    /// Highest during a request of reuse: of all services but the store.
    pub(crate) peak_rss_bytes: u64,
    /// Of the request with that peak; `None` where several fleets share the process.
    pub(crate) memory: Option<Memory>,
    pub(crate) runs: usize,
}

/// Measures one prompt, whose chunks come in another order each round. The first round is thrown away: pages are
/// touched and connections made.
pub(crate) async fn measure(
    bed: &Bed,
    stands: &mut [Stand],
    plan: &Plan,
    mut chunks: Vec<String>,
    bar: &ProgressBar,
) -> anyhow::Result<Vec<Row>> {
    let mut random = rand::rngs::StdRng::seed_from_u64(7);
    let mut full = Vec::new();
    let cells =
        plan.variants.iter().flat_map(|&variant| plan.ratios.iter().map(move |&ratio| (variant, ratio)));
    let mut cells: Vec<(Variant, f32, Vec<Cost>)> =
        cells.map(|(variant, ratio)| (variant, ratio, Vec::new())).collect();
    for round in 0..=plan.runs {
        chunks.shuffle(&mut random);
        let asked = |policy: &str| request(chunks.clone(), QUESTION, policy, 1);
        if plan.full {
            let cost = bed.cost(&mut stands[0], asked("full")).await?;
            full.extend((round > 0).then_some(cost));
        }
        for (variant, ratio, costs) in &mut cells {
            bed.shape(variant.link);
            let asked = GenerateRequest { ratio: Some(*ratio), ..asked("cacheclip") };
            let cost = bed.cost(&mut stands[variant.stand], asked).await?;
            costs.extend((round > 0).then_some(cost));
        }
        bar.inc(if round > 0 { plan.requests() / plan.runs as u64 } else { 0 });
    }
    bed.shape(None);
    Ok(cells.into_iter().map(|(variant, ratio, costs)| row(variant, ratio, &full, &costs)).collect())
}

fn row(variant: Variant, ratio: f32, full: &[Cost], reused: &[Cost]) -> Row {
    let runs = |of: &dyn Fn(&Cost) -> f64, costs: &[Cost]| Runs::of(costs.iter().map(of).collect());
    let of_full = |of: &dyn Fn(&Cost) -> f64| (!full.is_empty()).then(|| runs(of, full));
    let mut stages: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for stage in reused.iter().flat_map(|cost| cost.answer.explain().stages) {
        stages.entry(stage.name).or_default().push(stage.seconds * 1e3);
    }
    let ttft = |cost: &Cost| cost.answer.ttft_ms();
    let (ttft_full_ms, ttft_reuse_ms) = (of_full(&ttft), runs(&ttft, reused));
    let tokens = reused.last().map_or(0, |cost| cost.answer.usage().prompt_tokens);
    let last = reused.last().map(|cost| cost.answer.explain()).unwrap_or_default();
    let speedups: Vec<f64> = full.iter().zip(reused).map(|(full, reuse)| ttft(full) / ttft(reuse)).collect();
    let rate = |ms: &Runs| f64::from(tokens) / ms.median * 1e3;
    Row {
        tokens,
        chunks: last.chunks.len(),
        ratio,
        realised_ratio: last.realised_ratio,
        rung: last.rung.clone(),
        link_mb_per_s: variant.link,
        pipeline: variant.pipeline,
        speedup: (!speedups.is_empty()).then(|| Runs::of(speedups)),
        stages_ms: stages.into_iter().map(|(name, values)| (name, Runs::of(values).median)).collect(),
        cpu_seconds_full: of_full(&|cost| cost.cpu_seconds),
        cpu_seconds_reuse: runs(&|cost| cost.cpu_seconds, reused),
        full_tokens_per_second: ttft_full_ms.as_ref().map(rate),
        reuse_tokens_per_second: rate(&ttft_reuse_ms),
        ttft_full_ms,
        ttft_reuse_ms,
        misses: misses(&last),
        hits: last.chunks.iter().filter(|chunk| chunk.hit).count() as u32,
        peak_rss_bytes: reused.iter().map(|cost| cost.peak_rss_bytes).max().unwrap_or(0),
        memory: Memory::highest(reused.iter().map(|cost| cost.memory)),
        runs: reused.len(),
    }
}

fn misses(explain: &Explain) -> BTreeMap<&'static str, u32> {
    let mut misses = BTreeMap::new();
    for chunk in explain.chunks.iter().filter(|chunk| !chunk.hit) {
        *misses.entry(chunk.reason().label()).or_default() += 1;
    }
    misses
}

impl Row {
    pub(crate) fn variant(&self) -> String {
        variant(self.link_mb_per_s, self.pipeline)
    }

    /// What a table shows of it, below [`HEADER`].
    pub(crate) fn cells(&self) -> Vec<String> {
        let text = |runs: &Option<Runs>, digits| runs.as_ref().map_or("-".into(), |runs| runs.text(digits));
        let full_cpu =
            self.cpu_seconds_full.as_ref().map_or("-".into(), |runs| format!("{:.2}", runs.median));
        vec![
            self.tokens.to_string(),
            format!("{:.2}", self.ratio),
            format!("{:.3}", self.realised_ratio),
            self.variant(),
            format!("{}/{}", self.hits, self.chunks),
            text(&self.ttft_full_ms, 0),
            self.ttft_reuse_ms.text(0),
            text(&self.speedup, 2),
            format!("{full_cpu} / {:.2}", self.cpu_seconds_reuse.median),
            format!("{:.0}", self.peak_rss_bytes as f64 / 1e6),
            Memory::cell(self.memory.as_ref()),
        ]
    }
}

/// `25 MB/s, no pipeline`, as far as it is unusual.
pub(crate) fn variant(link_mb_per_s: Option<f64>, pipeline: bool) -> String {
    let link = link_mb_per_s.map(|rate| format!("{rate:.0} MB/s"));
    let pipeline = (!pipeline).then(|| "no pipeline".to_owned());
    link.into_iter().chain(pipeline).collect::<Vec<_>>().join(", ")
}

pub(crate) const HEADER: [&str; 11] = [
    "tokens",
    "ratio",
    "realised",
    "link",
    "hits",
    "full ms",
    "reuse ms",
    "speed-up",
    "CPU s full / reuse",
    "peak RSS MB",
    "of promised",
];
