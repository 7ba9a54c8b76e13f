//! candle-transformers' models as a second oracle, with nothing of ours in them but the fixtures.

use crate::{TOLERANCE, decoder, fixture, prefill, tiny};
use cacheclip_model::certificate::relative_error;
use cacheclip_model::config::Family;
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{llama, qwen2, qwen3};
use serde::de::DeserializeOwned;
use std::path::Path;

#[test]
fn logits_equal_candles_models() {
    // candle's Llama and Qwen2 derive the head width from the hidden size: those where that holds.
    let fixtures = ["llama3-rope", "qwen2-tied", "qwen2-untied", "qwen3"];
    for dir in fixtures.map(fixture).into_iter().chain([tiny("primary")]) {
        let ours = decoder(dir.clone());
        let vocab = ours.config().vocab as u64;
        let ids: Vec<u32> = (0..96u64).map(|i| ((i * 48_271 + 11) % vocab) as u32).collect();
        let logits = prefill(&ours, &ids);
        let want = candle_logits(ours.config().family, &dir, &ids);
        let error = relative_error(&logits[logits.len() - want.len()..], &want);
        println!("{}: {error:.1e}", dir.display());
        // candle rounds its rotary angles to f32; seen: 1.5e-5 on the trained primary.
        assert!(error < 5.0 * TOLERANCE, "{}: {error:.1e}", dir.display());
    }
}

/// Logits of the last row.
fn candle_logits(family: Family, dir: &Path, ids: &[u32]) -> Vec<f32> {
    let tensors = candle_core::safetensors::load(dir.join("model.safetensors"), &Device::Cpu).unwrap();
    let weights = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    let input = Tensor::new(ids, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let logits = match family {
        Family::Llama => {
            let config = config::<llama::LlamaConfig>(dir).into_config(false);
            let model = llama::Llama::load(weights, &config).unwrap();
            let mut cache = llama::Cache::new(false, DType::F32, &config, &Device::Cpu).unwrap();
            model.forward(&input, 0, &mut cache)
        }
        Family::Qwen2 => {
            // candle applies the window whether it is used or not.
            let declared = config::<qwen2::Config>(dir);
            let unused = qwen2::Config { sliding_window: declared.max_position_embeddings, ..declared };
            qwen2::ModelForCausalLM::new(&unused, weights).unwrap().forward(&input, 0)
        }
        Family::Qwen3 => qwen3::ModelForCausalLM::new(&config(dir), weights).unwrap().forward(&input, 0),
    };
    logits.unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn config<T: DeserializeOwned>(dir: &Path) -> T {
    serde_json::from_str(&std::fs::read_to_string(dir.join("config.json")).unwrap()).unwrap()
}
