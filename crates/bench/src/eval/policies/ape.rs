//! APE (arXiv 2502.05431): chunks side by side behind a shared prefix, nothing recomputed; the question's attention to
//! them is sharpened by a temperature and their log-sum-exp scaled before it is merged with the rest's.
//!
//! Temperature and scale are hyper-parameters of the method. They are fixed here and not searched per model.

use super::{Attention, Error, Policy, View};
use crate::eval::reference::Reshape;

const TEMPERATURE: f32 = 0.9;
const SCALE: f32 = 0.9;

/// Parallel positions, reshaped attention.
#[derive(Debug)]
pub(super) struct Ape;

impl Policy for Ape {
    fn name(&self) -> &str {
        "ape"
    }
    fn about(&self) -> &str {
        "APE: parallel chunks behind a shared prefix, attention temperature and scaling, no recompute"
    }
    fn attention(&self) -> Attention {
        Attention::Parallel(Reshape { temperature: TEMPERATURE, scale: SCALE })
    }
    fn budgeted(&self) -> bool {
        false
    }
    fn select(&self, _: &View<'_>, _: f32) -> Result<Vec<u32>, Error> {
        Ok(Vec::new())
    }
}
