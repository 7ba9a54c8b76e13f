//! A3 (arXiv 2511.17560): question-to-document attention of layer 1, averaged over five neighbours.

use super::{Error, Policy, View};
use crate::eval::scene::{Layers, Reading};
use crate::eval::signals::Signal;

const ATTENTION: Signal = Signal::Question(Reading { layers: Layers::One(1), ..Reading::MEAN }, 0);
/// Neighbours on either side.
const POOL: usize = 2;

/// Early attention, pooled.
#[derive(Debug)]
pub(super) struct A3;

impl Policy for A3 {
    fn name(&self) -> &str {
        "a3"
    }
    fn about(&self) -> &str {
        "A3: attention of the question at layer 1, pooled over 5 neighbours"
    }
    fn needs(&self) -> Vec<Signal> {
        vec![ATTENTION]
    }
    fn select(&self, view: &View<'_>, ratio: f32) -> Result<Vec<u32>, Error> {
        let scores = view.signals.rows(ATTENTION)?;
        let pooled: Vec<f32> = (0..scores.len())
            .map(|row| {
                let near = &scores[row.saturating_sub(POOL)..(row + POOL + 1).min(scores.len())];
                near.iter().sum::<f32>() / near.len() as f32
            })
            .collect();
        Ok(view.top(&pooled, view.budget(ratio)))
    }
}
