//! Signals to selection: which rows to recompute. Pure functions.
//!
//! An [`Assembly`] says which rows a prompt has and which of them are reused; [`Signals`] are one number per
//! reused row; a [`Policy`] turns both into a [`Selection`]. Nothing here knows models, networks or clocks.

mod assembly;
mod cacheclip;
mod load;
mod overlap;
mod paper;
mod policy;

pub use assembly::{Assembly, Counts};
pub use cacheclip::{Settings, fuse};
pub use load::{Cost, Server, Way, divide};
pub use overlap::{Scored, scores_of_tokens};
pub use policy::{Error, Policy, Rung, Selection, Signals, choose_rung, select};
