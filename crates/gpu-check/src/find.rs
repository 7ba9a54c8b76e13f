//! Where things lie: beside the program, as `scripts/cuda-build` puts them; CUDA's libraries, wherever a machine has them.

use crate::budget::Deadline;
use crate::conduct::end_within;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What a folder with CUDA's libraries holds.
const LIBRARY: &str = "libcublas.so.";
/// Seconds to wait for Python.
const PATIENCE: f64 = 20.0;

/// A file or folder beside the program, if it is there.
pub fn beside(name: &str) -> Option<PathBuf> {
    let program = std::env::current_exe().ok()?;
    Some(program.with_file_name(name)).filter(|path| path.exists())
}

/// The folder with CUDA's libraries, where they are not where the loader looks anyway: a toolkit's, or those that came
/// with PyTorch.
pub fn libraries(python: Option<&Path>) -> Option<PathBuf> {
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(std::env::var_os).map(PathBuf::from);
    let toolkits = homes.chain([PathBuf::from("/usr/local/cuda")]);
    let folders = toolkits.flat_map(|home| ["lib64", "lib"].map(|lib| home.join(lib)));
    folders.chain(python.and_then(of_python)).find(|folder| holds(folder))
}

/// Whether a folder has the library.
fn holds(folder: &Path) -> bool {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.into_iter().any(|entry| entry.file_name().to_string_lossy().starts_with(LIBRARY))
}

/// Where Python's packages keep them.
fn of_python(python: &Path) -> Option<PathBuf> {
    let says = "import sysconfig; print(sysconfig.get_path('purelib'))";
    let mut child = Command::new(python)
        .args(["-c", says])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    end_within(&mut child, Deadline::within(PATIENCE)).ok()??;
    let mut said = String::new();
    child.stdout.take()?.read_to_string(&mut said).ok()?;
    let packages = Path::new(said.trim()).join("nvidia");
    // One folder for all since CUDA 13, one for each library before.
    let mut folders: Vec<PathBuf> =
        std::fs::read_dir(packages).ok()?.flatten().map(|entry| entry.path().join("lib")).collect();
    folders.sort();
    folders.into_iter().rev().find(|folder| holds(folder))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_found_among_pythons_packages() {
        let folder = tempfile::tempdir().unwrap();
        let lib = folder.path().join("nvidia/cu13/lib");
        std::fs::create_dir_all(&lib).unwrap();
        let python = folder.path().join("python");
        let text = format!("#!/bin/sh\necho {}\n", folder.path().display());
        std::fs::write(&python, text).unwrap();
        let mut mode = std::fs::metadata(&python).unwrap().permissions();
        std::os::unix::fs::PermissionsExt::set_mode(&mut mode, 0o755);
        std::fs::set_permissions(&python, mode).unwrap();
        assert_eq!(of_python(&python), None, "nothing lies there yet");
        std::fs::write(lib.join("libcublas.so.13"), "").unwrap();
        assert_eq!(of_python(&python), Some(lib));
        assert_eq!(of_python(Path::new("/no/such/python")), None);
    }
}
