//! What must miss: decoders that are wrong in one thing, each by a hundred times the tolerance. Reuse without
//! recompute, the other control, stands beside reuse with it in `reuse.rs`.

use crate::{CONTROL, FIXTURES, QWEN2, expected, fixture, prefill, rename, variant};
use cacheclip_model::config::Config;
use cacheclip_model::{Cpu, Decoder};
use candle_core::{Device, Tensor};

/// A wrong decoder's error must be large.
fn must_miss(name: &str, what: &str, wrong: &Decoder<Cpu>) {
    let expected = expected(name);
    let error = expected.error(&prefill(wrong, &expected.ids));
    println!("{name}, {what}: {error:.1e}");
    assert!(error > CONTROL, "{name}: {what} misses by {error:.1e} only");
}

#[test]
fn another_rotation_base_misses_by_far() {
    for name in FIXTURES {
        let triple = |config: &mut serde_json::Value| {
            config["rope_theta"] = (config["rope_theta"].as_f64().unwrap() * 3.0).into();
        };
        must_miss(name, "wrong theta", &variant(name, triple, |_| ()).unwrap());
    }
}

#[test]
fn interleaved_pairs_miss_by_far() {
    for name in FIXTURES {
        let dim = Config::from_dir(&fixture(name)).unwrap().head_dim as u32;
        // All that makes the dimensions of a query or key head, in interleaved order.
        let wrong = variant(
            name,
            |_| (),
            |tensors| {
                for (key, tensor) in tensors {
                    if ["q_proj", "k_proj", "q_norm", "k_norm"].iter().any(|part| key.contains(part)) {
                        let rows = tensor.dims()[0] as u32;
                        let from = |row: u32| row / dim * dim + (row % dim % 2) * (dim / 2) + row % dim / 2;
                        let order: Vec<u32> = (0..rows).map(from).collect();
                        let index = Tensor::from_vec(order, rows as usize, &Device::Cpu).unwrap();
                        *tensor = tensor.index_select(&index, 0).unwrap();
                    }
                }
            },
        );
        must_miss(name, "wrong pairing", &wrong.unwrap());
    }
}

/// The same weights as a Llama decoder has them: without biases.
#[test]
fn qwen2_without_its_biases_misses_by_far() {
    for name in QWEN2 {
        let wrong = variant(
            name,
            |config| rename(config, "llama", "LlamaForCausalLM"),
            |tensors| tensors.retain(|key, _| !key.ends_with(".bias")),
        );
        must_miss(name, "no biases", &wrong.unwrap());
    }
}

#[test]
fn each_of_the_three_biases_of_qwen2_counts() {
    for (name, part) in QWEN2.into_iter().flat_map(|name| ["q_proj", "k_proj", "v_proj"].map(|p| (name, p))) {
        let wrong = variant(
            name,
            |_| (),
            |tensors| {
                for (key, tensor) in tensors {
                    if key.ends_with(&format!("{part}.bias")) {
                        *tensor = tensor.zeros_like().unwrap();
                    }
                }
            },
        );
        must_miss(name, &format!("no bias on {part}"), &wrong.unwrap());
    }
}

/// The same weights as a Llama decoder has them: without norms of heads.
#[test]
fn qwen3_without_its_head_norms_misses_by_far() {
    let wrong = variant(
        "qwen3",
        |config| rename(config, "llama", "LlamaForCausalLM"),
        |tensors| tensors.retain(|key, _| !key.contains("q_norm") && !key.contains("k_norm")),
    );
    must_miss("qwen3", "no head norms", &wrong.unwrap());
}

#[test]
fn each_of_the_two_head_norms_of_qwen3_counts() {
    for part in ["q_norm", "k_norm"] {
        let wrong = variant(
            "qwen3",
            |_| (),
            |tensors| {
                for (key, tensor) in tensors {
                    if key.contains(part) {
                        *tensor = tensor.ones_like().unwrap();
                    }
                }
            },
        );
        must_miss("qwen3", &format!("{part} without weights"), &wrong.unwrap());
    }
}
