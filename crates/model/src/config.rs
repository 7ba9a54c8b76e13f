//! `config.json` of Hugging Face directories, checked before anything is loaded.

use crate::error::Error;
use cacheclip_kernels::rope::Llama3Scaling;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// A decoder's shape. Llama family (Llama 2 and 3.x, SmolLM2 and other plain Llama checkpoints).
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
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
    /// Width of one head.
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

/// The fields of `config.json` that matter, as written by transformers 4 and 5.
#[derive(Debug, Deserialize, Serialize)]
struct Raw {
    model_type: String,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    #[serde(default = "default_eps")]
    rms_norm_eps: f64,
    rope_theta: Option<f64>,
    rope_scaling: Option<RawRope>,
    rope_parameters: Option<RawRope>,
    #[serde(default)]
    tie_word_embeddings: bool,
    max_position_embeddings: usize,
    eos_token_id: Option<OneOrMany>,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    hidden_act: Option<String>,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
struct RawRope {
    rope_type: Option<String>,
    #[serde(rename = "type")]
    kind: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<usize>,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

fn default_eps() -> f64 {
    1e-6
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
        let family = value.get("model_type").and_then(|v| v.as_str()).unwrap_or("(none)").to_owned();
        if family != "llama" {
            return Err(refuse("model_type", format!("{family} is not supported; supported: llama")));
        }
        let raw: Raw = serde_json::from_value(value).map_err(|e| refuse("config.json", e.to_string()))?;
        raw.check()
    }

    /// The shape of SmolLM2-135M: what speed is measured on when no weights are at hand.
    pub fn smollm2_135m() -> Self {
        Self {
            vocab: 49_152,
            hidden: 576,
            intermediate: 1536,
            layers: 30,
            heads: 9,
            kv_heads: 3,
            head_dim: 64,
            norm_eps: 1e-5,
            rope_theta: 100_000.0,
            rope_scaling: None,
            tied: true,
            max_positions: 8192,
            eos: vec![2],
        }
    }

    /// Text that identifies the shape, for digests of random weights.
    pub fn canonical(&self) -> String {
        format!("{self:?}")
    }
}

fn refuse(field: &'static str, why: String) -> Error {
    Error::Unsupported { field, why }
}

impl Raw {
    fn check(self) -> Result<Config, Error> {
        if self.attention_bias {
            return Err(refuse("attention_bias", "projections with biases are not supported".into()));
        }
        if self.mlp_bias {
            return Err(refuse("mlp_bias", "projections with biases are not supported".into()));
        }
        if let Some(act) = self.hidden_act.as_deref().filter(|act| *act != "silu") {
            return Err(refuse("hidden_act", format!("{act} is not supported; supported: silu")));
        }
        let (heads, kv_heads) =
            (self.num_attention_heads, self.num_key_value_heads.unwrap_or(self.num_attention_heads));
        if heads == 0 || kv_heads == 0 || heads % kv_heads != 0 {
            return Err(refuse(
                "num_key_value_heads",
                format!("{heads} heads cannot share {kv_heads} KV heads"),
            ));
        }
        let head_dim = match self.head_dim {
            Some(dim) => dim,
            None if self.hidden_size.is_multiple_of(heads) => self.hidden_size / heads,
            None => {
                return Err(refuse("head_dim", "absent, and hidden_size is no multiple of the heads".into()));
            }
        };
        if head_dim == 0 || head_dim % 2 != 0 {
            return Err(refuse("head_dim", format!("{head_dim} cannot be rotated in pairs")));
        }
        for (field, value) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("max_position_embeddings", self.max_position_embeddings),
        ] {
            if value == 0 {
                return Err(refuse(field, "must not be 0".into()));
            }
        }
        let rope = self.rope_parameters.clone().or(self.rope_scaling.clone());
        let theta = self.rope_theta.or(rope.as_ref().and_then(|r| r.rope_theta)).unwrap_or(10_000.0);
        Ok(Config {
            vocab: self.vocab_size,
            hidden: self.hidden_size,
            intermediate: self.intermediate_size,
            layers: self.num_hidden_layers,
            heads,
            kv_heads,
            head_dim,
            norm_eps: self.rms_norm_eps as f32,
            rope_theta: theta,
            rope_scaling: rope.map(RawRope::check).transpose()?.flatten(),
            tied: self.tie_word_embeddings,
            max_positions: self.max_position_embeddings,
            eos: match self.eos_token_id {
                Some(OneOrMany::One(id)) => vec![id],
                Some(OneOrMany::Many(ids)) => ids,
                None => Vec::new(),
            },
        })
    }
}

impl RawRope {
    fn check(self) -> Result<Option<Llama3Scaling>, Error> {
        let kind = self.rope_type.as_deref().or(self.kind.as_deref()).unwrap_or("default");
        let need = |value: Option<f64>, name: &str| {
            value.ok_or_else(|| refuse("rope_scaling", format!("llama3 scaling needs {name}")))
        };
        match kind {
            "default" => Ok(None),
            "llama3" => Ok(Some(Llama3Scaling {
                factor: need(self.factor, "factor")?,
                low_freq_factor: need(self.low_freq_factor, "low_freq_factor")?,
                high_freq_factor: need(self.high_freq_factor, "high_freq_factor")?,
                original_max_position: need(
                    self.original_max_position_embeddings.map(|v| v as f64),
                    "original_max_position_embeddings",
                )? as usize,
            })),
            other => {
                Err(refuse("rope_scaling", format!("{other} is not supported; supported: default, llama3")))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: &str = r#"{"model_type":"llama","vocab_size":10,"hidden_size":64,"intermediate_size":128,
        "num_hidden_layers":2,"num_attention_heads":4,"max_position_embeddings":32,"eos_token_id":2}"#;

    fn with(extra: &str) -> Result<Config, Error> {
        Config::parse(&PLAIN.replacen('{', &format!("{{{extra},"), 1))
    }

    #[test]
    fn absent_fields_take_llamas_defaults() {
        let config = Config::parse(PLAIN).unwrap();
        assert_eq!((config.kv_heads, config.head_dim, config.rope_theta), (4, 16, 10_000.0));
        assert_eq!(config.eos, [2]);
    }

    #[test]
    fn theta_is_found_where_either_generation_of_transformers_writes_it() {
        assert_eq!(with(r#""rope_theta":5e5"#).unwrap().rope_theta, 5e5);
        assert_eq!(
            with(r#""rope_parameters":{"rope_type":"default","rope_theta":5e5}"#).unwrap().rope_theta,
            5e5
        );
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        for (extra, name) in [
            (r#""rope_scaling":{"rope_type":"yarn","factor":4.0}"#, "yarn"),
            (r#""rope_scaling":{"type":"dynamic","factor":4.0}"#, "dynamic"),
            (r#""attention_bias":true"#, "attention_bias"),
            (r#""num_key_value_heads":3"#, "num_key_value_heads"),
            (r#""hidden_act":"gelu""#, "gelu"),
        ] {
            let error = with(extra).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
        let other = Config::parse(&PLAIN.replace("llama", "mamba")).unwrap_err().to_string();
        assert!(other.contains("mamba"), "{other}");
    }
}
