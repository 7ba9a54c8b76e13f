//! How well signals find what matters: the decisive statements, and what the primary itself looks at in context.

use super::Error;
use super::policies::View;
use super::scene::{Layers, Reading};
use super::signals::Signal;
use cacheclip_model::Reduce;
use cacheclip_plan::fuse;
use serde::{Deserialize, Serialize};

/// What the primary's question looks at under full prefill.
const RIGHT: Signal = Signal::InContext(Reading::MEAN);
/// Offset of the fusion that the report compares: the policy's own.
const OFFSET: f32 = 18.0;

/// One signal on one task, by its best candidate rows alone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Agreement {
    /// The signal.
    pub signal: String,
    /// Share of the decisive candidate rows among the best 10 %; none where there are no such rows.
    pub recall_10: Option<f32>,
    /// Among the best 20 %.
    pub recall_20: Option<f32>,
    /// Share of the best 20 % that is among the 20 % that the question looks at most under full prefill.
    pub overlap_20: f32,
    /// Share of that attention over candidate rows that falls on the best 20 %.
    pub mass_20: f32,
}

/// Signals that are compared, by name; `scorer+probe` beside them.
fn compared() -> Vec<(&'static str, Signal)> {
    let aux = |reading| Signal::Aux(reading, 0);
    vec![
        ("scorer (closed)", Signal::Aux(Reading::MAX, 2)),
        ("scorer without closure", aux(Reading::MAX)),
        ("aux, mean over heads", aux(Reading { heads: Reduce::Mean, ..Reading::MAX })),
        ("aux, mean over question tokens", aux(Reading { rows: Reduce::Mean, ..Reading::MAX })),
        ("aux, mean over both", aux(Reading::MEAN)),
        ("aux, upper half", aux(Reading { layers: Layers::Deep, ..Reading::MAX })),
        ("aux, last layer", aux(Reading { layers: Layers::Last, ..Reading::MAX })),
        ("aux, last question token", aux(Reading { last_row: true, ..Reading::MAX })),
        ("aux per chunk (published)", Signal::AuxPerChunk),
        ("probe", Signal::Question(Reading::MAX, 0)),
        ("probe (closed)", Signal::Question(Reading::MAX, 2)),
        ("probe, mean over both", Signal::Question(Reading::MEAN, 0)),
        ("static rank", Signal::StaticRank),
    ]
}

/// What must be measured.
pub(super) fn needs() -> Vec<Signal> {
    compared().into_iter().map(|(_, signal)| signal).chain([RIGHT]).collect()
}

/// Compares all signals on one task.
///
/// # Errors
/// A signal that was not measured.
pub(super) fn compare(view: &View<'_>) -> Result<Vec<Agreement>, Error> {
    let signals = view.signals;
    let right = signals.rows(RIGHT)?;
    let fused = fuse(
        &[signals.rows(Signal::Aux(Reading::MAX, 2))?, signals.rows(Signal::Question(Reading::MAX, 0))?],
        OFFSET,
    );
    let mut all = vec![of(view, "scorer+probe", &fused, right)];
    for (name, signal) in compared() {
        all.push(of(view, name, signals.rows(signal)?, right));
    }
    Ok(all)
}

fn of(view: &View<'_>, signal: &str, scores: &[f32], right: &[f32]) -> Agreement {
    let base = view.assembly.reused().start as u32;
    let tenth = view.top(scores, view.budget(0.1));
    let fifth = view.top(scores, view.budget(0.2));
    let candidates = view.top(scores, usize::MAX);
    let decisive: Vec<u32> =
        view.prepared.decisive.iter().copied().filter(|row| candidates.binary_search(row).is_ok()).collect();
    let recall = |best: &[u32]| {
        let found = decisive.iter().filter(|row| best.binary_search(row).is_ok()).count();
        (!decisive.is_empty()).then(|| found as f32 / decisive.len() as f32)
    };
    let seen = view.top(right, fifth.len());
    let shared = fifth.iter().filter(|row| seen.binary_search(row).is_ok()).count();
    let mass = |rows: &[u32]| rows.iter().map(|row| right[(row - base) as usize]).sum::<f32>();
    Agreement {
        signal: signal.to_owned(),
        recall_10: recall(&tenth),
        recall_20: recall(&fifth),
        overlap_20: shared as f32 / fifth.len().max(1) as f32,
        mass_20: mass(&fifth) / mass(&candidates).max(f32::MIN_POSITIVE),
    }
}
