//! What a `config.json` may say, and what is refused.

use super::*;
use serde_json::{Value, json};

/// A small configuration of a family, with all it needs.
fn plain(family: Family) -> Value {
    let mut config = json!({
        "model_type": family.name(), "vocab_size": 10, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32, "eos_token_id": 2,
    });
    if family != Family::Llama {
        config["rope_theta"] = json!(1e6);
    }
    config
}

fn with(family: Family, extra: Value) -> Result<Config, Error> {
    let mut config = plain(family);
    for (field, value) in extra.as_object().unwrap() {
        config[field] = value.clone();
    }
    Config::parse(&config.to_string())
}

fn refusal(family: Family, extra: Value) -> String {
    with(family, extra.clone()).map(|_| extra).unwrap_err().to_string()
}

#[test]
fn absent_fields_take_the_familys_defaults() {
    let config = with(Family::Llama, json!({})).unwrap();
    assert_eq!((config.kv_heads, config.head_dim, config.rope_theta), (4, 16, 10_000.0));
    assert_eq!(config.eos, [2]);
    assert_eq!(with(Family::Qwen2, json!({})).unwrap().head_dim, 16);
    assert_eq!(with(Family::Qwen3, json!({})).unwrap().head_dim, 128);
    assert_eq!(with(Family::Qwen3, json!({"head_dim": 24})).unwrap().head_dim, 24);
}

