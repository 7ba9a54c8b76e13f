//! CUDA kernels over paged KV: their text, what they are compiled for, and how they are launched.
//!
//! The text lies in `crates/kernels/cuda`. An [`executor`] launches it on a [`machine`], within a budget of [`memory`].
//! Nothing here needs CUDA but `device`, the machine of the driver, which is behind the feature `cuda`:
//! that NVRTC takes every kernel is tested where NVRTC is, and what the kernels compute is tested on the host, where an
//! emulated warp runs their text (`tests/cuda_emulated.rs`).
//!
//! Kernels are compiled for one model's attention ([`Heads`]), so that the width of a head is a constant to the compiler
//! and sums stay in registers.

mod error;
pub mod executor;
pub mod floor;
pub mod launch;
pub mod machine;
pub mod memory;
pub mod pinned;
pub mod rows;
pub mod timing;

#[cfg(feature = "cuda")]
mod blas;
#[cfg(feature = "cuda")]
pub mod device;
#[cfg(feature = "cuda")]
mod driver;
#[cfg(feature = "cuda")]
#[allow(dead_code, reason = "tests, which have this file as a module of theirs, look at versions and logs")]
mod nvrtc;

pub use error::{DeviceError, code};

use crate::page::HeadShape;
use std::fmt::Write as _;

/// Text that programs include, by the name they include it under.
const HEADERS: [(&str, &str); 3] = [
    ("index.cuh", include_str!("../../cuda/index.cuh")),
    ("number.cuh", include_str!("../../cuda/number.cuh")),
    ("warp.cuh", include_str!("../../cuda/warp.cuh")),
];

/// A program: one file of CUDA text and the kernels in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Program {
    /// Name of the file.
    pub name: &'static str,
    /// Its kernels.
    pub kernels: &'static [&'static str],
    text: &'static str,
}

/// Every program.
pub const PROGRAMS: [Program; 6] = [
    Program {
        name: "place.cu",
        kernels: &[
            "place_f32",
            "place_f16",
            "place_bf16",
            "place_f32_planes",
            "place_f16_planes",
            "place_bf16_planes",
        ],
        text: include_str!("../../cuda/place.cu"),
    },
    Program { name: "scatter.cu", kernels: &["scatter"], text: include_str!("../../cuda/scatter.cu") },
    Program {
        name: "attend_rows.cu",
        kernels: &["attend_rows"],
        text: include_str!("../../cuda/attend_rows.cu"),
    },
    Program { name: "decode.cu", kernels: &["decode", "merge"], text: include_str!("../../cuda/decode.cu") },
    Program {
        name: "probe.cu",
        kernels: &["probe", "probe_reduce"],
        text: include_str!("../../cuda/probe.cu"),
    },
    Program {
        name: "rows.cu",
        kernels: &[
            "gather_rows",
            "norm_rows",
            "norm_heads",
            "add_bias",
            "gate_rows",
            "export_rows",
            "random_weights",
        ],
        text: include_str!("../../cuda/rows.cu"),
    },
];

impl Program {
    /// The program as one text, with each header where it is first included: NVRTC needs no folder to look in, and a
    /// digest of the text is a digest of all that it is made of.
    pub fn text(&self) -> String {
        let mut text = String::new();
        expand(self.text, &mut Vec::new(), &mut text);
        text
    }
}

fn expand(source: &'static str, seen: &mut Vec<&'static str>, into: &mut String) {
    for line in source.lines() {
        let name = line.strip_prefix("#include \"").and_then(|rest| rest.strip_suffix('"'));
        match name.and_then(|name| HEADERS.iter().find(|(header, _)| *header == name)) {
            Some((name, header)) => {
                if !seen.contains(name) {
                    seen.push(name);
                    expand(header, seen, into);
                }
            }
            None if line == "#pragma once" => {}
            // A header of the emulation: the device's compiler never comes to that line.
            None => _ = writeln!(into, "{line}"),
        }
    }
}

/// Oldest compute capability that kernels are compiled for: `cp.async` and bf16 in matrix instructions begin there.
pub const OLDEST: (u32, u32) = (8, 0);

/// A model's attention, for which kernels are compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Heads {
    /// Query heads.
    pub queries: u32,
    /// Heads of keys and values.
    pub kv: u32,
    /// Width of a head.
    pub dim: u32,
}

