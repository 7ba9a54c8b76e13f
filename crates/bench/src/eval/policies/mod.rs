//! Selection policies behind one trait: what they need, how they attend, which rows they recompute.

mod a3;
mod adaptive;
mod ape;
mod cacheblend;
mod chain;
mod epic;
mod full;
mod infoflow;
mod oracle;
mod ours;
mod paper;
mod prefix_only;
mod prophetkv;
mod question;
mod random;
mod stale;
mod stale_local;

pub use adaptive::{Target, calibrate};

use super::Error;
use super::prepare::{Anchor, Prepared};
use super::reference::Reshape;
use super::signals::{Signal, Signals};
use cacheclip_chunk::ByteSpan;
use cacheclip_plan::Assembly;

/// How question rows see the cache.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Attention {
    /// Nothing is reused: full prefill.
    InContext,
    /// As the engine computes it: every row at its own position.
    Engine,
    /// Keys at the positions they were computed at, the question at its own.
    LocalPositions,
    /// All chunks side by side behind the prefix, the question behind the longest, attention reshaped.
    Parallel(Reshape),
}

/// What a policy sees of a task.
#[derive(Debug)]
pub struct View<'a> {
    /// The prompt's rows.
    pub assembly: &'a Assembly,
    /// The task.
    pub prepared: &'a Prepared,
    /// What was measured.
    pub signals: &'a Signals,
    /// Of this task and run: for policies that draw lots.
    pub seed: u64,
}

impl View<'_> {
    /// Rows that a ratio pays for.
    pub fn budget(&self, ratio: f32) -> usize {
        (ratio as f64 * self.assembly.reused().len() as f64).round() as usize
    }

    /// Byte spans of each chunk's rows.
    pub fn spans(&self) -> Vec<&[ByteSpan]> {
        self.prepared.sections.chunks.iter().map(|chunk| &chunk.spans[..]).collect()
    }

    /// The `budget` candidate rows with the largest scores, `[reused rows]`; of equals the earlier.
    pub fn top(&self, scores: &[f32], budget: usize) -> Vec<u32> {
        let base = self.assembly.reused().start;
        let mut rows: Vec<usize> = self.assembly.candidates().flat_map(|(_, rows)| rows).collect();
        rows.sort_by(|&a, &b| scores[b - base].total_cmp(&scores[a - base]).then(a.cmp(&b)));
        rows.truncate(budget);
        rows.sort_unstable();
        rows.into_iter().map(|row| row as u32).collect()
    }
}

/// A way to answer from reused KV.
pub trait Policy: Send + Sync + std::fmt::Debug {
    /// Its name in reports.
    fn name(&self) -> &str;
    /// One line for people.
    fn about(&self) -> &str;
    /// What must be measured before it can select.
    fn needs(&self) -> Vec<Signal> {
        Vec::new()
    }
    /// What its chunks are encoded behind.
    fn anchor(&self) -> Anchor {
        Anchor::Layout
    }
    /// How question rows see the cache.
    fn attention(&self) -> Attention {
        Attention::Engine
    }
    /// Whether the ratio changes what it does.
    fn budgeted(&self) -> bool {
        true
    }
    /// Whether it can be asked for this ratio.
    fn takes(&self, _ratio: f32) -> bool {
        true
    }
    /// Whether it is a bound rather than a rival: it knows what no request knows.
    fn informed(&self) -> bool {
        false
    }
    /// Whether it is this project's own.
    fn ours(&self) -> bool {
        false
    }
    /// Whether it is ours with terms exchanged.
    fn ablation(&self) -> bool {
        false
    }
    /// Rows to recompute, ascending, candidates only.
    ///
    /// # Errors
    /// A signal that was not declared, or a ratio that is none.
    fn select(&self, view: &View<'_>, ratio: f32) -> Result<Vec<u32>, Error>;
}

/// Every policy, rivals first, ablations last. `targets` are the adaptive ratio's, calibrated beforehand.
pub fn catalogue(targets: &[Target]) -> Vec<Box<dyn Policy>> {
    let mut all: Vec<Box<dyn Policy>> = vec![
        Box::new(full::Full),
        Box::new(stale::Stale),
        Box::new(stale_local::StaleLocal),
        Box::new(prefix_only::PrefixOnly),
        Box::new(random::Random),
        Box::new(ape::Ape),
        Box::new(epic::Epic),
        Box::new(cacheblend::CacheBlend),
        Box::new(a3::A3),
        Box::new(infoflow::InfoFlow),
        Box::new(prophetkv::ProphetKv),
        Box::new(question::QuestionOnStale::LARGEST),
        Box::new(question::QuestionOnStale::MEAN),
        Box::new(paper::Paper),
        Box::new(oracle::Oracle),
        Box::new(chain::Chain),
    ];
    all.extend(ours::variants().into_iter().map(|policy| Box::new(policy) as Box<dyn Policy>));
    all.push(Box::new(adaptive::Adaptive::new(targets.to_vec())));
    all
}

/// The name of the policy that all others are compared with.
pub const OURS: &str = "cacheclip";
/// The name of full prefill.
pub const FULL: &str = "full";
/// The name of the policy whose budget follows the request.
pub const ADAPTIVE: &str = "cacheclip-adaptive";
