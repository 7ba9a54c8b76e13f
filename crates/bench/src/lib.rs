//! Quality and speed: the generated world, the evaluation over it, links of a set speed, charts.

pub mod eval;
pub mod link;
pub mod plot;
pub mod world;

pub use world::{Corpus, Document, Family, Question};
