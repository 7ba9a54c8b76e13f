//! What a run consists of.

use super::families::Family;
use super::task::Task;
use std::path::PathBuf;

/// A set of families, policies and ratios with a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Suite {
    /// Six families, eight policies, two ratios, 150 tasks each.
    Quick,
    /// Everything, 500 tasks each.
    Full,
}

/// Where tasks come from.
#[derive(Clone, Debug)]
pub enum Source {
    /// Drawn from seeds.
    Families(Vec<Family>),
    /// Given.
    Tasks(Vec<Task>),
}

/// A run.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Name of the suite in the report.
    pub suite: String,
    /// Tasks.
    pub source: Source,
    /// Names of policies.
    pub policies: Vec<String>,
    /// Ratios asked for.
    pub ratios: Vec<f32>,
    /// Tasks per family.
    pub n: usize,
    /// Of tasks, lots and resamples.
    pub seed: u64,
    /// Tasks per family whose signals are compared with full prefill's attention.
    pub agreement: usize,
    /// Where records go; none are kept without.
    pub out: Option<PathBuf>,
    /// Whether to go on with the records that are there.
    pub resume: bool,
    /// Threads, each with a task of its own.
    pub threads: usize,
}

impl Suite {
    /// The suite of a name.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "quick" => Some(Self::Quick),
            "full" => Some(Self::Full),
            _ => None,
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Quick => "quick",
            Self::Full => "full",
        }
    }

    /// Its families.
    pub fn families(self) -> Vec<Family> {
        match self {
            Self::Quick => {
                use Family::{Chunks16, Definition, NiahMultiKey, NiahMultiQuery, Vt1, Vt2};
                vec![NiahMultiKey, NiahMultiQuery, Vt1, Vt2, Definition, Chunks16]
            }
            Self::Full => Family::ALL.to_vec(),
        }
    }

    /// Its policies, of all that there are.
    pub fn policies(self, all: Vec<String>) -> Vec<String> {
        match self {
            Self::Quick => [
                "full",
                "stale",
                "cacheblend",
                "prophetkv",
                "infoflow",
                "question-on-stale",
                "cacheclip",
                "cacheclip+probe",
            ]
            .map(str::to_owned)
            .to_vec(),
            Self::Full => all,
        }
    }

    /// Its ratios.
    pub fn ratios(self) -> Vec<f32> {
        match self {
            Self::Quick => vec![0.1, 0.2],
            Self::Full => vec![0.02, 0.05, 0.1, 0.2],
        }
    }

    /// Its tasks per family.
    pub fn n(self) -> usize {
        match self {
            Self::Quick => 150,
            Self::Full => 500,
        }
    }

    /// Its tasks per family whose signals are compared with full prefill's attention.
    pub fn agreement(self) -> usize {
        match self {
            Self::Quick => 0,
            Self::Full => 100,
        }
    }
}
