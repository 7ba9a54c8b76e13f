//! CacheBlend (arXiv 2405.16444), in the form that ships: the tokens whose KV deviates most at one early layer.
//!
//! The layers up to the check are computed for all tokens, which the realised ratio does not count.

use super::{Error, Policy, View};
use crate::eval::signals::Signal;

/// The layer that is compared: what layer 0 adds is the first that stands in a cache.
const CHECK: Signal = Signal::Deviation(1);

/// High-deviation tokens.
#[derive(Debug)]
pub(super) struct CacheBlend;

impl Policy for CacheBlend {
    fn name(&self) -> &str {
        "cacheblend"
    }
    fn about(&self) -> &str {
        "CacheBlend: the tokens whose K and V deviate most at layer 1"
    }
    fn needs(&self) -> Vec<Signal> {
        vec![CHECK]
    }
    fn select(&self, view: &View<'_>, ratio: f32) -> Result<Vec<u32>, Error> {
        Ok(view.top(view.signals.rows(CHECK)?, view.budget(ratio)))
    }
}
