//! Exactly the statements that the answer rests on, whatever they cost.

use super::{Error, Policy, View};

/// The generator's own knowledge.
#[derive(Debug)]
pub(super) struct Chain;

impl Policy for Chain {
    fn name(&self) -> &str {
        "chain"
    }
    fn about(&self) -> &str {
        "bound: exactly the statements that the answer rests on"
    }
    fn budgeted(&self) -> bool {
        false
    }
    fn informed(&self) -> bool {
        true
    }
    fn select(&self, view: &View<'_>, _: f32) -> Result<Vec<u32>, Error> {
        let decisive = &view.prepared.decisive;
        if decisive.is_empty() {
            let why = "policy chain needs tasks whose decisive statements are known: those of the generator";
            return Err(Error::Settings(why.into()));
        }
        let candidates = view.assembly.candidates().flat_map(|(_, rows)| rows).map(|row| row as u32);
        Ok(candidates.filter(|row| decisive.binary_search(row).is_ok()).collect())
    }
}
