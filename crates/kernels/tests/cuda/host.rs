//! The CUDA kernels as a library of the host, built when a test asks for it.

use cacheclip_kernels::cuda::Heads;
use libloading::{Library, Symbol};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Kernels compiled for the host.
pub(crate) struct Host(Library);

impl Host {
    /// Compiles the kernels for `heads`, or says why it does not.
    pub(crate) fn open(heads: Heads) -> Option<Self> {
        let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
        let version = match Command::new(&compiler).arg("--version").output() {
            Ok(output) if output.status.success() => output.stdout,
            other => {
                eprintln!("skipped: no C++ compiler ({compiler}: {other:?})");
                return None;
            }
        };
        // Another crate's tests may have this file as a module of theirs.
        let crate_dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernels");
        let (kernels, own) = (crate_dir.join("cuda"), crate_dir.join("tests/cuda"));
        let mut arguments: Vec<String> =
            "-std=c++17 -O2 -shared -fPIC -ffp-contract=off -Wall -Wextra -Werror -Wno-unknown-pragmas -DCACHECLIP_EMULATE"
                .split(' ')
                .map(String::from)
                .collect();
        arguments.push(format!("-DHEAD_DIM={}", heads.dim));
        arguments.push(format!("-DGROUP={}", heads.group()));
        let mut digest = blake3::Hasher::new();
        digest.update(&version).update(arguments.join(" ").as_bytes());
        for file in sources(&kernels).into_iter().chain(sources(&own)) {
            digest.update(&std::fs::read(file).unwrap());
        }
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cuda-host");
        std::fs::create_dir_all(&folder).unwrap();
        let library = folder.join(format!("{}.so", digest.finalize().to_hex()));
        if !library.exists() {
            // Under a name of its own: two tests may build at the same time.
            let built = tempfile::Builder::new().suffix(".so").tempfile_in(&folder).unwrap().into_temp_path();
            let output = Command::new(&compiler)
                .args(&arguments)
                .arg("-I")
                .arg(&kernels)
                .arg("-I")
                .arg(&own)
                .arg(own.join("host.cpp"))
                .arg("-o")
                .arg(&built)
                .output()
                .unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            built.persist(&library).unwrap();
        }
        // SAFETY: the library was built from this crate's sources and runs nothing when it is loaded.
        Some(Self(unsafe { Library::new(&library) }.unwrap()))
    }

    /// A function of the library.
    ///
    /// # Safety
    /// `F` is the function's type.
    pub(crate) unsafe fn function<F>(&self, name: &str) -> Symbol<'_, F> {
        // SAFETY: of the caller.
        unsafe { self.0.get(name.as_bytes()) }.unwrap()
    }
}

/// Files of a folder that take part in a build.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|file| {
        file.extension().is_some_and(|end| ["cu", "cuh", "cpp", "h"].iter().any(|e| end == *e))
    });
    files.sort();
    files
}
