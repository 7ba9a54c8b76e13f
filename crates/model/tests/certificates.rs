//! The family certificate: logits equal the reference implementation's, and the controls that must fail do.
//!
//! Fixtures come from `fixtures/make.py` (transformers, f32, random weights scaled so that attention is
//! peaked); candle-transformers' model is a second oracle.

use cacheclip_model::certificate::{certify, relative_error};
use cacheclip_model::config::Config;
use cacheclip_model::kv::Export;
use cacheclip_model::load::{Source, load};
use cacheclip_model::pages::Allocator;
use cacheclip_model::{Cpu, Decoder, Logits, Pass};
use serde::Deserialize;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// Relative to the largest logit; a small trained model's logits reach 30.
const TOLERANCE: f32 = 1e-5;
const FIXTURES: [&str; 3] = ["llama-gqa-untied", "llama-tied", "llama3-rope"];

#[derive(Deserialize)]
struct Expected {
    ids: Vec<u32>,
    logits: Vec<f32>,
    rows: HashMap<usize, Vec<f32>>,
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

/// Logits of all rows, `[ids, vocab]`.
fn prefill(decoder: &Decoder<Cpu>, ids: &[u32]) -> Vec<f32> {
    let allocator = Allocator::new(64);
    let sequence = allocator.sequence(ids.len()).unwrap();
    let positions: Vec<u32> = (0..ids.len() as u32).collect();
    let pass = Pass { logits: Logits::All, ..Pass::new(ids, &positions, sequence.table()) };
    decoder.forward(&mut decoder.pages(64).unwrap(), pass).unwrap()
}

#[test]
fn logits_equal_the_reference_implementations() {
    for name in FIXTURES {
        let expected = expected(name);
        let logits = prefill(&decoder(fixture(name)), &expected.ids);
        let vocab = expected.logits.len();
        let last = &logits[logits.len() - vocab..];
        let error = relative_error(last, &expected.logits);
        assert!(error < TOLERANCE, "{name}: {error:.1e}");
        for (row, want) in &expected.rows {
            let error = relative_error(&logits[row * vocab..(row + 1) * vocab], want);
            assert!(error < TOLERANCE, "{name}, row {row}: {error:.1e}");
        }
    }
}

#[test]
fn another_rotation_base_and_another_pairing_miss_by_far() {
    for name in FIXTURES {
        let expected = expected(name);
        let dir = tempfile::tempdir().unwrap();
        let text = std::fs::read_to_string(fixture(name).join("config.json")).unwrap();
        let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
        config["rope_theta"] = (config["rope_theta"].as_f64().unwrap() * 3.0).into();
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        std::fs::copy(fixture(name).join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
        let logits = prefill(&decoder(dir.path().to_owned()), &expected.ids);
        let error = relative_error(&logits[logits.len() - expected.logits.len()..], &expected.logits);
        assert!(error > 100.0 * TOLERANCE, "{name}: wrong theta misses by {error:.1e} only");

        // Interleaved pairs instead of halves: permute each head's rows of the query and key projections.
        let wrong = repaired_pairing(name, dir.path());
        let logits = prefill(&wrong, &expected.ids);
        let error = relative_error(&logits[logits.len() - expected.logits.len()..], &expected.logits);
        assert!(error > 100.0 * TOLERANCE, "{name}: wrong pairing misses by {error:.1e} only");
    }
}

/// The fixture with the dimensions of every query and key head in interleaved order.
fn repaired_pairing(name: &str, dir: &Path) -> Decoder<Cpu> {
    let config = Config::from_dir(&fixture(name)).unwrap();
    let device = candle_core::Device::Cpu;
    let mut tensors =
        candle_core::safetensors::load(fixture(name).join("model.safetensors"), &device).unwrap();
    let dim = config.head_dim as u32;
    for (key, tensor) in &mut tensors {
        if key.contains("q_proj") || key.contains("k_proj") {
            let rows = tensor.dims()[0] as u32;
            let order: Vec<u32> =
                (0..rows).map(|row| row / dim * dim + (row % dim % 2) * (dim / 2) + row % dim / 2).collect();
            let index = candle_core::Tensor::from_vec(order, rows as usize, &device).unwrap();
            *tensor = tensor.index_select(&index, 0).unwrap();
        }
    }
    candle_core::safetensors::save(&tensors, dir.join("model.safetensors")).unwrap();
    std::fs::copy(fixture(name).join("config.json"), dir.join("config.json")).unwrap();
    decoder(dir.to_owned())
}

#[test]
fn candles_own_llama_agrees() {
    // candle derives the head width from the hidden size, so only models where that holds can be compared.
    for dir in [fixture("llama3-rope"), tiny("primary")] {
        let ours = decoder(dir.clone());
        let ids: Vec<u32> = (3..80).map(|i| (i * 37 % ours.config().vocab) as u32).collect();
        let logits = prefill(&ours, &ids);
        let want = candle_logits(&dir, &ids);
        let error = relative_error(&logits[logits.len() - want.len()..], &want);
        // candle rounds its rotary angles to f32; seen: 1.5e-5 on the trained primary.
        assert!(error < 5.0 * TOLERANCE, "{}: {error:.1e}", dir.display());
    }
}

fn candle_logits(dir: &Path, ids: &[u32]) -> Vec<f32> {
    use candle_transformers::models::llama::{Cache, Llama, LlamaConfig};
    let text = std::fs::read_to_string(dir.join("config.json")).unwrap();
    let config: LlamaConfig = serde_json::from_str(&text).unwrap();
    let config = config.into_config(false);
    let (device, dtype) = (candle_core::Device::Cpu, candle_core::DType::F32);
    let tensors = candle_core::safetensors::load(dir.join("model.safetensors"), &device).unwrap();
    let weights = candle_nn::VarBuilder::from_tensors(tensors, dtype, &device);
    let model = Llama::load(weights, &config).unwrap();
    let mut cache = Cache::new(false, dtype, &config, &device).unwrap();
    let input = candle_core::Tensor::new(ids, &device).unwrap().unsqueeze(0).unwrap();
    model.forward(&input, 0, &mut cache).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn every_instance_we_ship_proves_itself_at_start() {
    for dir in FIXTURES.map(fixture).into_iter().chain([tiny("primary"), tiny("aux")]) {
        let certificate = certify(&decoder(dir.clone())).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
        assert_eq!(certificate.checks.len(), 5, "{certificate}");
    }
}

#[test]
fn row_blocks_and_one_pass_give_the_same_rows() {
    // More rows than a block holds, so that the loop over blocks runs twice.
    let source = Source::Dir(tiny("aux"));
    let ours = load(&source, Cpu).unwrap().decoder;
    let count = ours.config().max_positions.min(1500);
    let ids: Vec<u32> = (0..count).map(|i| (i * 31 % ours.config().vocab) as u32).collect();
    let positions: Vec<u32> = (0..count as u32).collect();
    let allocator = Allocator::new(200);
    let (a, b) = (allocator.sequence(count).unwrap(), allocator.sequence(count).unwrap());
    let mut pages = ours.pages(200).unwrap();
    let blocks = ours.forward(&mut pages, Pass::new(&ids, &positions, a.table())).unwrap();
    let one =
        ours.forward_layered(&mut pages, Pass::new(&ids, &positions, b.table()), &mut |_, _| Ok(())).unwrap();
    assert!(relative_error(&blocks, &one) < TOLERANCE);
}

/// One stale hole before a row must change that row: otherwise "exact" would mean nothing.
#[test]
fn one_stale_row_changes_what_stands_behind_it_and_nothing_before() {
    let ours = decoder(fixture("llama-gqa-untied"));
    let dim = ours.config().head_dim;
    let expected = expected("llama-gqa-untied");
    let (anchor, chunk) = (8, 24..72);
    let allocator = Allocator::new(64);
    let export = |ids: &[u32], skip: usize| {
        let sequence = allocator.sequence(ids.len()).unwrap();
        let positions: Vec<u32> = (0..ids.len() as u32).collect();
        let mut export = Export::default();
        let pass = Pass { export: Some(&mut export), ..Pass::new(ids, &positions, sequence.table()) };
        ours.forward(&mut ours.pages(64).unwrap(), pass).unwrap();
        export.finish(skip, dim)
    };
    let exact = export(&expected.ids[..chunk.end], 0);
    let canonical = export(&[&expected.ids[..anchor], &expected.ids[chunk.clone()]].concat(), anchor);

    let hole = 40;
    let sequence = allocator.sequence(chunk.end).unwrap();
    let mut pages = ours.pages(64).unwrap();
    ours.place(&mut pages, sequence.table(), &canonical, chunk.start).unwrap();
    let rows: Vec<u32> = (0..chunk.end as u32).filter(|&row| row != hole).collect();
    let ids: Vec<u32> = rows.iter().map(|&row| expected.ids[row as usize]).collect();
    let mut export = Export::default();
    let pass = Pass { export: Some(&mut export), ..Pass::new(&ids, &rows, sequence.table()) };
    ours.forward(&mut pages, pass).unwrap();
    let repaired = export.finish(0, dim);

    let last = ours.config().layers - 1;
    let (repaired, exact) = (&repaired.layers()[last], &exact.layers()[last]);
    let mut rounding = 0.0f32;
    for (index, &row) in rows.iter().enumerate() {
        let of =
            |kv: &cacheclip_model::kv::LayerKv, token: usize| kv.k()[token * dim..(token + 1) * dim].to_vec();
        let error = relative_error(&of(repaired, index), &of(exact, row as usize));
        if row < hole {
            assert!(error < TOLERANCE, "row {row} stands before the hole and differs by {error:.1e}");
            rounding = rounding.max(error);
        } else {
            assert!(error > rounding, "row {row} stands behind the hole and did not notice ({error:.1e})");
        }
    }
}
