//! The primary's own question run on the assembled, stale cache: no published method, and the rival to beat. Twice,
//! because which reduction serves it best depends on the family.

use super::{Error, Policy, View};
use crate::eval::scene::Reading;
use crate::eval::signals::Signal;

/// The primary's attention over all layers, mean over layers.
#[derive(Debug)]
pub(super) struct QuestionOnStale {
    name: &'static str,
    about: &'static str,
    attention: Signal,
}

impl QuestionOnStale {
    /// The largest over heads and question tokens.
    pub(super) const LARGEST: Self = Self {
        name: "question-on-stale",
        about: "the primary's question on the stale cache, largest over heads and tokens, mean over layers",
        attention: Signal::Question(Reading::MAX, 0),
    };
    /// The mean over both.
    pub(super) const MEAN: Self = Self {
        name: "question-on-stale-mean",
        about: "the primary's question on the stale cache, mean over heads, tokens and layers",
        attention: Signal::Question(Reading::MEAN, 0),
    };
}

impl Policy for QuestionOnStale {
    fn name(&self) -> &str {
        self.name
    }
    fn about(&self) -> &str {
        self.about
    }
    fn needs(&self) -> Vec<Signal> {
        vec![self.attention]
    }
    fn select(&self, view: &View<'_>, ratio: f32) -> Result<Vec<u32>, Error> {
        Ok(view.top(view.signals.rows(self.attention)?, view.budget(ratio)))
    }
}
