//! Every CUDA program, compiled by NVRTC for every kind of device, without a GPU.
//!
//! The toolkit is taken from `CUDA_HOME`, or from `target/cuda`, where `scripts/cuda-toolkit` puts it. Without one this says
//! so and is skipped, unless `NEED_NVRTC` is set, as in CI. What was compiled once is not compiled again: the
//! results are kept under a digest of text, options and compiler.
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]
#![allow(unsafe_code, reason = "functions of NVRTC")]

#[allow(dead_code, reason = "the device module uses the rest")]
#[path = "../src/cuda/nvrtc.rs"]
mod nvrtc;

use cacheclip_kernels::cuda::{Heads, PROGRAMS};
use nvrtc::Nvrtc;
use std::path::{Path, PathBuf};

const CAPABILITIES: [(u32, u32); 3] = [(8, 0), (9, 0), (10, 0)];
/// Qwen2.5-14B and 7B, Llama-3 8B, a 0.5B shape, and the tiny pair.
const MODELS: [Heads; 5] = [
    Heads { queries: 40, kv: 8, dim: 128 },
    Heads { queries: 28, kv: 4, dim: 128 },
    Heads { queries: 32, kv: 8, dim: 128 },
    Heads { queries: 14, kv: 2, dim: 64 },
    Heads { queries: 4, kv: 2, dim: 32 },
];
/// Registers of a thread that let a block of 256 threads run.
const REGISTERS: u64 = 255;

/// Folders a toolkit may have its libraries in.
fn folders() -> Vec<PathBuf> {
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(std::env::var_os).map(PathBuf::from);
    // `CARGO_TARGET_TMPDIR` is `target/tmp`.
    let own = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("cuda").join("home");
    homes
        .chain([own])
        .flat_map(|home| ["lib", "lib64"].map(|lib| home.join(lib)))
        .filter(|lib| lib.is_dir())
        .collect()
}

fn open() -> Option<Nvrtc> {
    let places = folders();
    let tried = places.iter().map(|folder| Nvrtc::open(Some(folder))).chain([Nvrtc::open(None)]);
    let mut last = None;
    for nvrtc in tried {
        match nvrtc {
            Ok(nvrtc) => return Some(nvrtc),
            Err(error) => last = Some(error),
        }
    }
    let why = last.map(|error| error.to_string()).unwrap_or_default();
    assert!(std::env::var_os("NEED_NVRTC").is_none(), "{why}");
    eprintln!(
        "skipped: {why}; scripts/cuda-toolkit installs one under target/cuda, and CUDA_HOME names another"
    );
    None
}

/// Numbers that stand before `what` in the compiler's log.
fn numbers(log: &str, what: &str) -> Vec<u64> {
    let before = |(at, _): (usize, &str)| log[..at].trim_end().rsplit(' ').next()?.parse().ok();
    log.match_indices(what).filter_map(before).collect()
}

#[test]
fn every_program_compiles_for_every_device_without_spilling() {
    let Some(nvrtc) = open() else { return };
    let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cuda-log");
    std::fs::create_dir_all(&kept).unwrap();
    let mut fresh = 0;
    for capability in CAPABILITIES {
        for heads in MODELS {
            let options = heads.checked().unwrap().options(capability).unwrap();
            for program in PROGRAMS {
                let text = program.text();
                let key = format!("{:?} {options:?} {text}", nvrtc.version());
                let file = kept.join(format!("{}.log", blake3::hash(key.as_bytes()).to_hex()));
                let log = std::fs::read_to_string(&file).unwrap_or_else(|_| {
                    let compiled =
                        nvrtc.compile(program.name, &text, &options).unwrap_or_else(|e| panic!("{e}"));
                    assert_eq!(&compiled.cubin[..4], b"\x7fELF", "{}", program.name);
                    for kernel in program.kernels {
                        let name = format!(".text.{kernel}\0");
                        assert!(
                            compiled.cubin.windows(name.len()).any(|bytes| bytes == name.as_bytes()),
                            "{} has no {kernel}",
                            program.name
                        );
                    }
                    fresh += 1;
                    std::fs::write(&file, &compiled.log).unwrap();
                    compiled.log
                });
                let (spills, registers) = (numbers(&log, " bytes spill stores"), numbers(&log, " registers"));
                assert_eq!(spills.len(), program.kernels.len(), "the log changed its form: {log}");
                assert_eq!(registers.len(), program.kernels.len(), "the log changed its form: {log}");
                assert!(
                    spills.iter().all(|&bytes| bytes == 0),
                    "{} for {heads:?} on {capability:?} spills: {log}",
                    program.name
                );
                assert!(registers.iter().all(|&count| count <= REGISTERS), "{log}");
                assert!(!log.contains("warning"), "{log}");
            }
        }
    }
    let all = CAPABILITIES.len() * MODELS.len() * PROGRAMS.len();
    eprintln!("NVRTC {:?}: {all} programs, {fresh} of them compiled now", nvrtc.version());
}

#[test]
fn what_does_not_compile_says_where() {
    let Some(nvrtc) = open() else { return };
    let options = MODELS[0].options((9, 0)).unwrap();
    let error = nvrtc.compile("wrong.cu", "__global__ void wrong() { nonsense(); }", &options).unwrap_err();
    let line = error.to_string();
    assert!(line.contains("wrong.cu(1): error") && line.contains("nonsense"), "{line}");
}
