//! Weights that are not what `config.json` says are refused: a decoder of another family would answer, wrongly.

use crate::{expected, fixture, prefill, rename, variant};
use cacheclip_model::load::{Source, load};
use cacheclip_model::{Cpu, Decoder, Error};

fn refusal(loaded: Result<Decoder<Cpu>, Error>) -> String {
    loaded.map(|_| ()).unwrap_err().to_string()
}

#[test]
fn weights_of_another_family_are_refused_by_the_name_of_the_tensor() {
    for (fixture, model_type, class, tensor) in [
        // What the family does not have …
        ("qwen2-tied", "llama", "LlamaForCausalLM", "model.layers.0.self_attn.k_proj.bias"),
        ("qwen3", "llama", "LlamaForCausalLM", "model.layers.0.self_attn.k_norm.weight"),
        // … and what it needs.
        ("llama-tied", "qwen2", "Qwen2ForCausalLM", "model.layers.0.self_attn.q_proj.bias"),
        ("llama-tied", "qwen3", "Qwen3ForCausalLM", "model.layers.0.self_attn.q_norm.weight"),
    ] {
        let error = refusal(variant(fixture, |config| rename(config, model_type, class), |_| ()));
        assert!(error.contains(tensor), "{fixture} as {model_type}: {error}");
    }
}

#[test]
fn layers_behind_the_last_are_refused() {
    let error = refusal(variant("qwen3", |config| config["num_hidden_layers"] = 1.into(), |_| ()));
    assert!(error.contains("model.layers.1.") && error.contains("of 1 layers"), "{error}");
}

#[test]
fn a_head_of_another_width_is_refused() {
    let error = refusal(variant("qwen3", |config| config["head_dim"] = 12.into(), |_| ()));
    assert!(error.contains("q_proj") && error.contains("[48, 48]"), "{error}");
}

#[test]
fn windows_and_stretched_rotation_are_refused_from_a_directory_too() {
    for (field, value, name) in [
        ("use_sliding_window", true.into(), "use_sliding_window"),
        ("rope_scaling", serde_json::json!({"rope_type": "yarn", "factor": 4.0}), "yarn"),
        ("model_type", "mamba".into(), "mamba"),
    ] {
        let error = refusal(variant("qwen2-untied", |config| config[field] = value, |_| ()));
        assert!(error.contains(field) && error.contains(name), "{error}");
    }
}

/// Checkpoints of models with tied embeddings may hold a copy of the table; the table is what counts.
#[test]
fn a_tied_model_does_not_use_a_stray_output_head() {
    let expected = expected("qwen2-tied");
    let stray = variant(
        "qwen2-tied",
        |_| (),
        |tensors| {
            let wrong = tensors["model.embed_tokens.weight"].zeros_like().unwrap();
            tensors.insert("lm_head.weight".into(), wrong);
        },
    );
    let plain = load(&Source::Dir(fixture("qwen2-tied")), Cpu).unwrap().decoder;
    assert_eq!(prefill(&stray.unwrap(), &expected.ids), prefill(&plain, &expected.ids));
}
