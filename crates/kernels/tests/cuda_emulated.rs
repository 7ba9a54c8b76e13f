//! What the CUDA kernels compute, on an emulated device, against the CPU kernels.
//!
//! The text that runs is the text that NVRTC compiles, but for the instructions in `cuda/warp.cuh`. `cuda_gpu.rs` makes the
//! same comparisons on a GPU.
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]
#![allow(unsafe_code, reason = "functions of a C++ library")]

#[path = "cuda/compare.rs"]
mod compare;
#[path = "cuda/host.rs"]
mod host;
#[path = "cuda/rows.rs"]
mod rows;

use cacheclip_kernels::cuda::Heads;
use cacheclip_kernels::cuda::launch::{Address, Launch};
use compare::{Machine, Memory};
use host::Host;
use std::cell::UnsafeCell;
use std::ffi::{CString, c_char, c_int, c_uint, c_void};

/// The tiny pair's, Qwen2.5-14B's and Qwen2.5-7B's groups.
const MODELS: [Heads; 3] = [
    Heads { queries: 4, kv: 2, dim: 32 },
    Heads { queries: 10, kv: 2, dim: 128 },
    Heads { queries: 7, kv: 1, dim: 64 },
];

type Emulated = unsafe extern "C" fn(
    *const c_char,
    *const c_uint,
    c_uint,
    c_uint,
    *mut *mut c_void,
    c_uint,
    c_int,
) -> c_int;

/// A device whose addresses are the host's.
struct Device {
    kernels: Host,
    /// Whether asynchronous copies happen as late as they may, or at once.
    late: bool,
}

impl Machine for Device {
    fn upload(&self, bytes: &[u8]) -> Box<dyn Memory + '_> {
        let words = bytes.chunks(16).map(|chunk| {
            let mut word = [0; 16];
            word[..chunk.len()].copy_from_slice(chunk);
            u128::from_le_bytes(word)
        });
        Box::new(HostMemory(UnsafeCell::new(words.collect()), bytes.len()))
    }

    fn run(&self, launch: &Launch) {
        let name = CString::new(launch.kernel).unwrap();
        let mut slots = launch.arguments.slots().to_vec();
        let mut addresses: Vec<*mut c_void> =
            slots.iter_mut().map(|slot| (slot as *mut u64).cast()).collect();
        // SAFETY: the type is that of `emulated` in host.cpp; buffers live as long as the tests that made them.
        let status = unsafe {
            self.kernels.function::<Emulated>("emulated")(
                name.as_ptr(),
                launch.grid.as_ptr(),
                launch.threads,
                launch.shared,
                addresses.as_mut_ptr(),
                addresses.len() as c_uint,
                self.late.into(),
            )
        };
        assert_eq!(status, 0, "{} with {} arguments", launch.kernel, slots.len());
    }
}

/// Memory that kernels write through its address: on 16 bytes, which is what a `u128` is on.
struct HostMemory(UnsafeCell<Vec<u128>>, usize);

impl Memory for HostMemory {
    fn address(&self) -> Address {
        // SAFETY: no reference to the vector lives across a call.
        unsafe { &mut *self.0.get() }.as_mut_ptr() as Address
    }

    fn read(&self) -> Vec<u8> {
        // SAFETY: as above, and no kernel is running.
        let words = unsafe { &*self.0.get() };
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.truncate(self.1);
        bytes
    }
}

/// `late`: the ways of copying that a kernel must be right with; those that do not copy asynchronously need one.
fn on_each(late: &[bool], test: impl Fn(&dyn Machine, Heads)) {
    for heads in MODELS {
        for &late in late {
            let Some(kernels) = Host::open(heads.checked().unwrap()) else { return };
            test(&Device { kernels, late }, heads);
        }
    }
}

#[test]
fn place_writes_what_the_cpu_writes_bit_for_bit() {
    on_each(&[false], compare::place_writes_what_the_cpu_writes_bit_for_bit);
}

#[test]
fn scatter_writes_what_the_cpu_writes_bit_for_bit() {
    on_each(&[false], compare::scatter_writes_what_the_cpu_writes_bit_for_bit);
}

#[test]
fn attend_rows_is_the_cpus_attention_for_any_rows() {
    on_each(&[false, true], |machine, heads| {
        compare::attend_rows_is_the_cpus_attention_for_any_rows(machine, heads, 205);
    });
}

#[test]
fn decode_is_the_cpus_attention_of_each_sequence() {
    on_each(&[false], compare::decode_is_the_cpus_attention_of_each_sequence);
}

#[test]
fn probe_reports_the_cpus_probabilities() {
    on_each(&[false], compare::probe_reports_the_cpus_probabilities);
}

#[test]
fn rows_are_gathered_biased_and_gated_as_the_cpu_does() {
    on_each(&[false], rows::rows_are_gathered_biased_and_gated_as_the_cpu_does);
}

#[test]
fn norms_are_the_cpus_norms() {
    on_each(&[false], rows::norms_are_the_cpus_norms);
}

#[test]
fn keys_and_values_leave_as_they_are_stored() {
    on_each(&[false], rows::keys_and_values_leave_as_they_are_stored);
}

#[test]
fn random_weights_are_the_hosts_bit_for_bit() {
    on_each(&[false], rows::random_weights_are_the_hosts_bit_for_bit);
}
