//! The generated world that demo, tests and evaluation draw their corpora and questions from.

pub mod world;

pub use world::{Corpus, Document, Family, Question};
