//! The CUDA device: a whole decoder on the emulated machine of `crates/kernels/tests/cuda`, where every kernel is the
//! device's text and two streams run as far apart as their events allow; and on a GPU, where there is one.
//!
//! Without a C++ compiler the first says so and is skipped, without a GPU the second, unless `NEED_GPU` is set.
//! **It has not run on a GPU yet.**
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

#[path = "../../kernels/tests/cuda/emulated.rs"]
mod emulated;

use cacheclip_kernels::cuda::{DeviceError, Heads};
use cacheclip_model::certificate::{certify, relative_error};
use cacheclip_model::config::{Config, Family};
use cacheclip_model::cuda::{Cuda, Footprint, Options};
use cacheclip_model::device::{At, Precision};
use cacheclip_model::kv::{ChunkKv, Elements, Export};
use cacheclip_model::load::{Source, load};
use cacheclip_model::pages::Allocator;
use cacheclip_model::{Batch, Cpu, Decoder, Device, Error, Logits, Pass};
use emulated::{Emulated, Order};
use std::path::{Path, PathBuf};
use std::sync::Arc;

const PAGES: usize = 64;
/// What bf16 may do to logits beside f32, of their largest: some 50 roundings by up to 2⁻⁹ on the way through the trained
/// model, as independent errors and three deviations out.
const OF_F32: f32 = 5e-2;
/// Of an emulated device.
const MEMORY: usize = 512 << 20;
const ORDERS: [Order; 2] = [Order::CopiesLate, Order::CopiesEarly];

fn heads(config: &Config) -> Heads {
    Heads { queries: config.heads as u32, kv: config.kv_heads as u32, dim: config.head_dim as u32 }
}

fn options() -> Options {
    Options { pages: PAGES, block_rows: 48, pinned_bytes: 8 << 20, ..Options::default() }
}

fn machine(config: &Config, order: Order) -> Option<Arc<Emulated>> {
    Emulated::open(heads(config), order, MEMORY)
}

fn emulated(source: &Source, order: Order, options: &Options) -> Option<Decoder<Cuda>> {
    let config = source.config().unwrap();
    let device = Cuda::on(machine(&config, order)?, &config, options).unwrap();
    Some(load(source, device).unwrap().decoder)
}

/// The trained model.
fn tiny() -> Source {
    Source::Dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny/primary"))
}

