//! The measuring program on the emulated device: all it asks of a GPU, with figures that mean nothing. What it would report
//! is there, and what it reports about results is right.
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

#[allow(dead_code, reason = "other tests use the rest")]
#[path = "../../kernels/tests/cuda/emulated.rs"]
mod emulated;

use cacheclip_gpu_check::bed::{Bed, Room, options};
use cacheclip_gpu_check::budget::Deadline;
use cacheclip_gpu_check::parts::{self, Part, times};
use cacheclip_gpu_check::scale::Scale;
use cacheclip_gpu_check::work::{Sink, Work};
use cacheclip_kernels::cuda::Heads;
use cacheclip_kernels::cuda::timing::Stand;
use cacheclip_model::config::Config;
use cacheclip_model::cuda::Cuda;
use emulated::{Emulated, Order};
use serde_json::Value;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

/// Memory of the device.
const BYTES: usize = 1 << 30;
/// Little of everything: a fiber is no thread of a GPU.
const SCALE: Scale =
    Scale { lengths: &[64], telling: 64, rounds: 1, batches: &[1, 2], columns: 20, ..Scale::REHEARSAL };

/// A device, or why there is none. The first one compiles the kernels, and the others wait for it.
fn open(heads: Heads) -> anyhow::Result<Arc<Emulated>> {
    static COMPILING: Mutex<()> = Mutex::new(());
    let _compiling = COMPILING.lock().unwrap_or_else(PoisonError::into_inner);
    Emulated::open(heads, Order::CopiesLate, BYTES).ok_or_else(|| anyhow::anyhow!("no compiler"))
}

struct Emulation;

impl Bed for Emulation {
    type Device = Cuda;

    fn open(&self, config: &Config, room: Room) -> anyhow::Result<Cuda> {
        Ok(Cuda::on(open(times::heads(config))?, config, &options(room))?)
    }
}

/// What a part gives; none where there is no compiler, which says so.
fn given(part: impl FnOnce(&Work) -> anyhow::Result<()>) -> Option<Vec<Value>> {
    if open(times::heads(&SCALE.shape("qwen2.5-14b").unwrap())).is_err() {
        return None;
    }
    let rows = Arc::new(Mutex::new(Vec::new()));
    let work = Work {
        deadline: Deadline::within(3600.0),
        scale: SCALE,
        python: None,
        script: "".into(),
        models: Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny"),
        sink: Sink::Kept(Arc::clone(&rows)),
    };
    part(&work).unwrap();
    let rows = rows.lock().unwrap().clone();
    Some(rows)
}

fn kinds(rows: &[Value]) -> Vec<&str> {
    let mut kinds: Vec<&str> = rows.iter().map(|row| row["row"].as_str().unwrap()).collect();
    kinds.dedup();
    kinds
}

#[test]
fn every_kernel_is_timed_with_its_floor() {
    let Some(rows) = given(|work| times::run(work, |heads| Ok(Stand::new(open(heads)?)?))) else { return };
    let order = ["attend_rows", "attend_repair", "attend_question", "place", "scatter", "probe", "decode"];
    assert_eq!(kinds(&rows), order);
    assert_eq!(rows.iter().filter(|row| row["row"] == "place").count(), 3, "as stored in three ways");
    for row in &rows {
        assert!(
            row["floor_bytes"].as_u64().unwrap() > 0 && row["floor_flops"].as_u64().unwrap() > 0,
            "{row}"
        );
        assert_eq!(row["seconds"]["n"], 1, "{row}");
        assert!(row["of_copy"]["median"].as_f64().unwrap() > 0.0, "{row}");
        assert_eq!(row["of_flash"], Value::Null, "there is no peer");
    }
}

#[test]
fn reuse_and_what_hides_behind_it_are_reported() {
    let Some(rows) = given(|work| parts::run(Part::Prompts14b, &Emulation, work).map(|_| ())) else { return };
    assert_eq!(kinds(&rows), ["prompt", "from_store"]);
    let reuse = rows[0]["reuse"].as_array().unwrap();
    let realised: Vec<f64> = reuse.iter().map(|it| it["realised"].as_f64().unwrap()).collect();
    // Three ratios with one auxiliary model, two with the other. The first chunk is exact and not a candidate.
    assert_eq!(realised.len(), 5);
    assert!((realised[0] - 0.2).abs() < 0.02 && realised[2] == 0.0, "{realised:?}");
    // Two bytes an element: this is the KV as a CUDA device computes it.
    let shape = SCALE.shape("qwen2.5-14b").unwrap();
    let tokens = 64 + 16;
    assert_eq!(rows[0]["kv_bytes"], 2 * 2 * shape.layers * shape.kv_heads * shape.head_dim * tokens);
    let Some(rows) = given(|work| parts::run(Part::Overlap, &Emulation, work).map(|_| ())) else { return };
    assert_eq!(kinds(&rows), ["overlap"]);
    let layers = rows[0]["timeline"].as_array().unwrap().iter().map(|piece| piece["layer"].as_u64().unwrap());
    assert_eq!(layers.max(), Some(shape.layers as u64 - 1), "every layer is on the timeline");
}

#[test]
fn decoding_is_timed_at_every_batch_size() {
    let Some(rows) = given(|work| parts::run(Part::Decode, &Emulation, work).map(|_| ())) else { return };
    assert_eq!(rows.iter().map(|row| row["batch"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2]);
}
