//! CacheClip as published (arXiv 2510.10129): per-chunk auxiliary scores, windows of eight, five candidates each.

use super::{Error, Policy, View};
use crate::eval::signals::Signal;
use cacheclip_plan::{Policy as Plan, Signals as PlanSignals, select};

/// The published grouping; its realised ratio is as it falls.
#[derive(Debug)]
pub(super) struct Paper;

impl Policy for Paper {
    fn name(&self) -> &str {
        "cacheclip-paper"
    }
    fn about(&self) -> &str {
        "CacheClip as published: per-chunk auxiliary scores, windows of 8 with at least 5 candidates"
    }
    fn needs(&self) -> Vec<Signal> {
        vec![Signal::AuxPerChunk]
    }
    fn select(&self, view: &View<'_>, ratio: f32) -> Result<Vec<u32>, Error> {
        let scored = Some(view.signals.scored(Signal::AuxPerChunk)?);
        let signals = PlanSignals { scored, spans: view.spans(), ..PlanSignals::default() };
        Ok(select(view.assembly, &Plan::Paper, Some(ratio), &signals)?.rows)
    }
}