/// Why there are no kernels for a model or a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unsupported {
    /// Rows of shared tiles must be a power of two of 16-byte chunks, and fit.
    #[error("heads of {0} dimensions: CUDA kernels are for 32, 64 and 128")]
    HeadDim(u32),
    /// Grouped-query attention needs whole groups.
    #[error("{queries} query heads do not share {kv} KV heads evenly")]
    Groups {
        /// Query heads.
        queries: u32,
        /// KV heads.
        kv: u32,
    },
    /// Rows are read in chunks of 16 bytes.
    #[error("rows of {0} elements: CUDA kernels are for multiples of 8")]
    Width(u32),
    /// Too old a device.
    #[error("a device of compute capability {0}.{1}: CUDA kernels need 8.0")]
    Capability(u32, u32),
}

impl Heads {
    /// What kernels can be compiled for.
    ///
    /// # Errors
    /// There are no kernels for such heads.
    pub fn checked(self) -> Result<Self, Unsupported> {
        if ![32, 64, 128].contains(&self.dim) {
            return Err(Unsupported::HeadDim(self.dim));
        }
        if self.kv == 0 || self.queries == 0 || !self.queries.is_multiple_of(self.kv) {
            return Err(Unsupported::Groups { queries: self.queries, kv: self.kv });
        }
        Ok(self)
    }

    /// Query heads to a KV head.
    pub fn group(&self) -> u32 {
        self.queries / self.kv
    }

    /// Elements of a projected row: queries, keys, values.
    pub fn row(&self) -> u32 {
        (self.queries + 2 * self.kv) * self.dim
    }

    /// Shape of a page: as the CPU's, with K `[16, head_dim]` inside its tile.
    pub fn shape(&self) -> HeadShape {
        HeadShape { kv_heads: self.kv as usize, head_dim: self.dim as usize }
    }

    /// Factor of scores: attention's `1/√head_dim`, in powers of two.
    pub fn scale(&self) -> f32 {
        std::f32::consts::LOG2_E / (self.dim as f32).sqrt()
    }

    /// Options for NVRTC.
    ///
    /// # Errors
    /// The device is too old.
    pub fn options(&self, capability: (u32, u32)) -> Result<Vec<String>, Unsupported> {
        let (major, minor) = capability;
        if capability < OLDEST {
            return Err(Unsupported::Capability(major, minor));
        }
        Ok(vec![
            format!("--gpu-architecture=sm_{major}{minor}"),
            "--std=c++17".into(),
            format!("-DHEAD_DIM={}", self.dim),
            format!("-DGROUP={}", self.group()),
            // Constants that one program uses and another does not.
            "-diag-suppress=177".into(),
            // Registers and spills, in the log.
            "-Xptxas".into(),
            "-v".into(),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_programs_text_is_whole_and_has_every_header_once() {
        for program in PROGRAMS {
            let text = program.text();
            assert!(!text.contains(".cuh\""), "{} still includes a header", program.name);
            assert_eq!(text.matches("constexpr u32 PAGE_TOKENS =").count(), 1);
            assert_eq!(text.matches("float low_bf16(").count(), 1);
            for kernel in program.kernels {
                // Either defined under its name or by place's macro.
                assert!(text.contains(&format!("{kernel}(")) || text.contains(&format!("({kernel},")));
            }
        }
    }

    #[test]
    fn each_cuda_text_says_its_floor_and_its_reference() {
        for program in PROGRAMS {
            for needed in ["// Floor, ", "//   bytes  ", "//   FLOPs  ", "CPU reference: crates/kernels/src/"]
            {
                assert!(program.text.contains(needed), "{} lacks {needed:?}", program.name);
            }
        }
    }

    #[test]
    fn what_has_no_kernels_is_one_clear_line() {
        let heads = |queries, kv, dim| Heads { queries, kv, dim };
        assert_eq!(heads(40, 8, 128).checked(), Ok(heads(40, 8, 128)));
        for (heads, line) in [
            (heads(8, 8, 80), "heads of 80 dimensions: CUDA kernels are for 32, 64 and 128"),
            (heads(10, 4, 64), "10 query heads do not share 4 KV heads evenly"),
            (heads(4, 0, 64), "4 query heads do not share 0 KV heads evenly"),
        ] {
            assert_eq!(heads.checked().unwrap_err().to_string(), line);
        }
        let refused = heads(4, 2, 32).options((7, 5)).unwrap_err();
        assert_eq!(refused.to_string(), "a device of compute capability 7.5: CUDA kernels need 8.0");
    }
}