/// A prompt of the trained model.
fn prompt() -> Vec<u32> {
    let path: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-primary.json");
    let value: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    value["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn random(family: Family, config: Config) -> Source {
    let config = Config {
        family,
        layers: 2,
        vocab: 160,
        hidden: 64,
        intermediate: 96,
        heads: 4,
        kv_heads: 2,
        head_dim: 32,
        max_positions: 512,
        ..config
    };
    Source::Random { config, seed: 7 }
}

fn families() -> Vec<Source> {
    let shape = Config::shape("aux-30m").unwrap();
    [Family::Llama, Family::Qwen2, Family::Qwen3].map(|family| random(family, shape.clone())).into()
}

fn positions(range: std::ops::Range<usize>) -> Vec<u32> {
    range.map(|position| position as u32).collect()
}

/// Logits of all rows.
fn prefill<D: Device>(decoder: &Decoder<D>, ids: &[u32]) -> Vec<f32> {
    let sequence = Allocator::new(PAGES).sequence(ids.len()).unwrap();
    let positions = positions(0..ids.len());
    let pass = Pass { logits: Logits::All, ..Pass::new(ids, &positions, sequence.table()) };
    decoder.forward(&mut decoder.pages(PAGES).unwrap(), pass).unwrap()
}

fn largest(logits: &[f32]) -> u32 {
    (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap() as u32
}

/// The greedy answer to a prompt.
fn answer<D: Device>(decoder: &Decoder<D>, ids: &[u32], tokens: usize) -> Vec<u32> {
    let sequence = Allocator::new(PAGES).sequence(ids.len() + tokens).unwrap();
    let (mut pages, at) = (decoder.pages(PAGES).unwrap(), positions(0..ids.len()));
    let logits = decoder.forward(&mut pages, Pass::new(ids, &at, sequence.table())).unwrap();
    let (mut answer, mut logits) = (vec![largest(&logits)], logits);
    while answer.len() < tokens {
        let (last, position) = (answer[answer.len() - 1], (ids.len() + answer.len() - 1) as u32);
        let batch = Batch { ids: &[last], positions: &[position], tables: &[sequence.table()] };
        decoder.decode(&mut pages, batch, &mut logits).unwrap();
        answer.push(largest(&logits));
    }
    answer
}

/// Position-free KV of ids alone.
fn canonical<D: Device>(decoder: &Decoder<D>, ids: &[u32]) -> ChunkKv {
    let sequence = Allocator::new(PAGES).sequence(ids.len()).unwrap();
    let (mut export, at) = (Export::default(), positions(0..ids.len()));
    let pass =
        Pass { logits: Logits::None, export: Some(&mut export), ..Pass::new(ids, &at, sequence.table()) };
    decoder.forward(&mut decoder.pages(PAGES).unwrap(), pass).unwrap();
    export.finish(0, decoder.config().head_dim)
}

/// Two chunks placed in pages whose last owner is still being computed, and some of their rows recomputed: the last rows'
/// logits of both. Nothing waits on the host in between.
fn repaired<D: Device>(
    decoder: &Decoder<D>,
    chunks: &[ChunkKv; 2],
    ids: &[u32],
    by_layer: bool,
) -> [Vec<f32>; 2] {
    let allocator = Allocator::new(8);
    let mut pages = decoder.pages(8).unwrap();
    let of_other = allocator.sequence(8 * 16).unwrap();
    let mut other = decoder.walk(&[3; 100], positions(0..100), Logits::Last, 48).unwrap();
    while !other.done() {
        decoder.step(&mut pages, &mut other, of_other.table(), Default::default()).unwrap();
    }
    drop(of_other);
    let sequence = allocator.sequence(ids.len()).unwrap();
    let table = sequence.table();
    let first = chunks[0].tokens();
    let sections = [(&chunks[0], 0), (&chunks[1], first)];
    let rows = (0..ids.len()).filter(|&row| row % 5 == 2 || row >= first + chunks[1].tokens());
    let rows: Vec<u32> = rows.map(|row| row as u32).collect();
    let of_rows: Vec<u32> = rows.iter().map(|&row| ids[row as usize]).collect();
    let mut walk = decoder.walk(&of_rows, rows, Logits::Last, 16).unwrap();
    if !by_layer {
        decoder.place_all(&mut pages, table, &sections).unwrap();
    }
    while !walk.done() {
        if by_layer && walk.at_layer_start() {
            let at = At { layer: walk.layer(), table };
            let of_layer: Vec<_> =
                sections.iter().map(|(kv, start)| (kv.layer(at.layer).unwrap(), *start)).collect();
            decoder.place_sections(&mut pages, at, &of_layer).unwrap();
        }
        decoder.step(&mut pages, &mut walk, table, Default::default()).unwrap();
    }
    [other, walk].map(|walk| decoder.logits(walk).unwrap())
}

#[test]
fn every_family_is_certified_in_both_orders_of_the_streams() {
    for source in families() {
        for order in ORDERS {
            let Some(decoder) = emulated(&source, order, &options()) else { return };
            let certificate = certify(&decoder).unwrap_or_else(|error| panic!("{source:?}: {error}"));
            eprintln!("{:?}: {certificate}", source.config().unwrap().family);
        }
    }
}

#[test]
fn the_trained_model_is_certified_and_its_logits_and_answers_are_the_cpus() {
    let Some(decoder) = emulated(&tiny(), Order::CopiesLate, &options()) else { return };
    as_on_the_cpu(&decoder);
}

fn as_on_the_cpu(decoder: &Decoder<Cuda>) {
    let (cpu, ids) = (load(&tiny(), Cpu).unwrap().decoder, prompt());
    eprintln!("{}", certify(decoder).unwrap());
    let ids = &ids[..ids.len().min(96)];
    let (device, expected) = (prefill(decoder, ids), prefill(&cpu, ids));
    let error = relative_error(&device, &expected);
    eprintln!("{} rows: {error:.1e}", ids.len());
    assert!(error < OF_F32, "{error:.1e}");
    // The control: another token, three rows before the last.
    let mut other = ids.to_vec();
    let changed = ids.len() - 4;
    other[changed] = (other[changed] + 1) % cpu.config().vocab as u32;
    let last = expected.len() - cpu.config().vocab;
    let control = relative_error(&prefill(&cpu, &other)[last..], &expected[last..]);
    eprintln!("control: {control:.1e}");
    assert!(control > 2.0 * OF_F32, "{control:.1e}: the control is not told apart");
    assert_eq!(answer(decoder, ids, 6), answer(&cpu, ids, 6));
}

#[test]
fn placing_beside_computing_gives_the_same_bits_as_one_after_the_other() {
    let source = families().remove(0);
    let alone = Options { overlap: false, ..options() };
    let Some(plain) = emulated(&source, Order::CopiesLate, &alone) else { return };
    let ids: Vec<u32> = (0..90).map(|i| i * 37 % 160).collect();
    let chunks = [canonical(&plain, &ids[..35]), canonical(&plain, &ids[35..80])];
    assert!(matches!(chunks[0].layer(0).unwrap().elements(), Elements::Bf16(_)));
    let want = repaired(&plain, &chunks, &ids, false);
    assert!(want.iter().flatten().all(|value| value.is_finite()));
    for (order, by_layer) in ORDERS.into_iter().flat_map(|order| [(order, false), (order, true)]) {
        let decoder = emulated(&source, order, &options()).unwrap();
        assert!(repaired(&decoder, &chunks, &ids, by_layer) == want, "{order:?}, layer by layer: {by_layer}");
    }
    // And nothing of it is what no placing would give.
    let other = [canonical(&plain, &ids[1..36]), chunks[1].clone()];
    assert!(repaired(&plain, &other, &ids, false)[1] != want[1], "the control is not told apart");
}

#[test]
fn random_weights_made_on_the_device_are_the_hosts() {
    let source = families().remove(1);
    let Some(decoder) = emulated(&source, Order::CopiesLate, &options()) else { return };
    let ids: Vec<u32> = (0..20).map(|i| i * 11 % 160).collect();
    let cpu = prefill(&load(&source, Cpu).unwrap().decoder, &ids);
    assert!(relative_error(&prefill(&decoder, &ids), &cpu) < Precision::BF16.tolerance);
}

#[test]
fn a_model_that_does_not_fit_is_refused_before_anything_is_allocated() {
    let source = families().remove(0);
    let config = source.config().unwrap();
    let Some(machine) = machine(&config, Order::CopiesLate) else { return };
    let needed = Footprint::of(&config, PAGES, 48).total();
    let short = Options { memory_bytes: Some(needed - 1), ..options() };
    let error = Cuda::on(machine.clone(), &config, &short).unwrap_err();
    assert!(matches!(error, Error::TooLarge(_)), "{error}");
    assert_eq!(machine.used(), 0);
    let exact = Options { memory_bytes: Some(needed), ..options() };
    let decoder = load(&source, Cuda::on(machine, &config, &exact).unwrap()).unwrap().decoder;
    // What was computed before is enough for what is done: prompts of all pages, decoding, a certificate.
    certify(&decoder).unwrap();
    prefill(&decoder, &[5; PAGES * 16 / 2]);
    let (used, limit) = decoder.device().memory();
    assert!(used <= limit && limit == needed);
}

#[test]
fn a_prompt_without_memory_fails_alone_and_answers_go_on() {
    let source = families().remove(0);
    let config = source.config().unwrap();
    let Some(machine) = machine(&config, Order::CopiesLate) else { return };
    let memory_bytes = Some(Footprint::of(&config, PAGES, 48).total());
    let device = Cuda::on(machine, &config, &Options { memory_bytes, ..options() }).unwrap();
    let decoder = load(&source, device).unwrap().decoder;
    let ids = [9; 40];
    let before = answer(&decoder, &ids, 3);
    let mut held = Vec::new();
    let refused = loop {
        match decoder.walk(&[1; 4000], positions(0..4000), Logits::Last, 1000) {
            Ok(walk) => held.push(walk),
            Err(error) => break error,
        }
        assert!(held.len() < 1 << 16, "memory without end");
    };
    assert!(matches!(refused, Error::Device(DeviceError::OutOfMemory { .. })), "{refused}");
    assert!(!held.is_empty());
    assert_eq!(answer(&decoder, &ids, 3), before);
}

#[test]
fn a_device_that_broke_down_says_so_and_every_call_fails() {
    let source = families().remove(0);
    let config = source.config().unwrap();
    let Some(machine) = machine(&config, Order::CopiesLate) else { return };
    let device = Cuda::on(machine.clone(), &config, &options()).unwrap();
    let decoder = load(&source, device).unwrap().decoder;
    let (sequence, at) = (Allocator::new(PAGES).sequence(20).unwrap(), positions(0..20));
    let mut pages = decoder.pages(PAGES).unwrap();
    let mut pass = || decoder.forward(&mut pages, Pass::new(&[4; 20], &at, sequence.table()));
    pass().unwrap();
    assert!(!decoder.device().lost());
    machine.break_down();
    assert!(decoder.device().lost());
    assert!(matches!(pass(), Err(Error::Device(DeviceError::Fault(..)))));
}

#[test]
fn a_decoding_step_in_steady_state_allocates_nothing_on_the_device() {
    let source = families().remove(0);
    let Some(decoder) = emulated(&source, Order::CopiesLate, &options()) else { return };
    let sequence = Allocator::new(PAGES).sequence(60).unwrap();
    let (mut pages, mut logits) = (decoder.pages(PAGES).unwrap(), Vec::new());
    let mut used = Vec::new();
    for position in 0..20 {
        let batch = Batch { ids: &[position], positions: &[position], tables: &[sequence.table()] };
        decoder.decode(&mut pages, batch, &mut logits).unwrap();
        used.push(decoder.device().memory().0);
    }
    assert_eq!(used[17..], [used[17]; 3], "{used:?}");
}

#[test]
fn models_without_kernels_are_refused_by_name() {
    let config = Config::shape("aux-30m").unwrap();
    for (config, named) in [
        (Config { head_dim: 80, ..config.clone() }, "heads of 80 dimensions"),
        (Config { heads: 9, ..config.clone() }, "9 query heads do not share 4 KV heads"),
        (Config { hidden: 500, ..config.clone() }, "rows of 500 elements"),
    ] {
        let Some(machine) = machine(&families()[0].config().unwrap(), Order::CopiesLate) else { return };
        let error = Cuda::on(machine, &config, &options()).unwrap_err().to_string();
        assert!(error.contains(named), "{error}");
    }
}

#[cfg(feature = "cuda")]
mod gpu {
    use super::*;

    /// The first GPU with a model on it, or why there is none.
    fn open(source: &Source) -> Option<Decoder<Cuda>> {
        let libraries = std::env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("lib"));
        let kept = Some(PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("cuda-gpu"));
        match Cuda::open(&source.config().unwrap(), &Options { libraries, kept, ..options() }) {
            Ok(device) => Some(load(source, device).unwrap().decoder),
            Err(Error::Device(DeviceError::NoDevice(why))) if std::env::var_os("NEED_GPU").is_none() => {
                eprintln!("skipped: {why}");
                None
            }
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn every_family_is_certified_on_a_gpu() {
        for source in families() {
            let Some(decoder) = open(&source) else { return };
            eprintln!("{}: {}", decoder.device().description(), certify(&decoder).unwrap());
        }
    }

    #[test]
    fn the_trained_model_on_a_gpu_answers_as_on_the_cpu() {
        let Some(decoder) = open(&tiny()) else { return };
        as_on_the_cpu(&decoder);
    }

    #[test]
    fn placing_beside_computing_on_a_gpu_gives_the_same_bits_as_one_after_the_other() {
        let source = families().remove(0);
        let Some(decoder) = open(&source) else { return };
        let ids: Vec<u32> = (0..90).map(|i| i * 37 % 160).collect();
        let chunks = [canonical(&decoder, &ids[..35]), canonical(&decoder, &ids[35..80])];
        let want = repaired(&decoder, &chunks, &ids, true);
        for _ in 0..20 {
            assert!(repaired(&decoder, &chunks, &ids, false) == want);
        }
    }
}
