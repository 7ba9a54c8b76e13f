//! The family certificates: logits equal the reference implementation's, and the controls that must fail do.
//!
//! Fixtures come from `fixtures/make.py` (transformers, f32, random weights scaled so that attention is
//! peaked); candle-transformers' models are a second oracle.
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

mod controls;
mod oracle;
mod refusals;
mod reuse;

use cacheclip_model::certificate::relative_error;
use cacheclip_model::load::{Source, load};
use cacheclip_model::pages::Allocator;
use cacheclip_model::{Cpu, Decoder, Error, Logits, Pass};
use candle_core::Tensor;
use serde::Deserialize;
use serde_json::Value;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// Relative to the largest logit; a small trained model's logits reach 30.
const TOLERANCE: f32 = 1e-5;
/// What a negative control must exceed.
const CONTROL: f32 = 100.0 * TOLERANCE;
const FIXTURES: [&str; 6] =
    ["llama-gqa-untied", "llama-tied", "llama3-rope", "qwen2-tied", "qwen2-untied", "qwen3"];
const QWEN2: [&str; 2] = ["qwen2-tied", "qwen2-untied"];
/// One of each family.
const FAMILIES: [&str; 3] = ["llama-gqa-untied", "qwen2-untied", "qwen3"];

/// Pages of one sequence's or two sequences' cache.
const PAGES: usize = 64;

#[derive(Deserialize)]
struct Expected {
    ids: Vec<u32>,
    logits: Vec<f32>,
    rows: HashMap<usize, Vec<f32>>,
}

impl Expected {
    /// Relative error of the last row of `logits` against the reference implementation's.
    fn error(&self, logits: &[f32]) -> f32 {
        relative_error(&logits[logits.len() - self.logits.len()..], &self.logits)
    }
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn tiny(which: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny").join(which)
}

fn expected(name: &str) -> Expected {
    serde_json::from_str(&std::fs::read_to_string(fixture(name).join("expected.json")).unwrap()).unwrap()
}

fn decoder(dir: PathBuf) -> Decoder<Cpu> {
    load(&Source::Dir(dir), Cpu).unwrap().decoder
}

/// A fixture with its configuration and its weights changed.
fn variant(
    name: &str,
    configure: impl FnOnce(&mut Value),
    weigh: impl FnOnce(&mut HashMap<String, Tensor>),
) -> Result<Decoder<Cpu>, Error> {
    let dir = tempfile::tempdir().unwrap();
    let text = std::fs::read_to_string(fixture(name).join("config.json")).unwrap();
    let mut config = serde_json::from_str(&text).unwrap();
    configure(&mut config);
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let file = "model.safetensors";
    let mut tensors =
        candle_core::safetensors::load(fixture(name).join(file), &candle_core::Device::Cpu).unwrap();
    weigh(&mut tensors);
    candle_core::safetensors::save(&tensors, dir.path().join(file)).unwrap();
    load(&Source::Dir(dir.path().to_owned()), Cpu).map(|loaded| loaded.decoder)
}

/// Has the configuration name another family.
fn rename(config: &mut Value, model_type: &str, class: &str) {
    config["model_type"] = model_type.into();
    config["architectures"] = [class].as_slice().into();
}

/// Logits of all rows, `[ids, vocab]`.
fn prefill(decoder: &Decoder<Cpu>, ids: &[u32]) -> Vec<f32> {
    let allocator = Allocator::new(PAGES);
    let sequence = allocator.sequence(ids.len()).unwrap();
    let positions: Vec<u32> = (0..ids.len() as u32).collect();
    let pass = Pass { logits: Logits::All, ..Pass::new(ids, &positions, sequence.table()) };
    decoder.forward(&mut decoder.pages(PAGES).unwrap(), pass).unwrap()
}

#[test]
fn logits_equal_the_reference_implementations() {
    for name in FIXTURES {
        let expected = expected(name);
        let logits = prefill(&decoder(fixture(name)), &expected.ids);
        let vocab = expected.logits.len();
        let error = expected.error(&logits);
        println!("{name}: {error:.1e}");
        assert!(error < TOLERANCE, "{name}: {error:.1e}");
        for (row, want) in &expected.rows {
            let error = relative_error(&logits[row * vocab..(row + 1) * vocab], want);
            println!("{name}, row {row}: {error:.1e}");
            assert!(error < TOLERANCE, "{name}, row {row}: {error:.1e}");
        }
    }
}
