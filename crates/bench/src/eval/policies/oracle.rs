//! What could be had at a budget by one who knows the answer.

use super::{Error, Policy, View};
use crate::eval::signals::Signal;

const ATTENTION: Signal = Signal::Answer(2);

/// Under full prefill, what the rows that write the right answer look at, closed over what those look at.
#[derive(Debug)]
pub(super) struct Oracle;

impl Policy for Oracle {
    fn name(&self) -> &str {
        "oracle"
    }
    fn about(&self) -> &str {
        "bound: attention of the answer's tokens under full prefill, closed in two rounds"
    }
    fn needs(&self) -> Vec<Signal> {
        vec![ATTENTION]
    }
    fn informed(&self) -> bool {
        true
    }
    fn select(&self, view: &View<'_>, ratio: f32) -> Result<Vec<u32>, Error> {
        Ok(view.top(view.signals.rows(ATTENTION)?, view.budget(ratio)))
    }
}
