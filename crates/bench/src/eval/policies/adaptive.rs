//! A budget per request: the smallest ratio whose auxiliary mass reaches a target.
//!
//! The target that spends a given ratio on average is found on development tasks beforehand, so that the row stands
//! beside the fixed ratio of the same mean budget.

use super::ours::SCORER;
use super::{ADAPTIVE, Error, Policy, View};
use crate::eval::signals::Signal;
use cacheclip_plan::{Policy as Plan, Settings, Signals as PlanSignals, select};

/// Bounds of a request's ratio.
const LEAST: f32 = 0.05;
const MOST: f32 = 0.30;

/// The covered mass that spends `ratio` on average.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Target {
    /// Mean ratio asked for.
    pub ratio: f32,
    /// Share of the auxiliary mass over candidate tokens to cover.
    pub mass: f32,
}

/// Ours at a ratio of the request's own.
#[derive(Debug)]
pub(super) struct Adaptive {
    targets: Vec<Target>,
}

impl Adaptive {
    pub(super) fn new(targets: Vec<Target>) -> Self {
        Self { targets }
    }

    fn target(&self, ratio: f32) -> Option<&Target> {
        self.targets.iter().find(|target| (target.ratio - ratio).abs() < 1e-6)
    }
}

impl Policy for Adaptive {
    fn name(&self) -> &str {
        ADAPTIVE
    }
    fn about(&self) -> &str {
        "ours, with the smallest ratio in 5..30 % whose auxiliary mass reaches a target calibrated to the mean budget"
    }
    fn needs(&self) -> Vec<Signal> {
        vec![SCORER]
    }
    fn takes(&self, ratio: f32) -> bool {
        self.target(ratio).is_some()
    }
    fn ours(&self) -> bool {
        true
    }
    fn ablation(&self) -> bool {
        true
    }
    fn select(&self, view: &View<'_>, ratio: f32) -> Result<Vec<u32>, Error> {
        let target = self.target(ratio).ok_or_else(|| {
            Error::Settings(format!(
                "{ADAPTIVE} has no target for ratio {ratio}: mean budgets are 0.05 to 0.30"
            ))
        })?;
        let base = view.assembly.reused().start;
        let rows = view.signals.rows(SCORER)?;
        let candidates: Vec<f32> = view
            .assembly
            .candidates()
            .flat_map(|(_, at)| &rows[at.start - base..at.end - base])
            .copied()
            .collect();
        let ratio = ratio_for(&candidates, rows.len(), target.mass);
        let scored = Some(view.signals.scored(SCORER)?);
        let signals = PlanSignals { scored, spans: view.spans(), ..PlanSignals::default() };
        Ok(select(view.assembly, &Plan::CacheClip(Settings::default()), Some(ratio), &signals)?.rows)
    }
}

/// Smallest ratio of `reused` rows whose best candidates hold `mass` of all candidates' scores, within the bounds.
fn ratio_for(candidates: &[f32], reused: usize, mass: f32) -> f32 {
    let mut sorted = candidates.to_vec();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let goal = mass * sorted.iter().sum::<f32>();
    let mut covered = 0.0;
    let needed = sorted.iter().take_while(|&&score| {
        let short = covered < goal;
        covered += score;
        short
    });
    (needed.count() as f32 / reused.max(1) as f32).clamp(LEAST, MOST)
}

/// Targets for the mean `ratios` that can be met, from scores of development tasks: `(candidates, reused rows)` each.
pub fn calibrate(samples: &[(Vec<f32>, usize)], ratios: &[f32]) -> Vec<Target> {
    let mean = |mass: f32| {
        samples.iter().map(|(scores, reused)| ratio_for(scores, *reused, mass)).sum::<f32>()
            / samples.len().max(1) as f32
    };
    let within = ratios.iter().copied().filter(|ratio| *ratio > LEAST && *ratio < MOST);
    within
        .map(|ratio| {
            let (mut low, mut high) = (0.0, 1.0);
            for _ in 0..30 {
                let middle = (low + high) / 2.0;
                if mean(middle) < ratio { low = middle } else { high = middle }
            }
            Target { ratio, mass: high }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peaked_scores_take_less_than_flat_ones_and_bounds_hold() {
        let peaked: Vec<f32> = (0..100).map(|i| if i < 10 { 1.0 } else { 0.001 }).collect();
        let (peaked, flat) = (ratio_for(&peaked, 100, 0.9), ratio_for(&[1.0; 100], 100, 0.2));
        assert!((peaked - 0.10).abs() < 0.02 && (flat - 0.20).abs() < 0.02, "{peaked} {flat}");
        assert_eq!(ratio_for(&[1.0; 100], 100, 1.0), MOST);
        assert_eq!(ratio_for(&[1.0; 100], 100, 0.0), LEAST);
    }

    #[test]
    fn a_calibrated_target_spends_the_mean_asked_for() {
        let samples: Vec<(Vec<f32>, usize)> =
            (1..40).map(|n| ((0..200).map(|i| (-(i as f32) / n as f32).exp()).collect(), 220)).collect();
        let [target] = calibrate(&samples, &[0.02, 0.1])[..] else { panic!("one of the two can be met") };
        let mean = samples.iter().map(|(s, n)| ratio_for(s, *n, target.mass)).sum::<f32>() / 39.0;
        assert!((mean - 0.1).abs() < 0.01, "{mean}");
    }
}
