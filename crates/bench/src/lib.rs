//! Quality and speed: the generated world, the evaluation over it, links of a set speed, peers, charts.

pub mod eval;
pub mod link;
pub mod peers;
pub mod plot;
pub mod runs;
pub mod world;

pub use world::{Corpus, Document, Family, Question};
