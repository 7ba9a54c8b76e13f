//! What the CUDA kernels compute, on a GPU, against the CPU kernels: the comparisons of `cuda_emulated.rs`.
//!
//! Where there is no driver this says so and is skipped, unless `NEED_GPU` is set. **It has not run on a GPU
//! yet.**
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]
#![allow(unsafe_code, reason = "launches of kernels")]

#[path = "cuda/compare.rs"]
mod compare;
#[path = "cuda/rows.rs"]
mod rows;

use cacheclip_kernels::cuda::Heads;
use cacheclip_kernels::cuda::device::{DeviceError, Gpu, Toolkit};
use cacheclip_kernels::cuda::launch::{Address, Launch};
use compare::{Machine, Memory};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Qwen2.5-14B's, 7B's and 0.5B's attention, and the tiny pair's.
const MODELS: [Heads; 4] = [
    Heads { queries: 40, kv: 8, dim: 128 },
    Heads { queries: 28, kv: 4, dim: 128 },
    Heads { queries: 14, kv: 2, dim: 64 },
    Heads { queries: 4, kv: 2, dim: 32 },
];

struct Device {
    gpu: Gpu,
    stream: Arc<CudaStream>,
}

impl Machine for Device {
    fn upload(&self, bytes: &[u8]) -> Box<dyn Memory + '_> {
        Box::new(DeviceMemory { slice: self.stream.clone_htod(bytes).unwrap(), stream: &self.stream })
    }

    fn run(&self, launch: &Launch) {
        // SAFETY: the buffers are as long as on the emulated device, which watches them, and outlive this call.
        unsafe { self.gpu.launch(&self.stream, launch) }.unwrap();
        self.stream.synchronize().unwrap();
    }
}

struct DeviceMemory<'a> {
    slice: CudaSlice<u8>,
    stream: &'a Arc<CudaStream>,
}

impl Memory for DeviceMemory<'_> {
    fn address(&self) -> Address {
        let (address, _sync) = self.slice.device_ptr(self.stream);
        address
    }

    fn read(&self) -> Vec<u8> {
        self.stream.clone_dtoh(&self.slice).unwrap()
    }
}

/// Opens the first GPU for a model, or says why there is none.
fn open(heads: Heads) -> Option<Device> {
    // Where a program for another machine finds what lies elsewhere there: `scripts/cuda-build`.
    let named = |variable| std::env::var_os(variable).map(PathBuf::from);
    let libraries = named("CUDA_LIBRARIES").or_else(|| named("CUDA_HOME").map(|home| home.join("lib")));
    let kept =
        named("CUDA_KERNELS").or_else(|| Some(Path::new(env!("CARGO_TARGET_TMPDIR")).join("cuda-gpu")));
    let toolkit = Toolkit { libraries, kept };
    match Gpu::open(0, heads, &toolkit) {
        Ok(gpu) => {
            let stream = gpu.context().new_stream().unwrap();
            Some(Device { gpu, stream })
        }
        Err(error @ DeviceError::NoDevice(_)) if std::env::var_os("NEED_GPU").is_none() => {
            eprintln!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn on_each(test: impl Fn(&dyn Machine, Heads)) {
    for heads in MODELS {
        let Some(device) = open(heads) else { return };
        test(&device, heads);
    }
}

#[test]
fn place_writes_what_the_cpu_writes_bit_for_bit() {
    on_each(compare::place_writes_what_the_cpu_writes_bit_for_bit);
}

#[test]
fn scatter_writes_what_the_cpu_writes_bit_for_bit() {
    on_each(compare::scatter_writes_what_the_cpu_writes_bit_for_bit);
}

#[test]
fn attend_rows_is_the_cpus_attention_for_any_rows() {
    on_each(|machine, heads| compare::attend_rows_is_the_cpus_attention_for_any_rows(machine, heads, 2000));
}

#[test]
fn decode_is_the_cpus_attention_of_each_sequence() {
    on_each(compare::decode_is_the_cpus_attention_of_each_sequence);
}

#[test]
fn probe_reports_the_cpus_probabilities() {
    on_each(compare::probe_reports_the_cpus_probabilities);
}

#[test]
fn rows_are_gathered_biased_and_gated_as_the_cpu_does() {
    on_each(rows::rows_are_gathered_biased_and_gated_as_the_cpu_does);
}

#[test]
fn norms_are_the_cpus_norms() {
    on_each(rows::norms_are_the_cpus_norms);
}

#[test]
fn keys_and_values_leave_as_they_are_stored() {
    on_each(rows::keys_and_values_leave_as_they_are_stored);
}

#[test]
fn random_weights_are_the_hosts_bit_for_bit() {
    on_each(rows::random_weights_are_the_hosts_bit_for_bit);
}
