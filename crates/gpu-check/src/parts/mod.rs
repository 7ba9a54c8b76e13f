//! The parts: each in a process of its own, each giving rows as it goes.

pub mod decode;
pub mod device;
pub mod exact;
pub mod kernels;
pub mod overlap;
pub mod prompts;
pub mod times;

use crate::bed::Bed;
use crate::work::Work;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// A part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[value(rename_all = "kebab-case")]
pub enum Part {
    /// What the device is, and what it does at most.
    Device,
    /// Every kernel against the CPU's, with controls.
    Kernels,
    /// Kernels alone, by the device's clock.
    Times,
    /// The certificate, and the tiny model's answers beside the CPU's.
    Exact,
    /// Time to the first token of a 14B shape: full prefill and reuse.
    Prompts14b,
    /// Decoding with a 14B shape.
    Decode,
    /// A 14B shape with copies beside computation and without.
    Overlap,
    /// As `prompts14b`, of a 7B shape.
    Prompts7b,
    /// As `prompts14b`, of a 135M shape.
    Prompts135m,
}

impl Part {
    /// All, the most telling first.
    pub const ALL: [Self; 9] = [
        Self::Device,
        Self::Kernels,
        Self::Times,
        Self::Exact,
        Self::Prompts14b,
        Self::Decode,
        Self::Overlap,
        Self::Prompts7b,
        Self::Prompts135m,
    ];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Device => "device",
            Self::Kernels => "kernels",
            Self::Times => "times",
            Self::Exact => "exact",
            Self::Prompts14b => "prompts14b",
            Self::Decode => "decode",
            Self::Overlap => "overlap",
            Self::Prompts7b => "prompts7b",
            Self::Prompts135m => "prompts135m",
        }
    }

    /// Its share of the time, in parts of whatever all add up to.
    pub fn weight(self) -> f64 {
        match self {
            // Most of it PyTorch takes to start, the first time on a machine.
            Self::Device => 30.0,
            Self::Kernels => 60.0,
            Self::Times => 75.0,
            Self::Exact => 40.0,
            Self::Prompts14b => 160.0,
            Self::Decode => 50.0,
            Self::Overlap => 50.0,
            Self::Prompts7b => 60.0,
            Self::Prompts135m => 30.0,
        }
    }
}

/// Does a part that is written for any device; false for one that is not.
///
/// # Errors
/// No device, no room, a fault.
pub fn run<B: Bed>(part: Part, bed: &B, work: &Work) -> anyhow::Result<bool> {
    match part {
        Part::Exact => exact::run(bed, work)?,
        Part::Prompts14b => prompts::run(bed, work, "qwen2.5-14b", true)?,
        Part::Prompts7b => prompts::run(bed, work, "qwen2.5-7b", false)?,
        Part::Prompts135m => prompts::run(bed, work, "smollm2-135m", false)?,
        Part::Decode => decode::run(bed, work, "qwen2.5-14b")?,
        Part::Overlap => overlap::run(bed, work, "qwen2.5-14b")?,
        Part::Device | Part::Kernels | Part::Times => return Ok(false),
    }
    Ok(true)
}