#[test]
fn theta_is_found_where_either_generation_of_transformers_writes_it() {
    for family in Family::ALL {
        let mut config = plain(family);
        config.as_object_mut().unwrap().remove("rope_theta");
        for rope in [
            json!({"rope_theta": 5e5}),
            json!({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
            json!({"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 5e5, "rope_scaling": null}),
        ] {
            let mut config = config.clone();
            config.as_object_mut().unwrap().extend(rope.as_object().unwrap().clone());
            assert_eq!(Config::parse(&config.to_string()).unwrap().rope_theta, 5e5, "{config}");
        }
    }
}

#[test]
fn llama3_scaling_is_found_in_either_place() {
    let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16});
    let old = with(Family::Llama, json!({"rope_scaling": scaling})).unwrap();
    let new = with(Family::Llama, json!({"rope_parameters": scaling})).unwrap();
    assert_eq!(old.rope_scaling.unwrap().original_max_position, 16);
    assert_eq!(old, new);
}

#[test]
fn the_family_is_told_by_model_type_or_else_by_architectures() {
    for family in Family::ALL {
        assert_eq!(with(family, json!({})).unwrap().family, family);
        let class = json!([match family {
            Family::Llama => "LlamaForCausalLM",
            Family::Qwen2 => "Qwen2ForCausalLM",
            Family::Qwen3 => "Qwen3ForCausalLM",
        }]);
        assert_eq!(with(family, json!({"architectures": class})).unwrap().family, family);
        assert_eq!(with(family, json!({"model_type": null, "architectures": class})).unwrap().family, family);
    }
}

#[test]
fn embeddings_are_untied_unless_the_file_ties_them() {
    for family in Family::ALL {
        assert!(!with(family, json!({})).unwrap().tied);
        assert!(with(family, json!({"tie_word_embeddings": true})).unwrap().tied);
    }
}

#[test]
fn a_declared_window_that_is_not_used_is_no_obstacle() {
    let unused = json!({"use_sliding_window": false, "sliding_window": 131_072, "max_window_layers": 28,
        "layer_types": ["full_attention", "full_attention"]});
    for family in [Family::Qwen2, Family::Qwen3] {
        assert_eq!(with(family, unused.clone()).unwrap(), with(family, json!({})).unwrap());
    }
}

#[test]
fn other_families_are_refused_by_name_with_those_to_choose_from() {
    for (extra, field, name) in [
        (json!({"model_type": "mamba"}), "model_type", "mamba"),
        (json!({"model_type": "mistral"}), "model_type", "mistral"),
        (json!({"model_type": "qwen2_vl"}), "model_type", "qwen2_vl"),
        (json!({"model_type": "qwen2_moe"}), "model_type", "qwen2_moe is a mixture of experts"),
        (json!({"model_type": "qwen3_moe", "num_experts": 128}), "num_experts", "qwen3_moe is a mixture"),
        (
            json!({"model_type": "mixtral", "num_local_experts": 8}),
            "num_local_experts",
            "mixtral is a mixture",
        ),
        (json!({"model_type": null}), "model_type", "absent"),
        (json!({"architectures": ["Qwen2ForRewardModel"]}), "architectures", "Qwen2ForRewardModel"),
        (json!({"architectures": ["LlamaForSequenceClassification"]}), "architectures", "LlamaForSequence"),
    ] {
        for family in Family::ALL {
            let error = refusal(family, extra.clone());
            assert!(error.starts_with(field) && error.contains(name), "{error}");
            assert!(error.contains("choose a dense model of llama, qwen2, qwen3"), "{error}");
        }
    }
}

#[test]
fn rotations_that_are_not_supported_are_refused_by_name() {
    for family in Family::ALL {
        for (rope, names) in [
            (json!({"rope_type": "yarn", "factor": 4.0}), ["yarn", "remove yarn"]),
            (json!({"type": "yarn", "factor": 4.0}), ["yarn", "remove yarn"]),
            (json!({"type": "dynamic", "factor": 4.0}), ["dynamic", "remove dynamic"]),
            (json!({"rope_type": "linear", "factor": 4.0}), ["linear", "choose another model"]),
            (json!({"rope_type": "longrope", "factor": 4.0}), ["longrope", "choose another model"]),
            (json!({"type": "mrope", "mrope_section": [1, 2]}), ["mrope", "choose another model"]),
            (json!({"rope_type": "default", "type": "mrope"}), ["default contradicts type mrope", "remove"]),
            (json!({"rope_type": "llama3", "factor": 8.0}), ["llama3", "needs low_freq_factor"]),
            (json!({"factor": 4.0}), ["no rope_type", "write"]),
            (json!({"partial_rotary_factor": 0.5}), ["partial_rotary_factor", "0.5"]),
            (json!({"full_attention": {"rope_theta": 1e4}}), ["full_attention", "choose another model"]),
        ] {
            for field in ["rope_scaling", "rope_parameters"] {
                let error = refusal(family, json!({field: rope}));
                assert!(error.starts_with(field), "{error}");
                assert!(names.iter().all(|name| error.contains(name)), "{error}");
            }
            // What one field says is not undone by the other.
            let both = json!({"rope_scaling": rope, "rope_parameters": {"rope_type": "default"}});
            assert!(refusal(family, both).starts_with("rope_scaling"));
        }
    }
}

#[test]
fn a_rotation_base_is_said_once_or_twice_alike_and_never_guessed_for_qwen() {
    for family in Family::ALL {
        let error = refusal(family, json!({"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e4}}));
        assert!(
            error.starts_with("rope_parameters") && error.contains("10000 contradicts 1000000"),
            "{error}"
        );
        let error = refusal(family, json!({"rope_theta": 0.0}));
        assert!(error.starts_with("rope_theta"), "{error}");
    }
    for family in [Family::Qwen2, Family::Qwen3] {
        let error = refusal(family, json!({"rope_theta": null}));
        assert!(error.starts_with("rope_theta") && error.contains("1000000.0"), "{error}");
    }
}

#[test]
fn what_else_is_not_supported_is_refused_by_name() {
    for family in Family::ALL {
        for (extra, field, name) in [
            (json!({"use_sliding_window": true, "sliding_window": 4096}), "use_sliding_window", "true"),
            (
                json!({"layer_types": ["full_attention", "sliding_attention"]}),
                "layer_types",
                "sliding_attention",
            ),
            (json!({"layer_types": ["linear_attention"]}), "layer_types", "linear_attention"),
            (
                json!({"dual_chunk_attention_config": {"chunk_size": 8}}),
                "dual_chunk_attention_config",
                "dual",
            ),
            (json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor", "0.5"),
            (json!({"quantization_config": {"quant_method": "fp8"}}), "quantization_config", "fp8"),
            (json!({"mlp_bias": true}), "mlp_bias", "true"),
            (json!({"num_key_value_heads": 3}), "num_key_value_heads", "3"),
            (json!({"head_dim": 15}), "head_dim", "15"),
            (json!({"hidden_act": "gelu"}), "hidden_act", "gelu"),
            (json!({"vocab_size": 0}), "vocab_size", "0"),
        ] {
            let error = refusal(family, extra);
            assert!(error.starts_with(field) && error.contains(name), "{error}");
        }
    }
    // Qwen2 always has biases on queries, keys and values: nothing to refuse.
    assert!(with(Family::Qwen2, json!({"attention_bias": true})).is_ok());
    for family in [Family::Llama, Family::Qwen3] {
        assert!(refusal(family, json!({"attention_bias": true})).starts_with("attention_bias"));
    }
}
