//! InfoFlow KV (arXiv 2603.05353): question-to-context attention of late-middle layers under global positions.

use super::{Error, Policy, View};
use crate::eval::scene::{Layers, Reading};
use crate::eval::signals::Signal;

const ATTENTION: Signal = Signal::Question(Reading { layers: Layers::LateMiddle, ..Reading::MEAN }, 0);

/// Late-middle attention.
#[derive(Debug)]
pub(super) struct InfoFlow;

impl Policy for InfoFlow {
    fn name(&self) -> &str {
        "infoflow"
    }
    fn about(&self) -> &str {
        "InfoFlow: attention of the question on the stale cache at 55 to 65 % of the depth"
    }
    fn needs(&self) -> Vec<Signal> {
        vec![ATTENTION]
    }
    fn select(&self, view: &View<'_>, ratio: f32) -> Result<Vec<u32>, Error> {
        Ok(view.top(view.signals.rows(ATTENTION)?, view.budget(ratio)))
    }
}
