//! The fields of `config.json` that matter, as transformers 4 and 5 write them, and their check.

use super::rope::{self, RawRope};
use super::{Config, Family, refuse};
use crate::error::Error;
use serde::Deserialize;
use serde_json::Value;

/// Width of a Qwen3 head where `config.json` does not say it: the default of the reference implementation,
/// which has no relation to `hidden_size`.
const QWEN3_HEAD_DIM: usize = 128;

#[derive(Debug, Deserialize)]
pub(super) struct Raw {
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
    partial_rotary_factor: Option<f64>,
    #[serde(default)]
    tie_word_embeddings: bool,
    max_position_embeddings: usize,
    eos_token_id: Option<OneOrMany>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    hidden_act: Option<String>,
    use_sliding_window: Option<bool>,
    layer_types: Option<Vec<String>>,
    dual_chunk_attention_config: Option<Value>,
    quantization_config: Option<Value>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

fn default_eps() -> f64 {
    1e-6
}

impl Raw {
    pub(super) fn check(self, family: Family) -> Result<Config, Error> {
        self.refuse_other_arithmetic(family)?;
        self.refuse_other_attention()?;
        let (kv_heads, head_dim) = self.heads(family)?;
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
        let (rope_theta, rope_scaling) =
            rope::check(family, self.rope_theta, self.rope_scaling.as_ref(), self.rope_parameters.as_ref())?;
        Ok(Config {
            family,
            vocab: self.vocab_size,
            hidden: self.hidden_size,
            intermediate: self.intermediate_size,
            layers: self.num_hidden_layers,
            heads: self.num_attention_heads,
            kv_heads,
            head_dim,
            norm_eps: self.rms_norm_eps as f32,
            rope_theta,
            rope_scaling,
            tied: self.tie_word_embeddings,
            max_positions: self.max_position_embeddings,
            eos: match self.eos_token_id {
                Some(OneOrMany::One(id)) => vec![id],
                Some(OneOrMany::Many(ids)) => ids,
                None => Vec::new(),
            },
        })
    }

    /// Biases, activations and weights that the layers cannot compute with.
    fn refuse_other_arithmetic(&self, family: Family) -> Result<(), Error> {
        // Where the family always has biases on queries, keys and values, the field says nothing new.
        if self.attention_bias == Some(true) && !family.has_qkv_biases() {
            let why = format!("true is not supported for {}; choose a checkpoint without", family.name());
            return Err(refuse("attention_bias", why));
        }
        if self.mlp_bias == Some(true) {
            return Err(refuse("mlp_bias", "true is not supported; choose a checkpoint without".into()));
        }
        if let Some(act) = self.hidden_act.as_deref().filter(|act| *act != "silu") {
            return Err(refuse("hidden_act", format!("{act} is not supported; supported: silu")));
        }
        if let Some(quantization) = self.quantization_config.as_ref().filter(|value| !value.is_null()) {
            let method = quantization["quant_method"].as_str().unwrap_or("quantized");
            let why =
                format!("{method} weights are not supported; choose the checkpoint in bf16, f16 or f32");
            return Err(refuse("quantization_config", why));
        }
        Ok(())
    }

    /// Attention that does not reach from every row to everything before it.
    fn refuse_other_attention(&self) -> Result<(), Error> {
        if self.use_sliding_window == Some(true) {
            let why = "true: sliding windows are not supported; choose a checkpoint with full attention, where \
                       this is false";
            return Err(refuse("use_sliding_window", why.into()));
        }
        let mut kinds = self.layer_types.iter().flatten();
        if let Some(kind) = kinds.find(|kind| *kind != "full_attention") {
            let why = format!("{kind} is not supported; choose a checkpoint whose layers are full_attention");
            return Err(refuse("layer_types", why));
        }
        if self.dual_chunk_attention_config.as_ref().is_some_and(|value| !value.is_null()) {
            let why = "dual chunk attention is not supported; choose a checkpoint without, or remove the field \
                       to serve the model as plain attention within its original length";
            return Err(refuse("dual_chunk_attention_config", why.into()));
        }
        if let Some(factor) = self.partial_rotary_factor.filter(|factor| *factor != 1.0) {
            return Err(refuse(
                "partial_rotary_factor",
                format!("{factor} is not supported; supported: 1.0"),
            ));
        }
        Ok(())
    }

    /// Key/value heads, and the width of a head.
    fn heads(&self, family: Family) -> Result<(usize, usize), Error> {
        let heads = self.num_attention_heads;
        let kv_heads = self.num_key_value_heads.unwrap_or(heads);
        if heads == 0 || kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            let why = format!("{heads} heads cannot share {kv_heads} KV heads");
            return Err(refuse("num_key_value_heads", why));
        }
        let head_dim = match self.head_dim {
            Some(dim) => dim,
            None if family == Family::Qwen3 => QWEN3_HEAD_DIM,
            None if self.hidden_size.is_multiple_of(heads) => self.hidden_size / heads,
            None => {
                return Err(refuse("head_dim", "absent, and hidden_size is no multiple of the heads".into()));
            }
        };
        if head_dim == 0 || head_dim % 2 != 0 {
            return Err(refuse("head_dim", format!("{head_dim} cannot be rotated in pairs")));
        }
        Ok((kv_heads, head_dim))
    }
}
