//! Which decoder a `config.json` describes.

use super::refuse;
use crate::error::Error;
use serde_json::Value;

/// A decoder family: plain pre-norm attention and gated feed-forward, but for what the methods tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Llama 2 and 3.x, SmolLM2 and other plain Llama checkpoints.
    Llama,
    /// Qwen2 and Qwen2.5: queries, keys and values are projected with biases.
    Qwen2,
    /// Qwen3, dense: every query and key head is normed before it is rotated.
    Qwen3,
}

/// Fields by which a `config.json` counts the experts of a mixture.
const EXPERTS: [&str; 3] = ["num_experts", "num_local_experts", "n_routed_experts"];

impl Family {
    /// All families.
    pub const ALL: [Self; 3] = [Self::Llama, Self::Qwen2, Self::Qwen3];

    /// As `model_type` says it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }

    /// Whether the projections to queries, keys and values have biases.
    pub fn has_qkv_biases(self) -> bool {
        self == Self::Qwen2
    }

    /// Whether query and key heads are normed between projection and rotation. A position-free key is the
    /// normed one.
    pub fn has_head_norms(self) -> bool {
        self == Self::Qwen3
    }

    /// As `architectures` says it.
    fn class(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Qwen3 => "Qwen3ForCausalLM",
        }
    }

    /// The family of a `config.json`: `model_type`, or `architectures` where that is absent. Both must agree,
    /// because a classifier or an embedding model has the `model_type` of the decoder it was made from.
    pub(super) fn of(config: &Value) -> Result<Self, Error> {
        let classes: Vec<&str> =
            config["architectures"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let name = config["model_type"].as_str();
        let experts = EXPERTS.into_iter().find(|&field| config[field].as_u64().is_some_and(|n| n > 0));
        if let Some(field) = experts.or(name.filter(|name| name.contains("moe")).map(|_| "model_type")) {
            let name = name.unwrap_or("the model");
            return Err(refuse(field, format!("{name} is a mixture of experts; {}", choose())));
        }
        let family = Self::ALL.into_iter().find(|family| match name {
            Some(name) => family.name() == name,
            None => classes.contains(&family.class()),
        });
        let Some(family) = family else {
            let why = name.map_or("absent".to_owned(), |name| format!("{name} is not supported"));
            return Err(refuse("model_type", format!("{why}; {}", choose())));
        };
        if !classes.is_empty() && !classes.iter().any(|class| class.eq_ignore_ascii_case(family.class())) {
            return Err(refuse(
                "architectures",
                format!("{} is not the decoder of {}; {}", classes.join(", "), family.name(), choose()),
            ));
        }
        Ok(family)
    }
}

/// What the caller of an unsupported model can do.
fn choose() -> String {
    let classes = Family::ALL.map(Family::class);
    let names = Family::ALL.map(Family::name);
    format!("choose a dense model of {} ({})", names.join(", "), classes.join(", "))
}
