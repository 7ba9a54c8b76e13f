//! Quality: task families × policies × ratios on a pair of models, in this process.
//!
//! ```text
//! task (families, files) ─► prepare: sections, full prefill, canonical KV     once per task
//!                        ─► signals: what any policy needs                    once per task
//!                        ─► policies × ratios: select, recompute, judge       many
//!                        ─► records (JSONL, resumable) ─► report: table, JSON, SVG, HTML
//! ```
//!
//! Every policy answers the same tasks from the same cache, so that all comparisons are paired.

mod agreement;
mod bench;
mod families;
mod files;
mod html;
mod judge;
mod pair;
mod plots;
pub mod policies;
mod prepare;
mod records;
mod reference;
mod report;
mod run;
mod scene;
mod signals;
mod stats;
mod suite;
mod task;
mod writing;

pub use agreement::Agreement;
pub use bench::{Bench, Cell, Outcome, Record};
pub use families::Family;
pub use files::{Format, read_tasks};
pub use html::page;
pub use judge::{Reader, Verdict};
pub use pair::{Desk, Pair, Side};
pub use plots::{by_budget, by_family};
pub use prepare::{Anchor, KvError, Prepared};
pub use reference::{Columns, Reference, Reshape};
pub use report::{Difference, FamilyRow, Report, Row, SignalRow};
pub use run::{Progress, run};
pub use scene::{Layers, Reading, Scene, Sections};
pub use signals::{AuxPrompt, Instruments, Signal, Signals, measure};
pub use stats::{Interval, Resamples};
pub use suite::{Settings, Source, Suite};
pub use task::{Scoring, Task};

use std::path::PathBuf;

/// Why an evaluation cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A directory that holds no model of a supported family, or an instance without a certificate.
    #[error("model {}: {source}", dir.display())]
    Model {
        /// The directory.
        dir: PathBuf,
        /// What is wrong with it.
        source: cacheclip_model::Error,
    },
    /// Weights that the plain decoder cannot read.
    #[error("{}: {why}", path.display())]
    Weights {
        /// File or tensor.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A text that a tokenizer refuses.
    #[error(transparent)]
    Prompt(#[from] cacheclip_prompt::Error),
    /// A ratio or a signal that does not fit.
    #[error(transparent)]
    Plan(#[from] cacheclip_plan::Error),
    /// The device failed.
    #[error(transparent)]
    Compute(#[from] cacheclip_model::Error),
    /// A prompt longer than the model; choose another model or shorter tasks.
    #[error("a prompt of {tokens} tokens does not fit the model's context of {context}")]
    TooLong {
        /// Tokens, the answer's included.
        tokens: usize,
        /// What the model holds.
        context: usize,
    },
    /// A policy reads a signal that it did not declare, or that cannot be measured here.
    #[error("signal {0:?} was not declared by the policy that reads it")]
    Undeclared(Signal),
    /// The command cannot be carried out as given.
    #[error("{0}")]
    Settings(String),
    /// A file that cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A malformed line of a task file or of earlier results.
    #[error("{}:{line}: {field}: {why}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Field of the line's object.
        field: String,
        /// What is wrong with it.
        why: String,
    },
    /// A task that stopped the run.
    #[error("task {family} {index}: {source}")]
    Task {
        /// Its family.
        family: String,
        /// Its number.
        index: usize,
        /// What happened.
        source: Box<Error>,
    },
}
