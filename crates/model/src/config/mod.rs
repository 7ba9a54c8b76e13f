//! `config.json` of Hugging Face directories, checked before anything is loaded.
//!
//! A field that would change the arithmetic is either supported or refused by its name: a model that answers
//! almost right is worse than one that does not start.

mod family;
mod raw;
mod rope;
mod shapes;
#[cfg(test)]
mod tests;

pub use family::Family;

use crate::error::Error;
use cacheclip_kernels::rope::Llama3Scaling;
use std::path::Path;

/// A decoder's shape.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// What the layers compute.
    pub family: Family,
    /// Rows of the embedding table.
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the gated feed-forward.
    pub intermediate: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Width of one head; `heads · head_dim` need not be `hidden`.
    pub head_dim: usize,
    /// Epsilon of the norms.
    pub norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Llama-3 frequency scaling, if any.
    pub rope_scaling: Option<Llama3Scaling>,
    /// Whether the output head is the embedding table.
    pub tied: bool,
    /// Longest sequence.
    pub max_positions: usize,
    /// Tokens that end an answer.
    pub eos: Vec<u32>,
}

impl Config {
    /// Reads and checks `config.json` in a model directory.
    ///
    /// # Errors
    /// An unreadable file, a family or a feature this build does not support (named by field).
    pub fn from_dir(dir: &Path) -> Result<Self, Error> {
        let path = dir.join("config.json");
        let text =
            std::fs::read_to_string(&path).map_err(|source| Error::Read { path: path.clone(), source })?;
        Self::parse(&text)
    }

    /// Parses the text of a `config.json`.
    ///
    /// # Errors
    /// As [`from_dir`](Self::from_dir).
    pub fn parse(text: &str) -> Result<Self, Error> {
        let value: serde_json::Value =
            serde_json::from_str(text).map_err(|e| refuse("config.json", e.to_string()))?;
        let family = Family::of(&value)?;
        let raw: raw::Raw =
            serde_json::from_value(value).map_err(|e| refuse("config.json", e.to_string()))?;
        raw.check(family)
    }

    /// Text that identifies the shape, for digests of random weights.
    pub fn canonical(&self) -> String {
        format!("{self:?}")
    }
}

fn refuse(field: &'static str, why: String) -> Error {
    Error::Unsupported { field, why }
}
