//! ProphetKV (arXiv 2602.02579): cached keys as a question sees them that ran as a sequence of its own.

use super::{Error, Policy, View};
use crate::eval::signals::Signal;

/// The independent question, all layers.
#[derive(Debug)]
pub(super) struct ProphetKv;

impl Policy for ProphetKv {
    fn name(&self) -> &str {
        "prophetkv"
    }
    fn about(&self) -> &str {
        "ProphetKV: the independent question against cached keys, mean over heads, tokens and layers"
    }
    fn needs(&self) -> Vec<Signal> {
        vec![Signal::Independent]
    }
    fn select(&self, view: &View<'_>, ratio: f32) -> Result<Vec<u32>, Error> {
        Ok(view.top(view.signals.rows(Signal::Independent)?, view.budget(ratio)))
    }
}
