//! A CUDA device with the kernels of one model loaded.
//!
//! **Not run on a GPU yet**: it compiles against cudarc, and the launches it makes are tested on an emulated device.

use super::launch::Launch;
use super::nvrtc::{Nvrtc, NvrtcError};
use super::{Heads, PROGRAMS, Unsupported};
use cudarc::driver::sys::{CUdevice_attribute_enum, CUfunction_attribute_enum};
use cudarc::driver::{CudaContext, CudaFunction, CudaStream, DriverError, result};
use cudarc::nvrtc::Ptx;
use std::collections::HashMap;
use std::ffi::c_void;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Shared memory that a block may have without asking for it.
const SHARED_UNASKED: u32 = 48 << 10;

/// Why there is no device, or why it did not do what it was told.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The driver's library is not on this machine.
    #[error("no CUDA driver: libcuda.so.1 was not found")]
    NoDriver,
    /// The driver refused.
    #[error("the CUDA driver failed to {0}: {1:?}")]
    Driver(&'static str, DriverError),
    /// No kernels for this model or device.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    /// Kernels could not be compiled.
    #[error("{0}")]
    Compiler(String),
    /// Code was compiled that this driver does not take.
    #[error("the CUDA driver does not load {0}: it is older than the toolkit that compiled it ({1:?})")]
    Load(&'static str, DriverError),
}

impl From<NvrtcError> for DeviceError {
    fn from(error: NvrtcError) -> Self {
        Self::Compiler(error.to_string())
    }
}

fn driver(what: &'static str) -> impl FnOnce(DriverError) -> DeviceError {
    move |error| DeviceError::Driver(what, error)
}

/// Where compiled kernels come from.
#[derive(Clone, Debug, Default)]
pub struct Toolkit {
    /// Folder with NVRTC's libraries; none where the loader finds them.
    pub libraries: Option<PathBuf>,
    /// Folder in which compiled kernels are kept. A machine that finds all of them there needs no NVRTC.
    pub kept: Option<PathBuf>,
}

/// A device with the kernels of one model.
#[derive(Debug)]
pub struct Gpu {
    context: Arc<CudaContext>,
    functions: HashMap<&'static str, CudaFunction>,
    heads: Heads,
    multiprocessors: u32,
}

impl Gpu {
    /// Opens a device and loads the kernels for `heads`, compiling those that are not kept.
    ///
    /// # Errors
    /// No driver, no device of that number, none that kernels are for, or no compiler where one is needed.
    pub fn open(ordinal: usize, heads: Heads, toolkit: &Toolkit) -> Result<Self, DeviceError> {
        let heads = heads.checked()?;
        // cudarc panics where there is no driver, and has a way to ask only where it is not linked to one.
        // SAFETY: the driver's library does nothing when it is loaded.
        let Ok(_driver) = (unsafe { libloading::Library::new("libcuda.so.1") }) else {
            return Err(DeviceError::NoDriver);
        };
        let context = CudaContext::new(ordinal).map_err(driver("open a device"))?;
        let (major, minor) = context.compute_capability().map_err(driver("describe the device"))?;
        let multiprocessors = context
            .attribute(CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
            .map_err(driver("describe the device"))?;
        let options = heads.options((major.unsigned_abs(), minor.unsigned_abs()))?;
        let mut nvrtc = None;
        let mut functions = HashMap::new();
        for program in PROGRAMS {
            let cubin = cubin(program.name, &program.text(), &options, toolkit, &mut nvrtc)?;
            let module = context
                .load_module(Ptx::from_binary(cubin))
                .map_err(|error| DeviceError::Load(program.name, error))?;
            for kernel in program.kernels {
                let function = module.load_function(kernel).map_err(driver("find a kernel"))?;
                functions.insert(*kernel, function);
            }
        }
        Ok(Self { context, functions, heads, multiprocessors: multiprocessors.unsigned_abs() })
    }

    /// The device's context: for streams and memory.
    pub fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    /// What the kernels are for.
    pub fn heads(&self) -> Heads {
        self.heads
    }

    /// Multiprocessors, by which launches are split.
    pub fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    /// Puts a launch into a stream. An empty grid is no launch.
    ///
    /// # Errors
    /// The driver refused; or a launch before it failed.
    ///
    /// # Safety
    /// The addresses are of buffers on this device, as long as the kernel's file says, and nothing frees or moves them
    /// before the stream has come past the launch.
    pub unsafe fn launch(&self, stream: &CudaStream, launch: &Launch) -> Result<(), DeviceError> {
        if launch.grid.contains(&0) {
            return Ok(());
        }
        let Some(function) = self.functions.get(launch.kernel) else {
            return Err(DeviceError::Compiler(format!("no kernel {}", launch.kernel)));
        };
        self.context.bind_to_thread().map_err(driver("bind its context"))?;
        if launch.shared > SHARED_UNASKED {
            let wanted = CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function
                .set_attribute(wanted, launch.shared.cast_signed())
                .map_err(driver("give a block its shared memory"))?;
        }
        let slots = launch.arguments.slots();
        let mut addresses: Vec<*mut c_void> =
            slots.iter().map(|slot| std::ptr::from_ref(slot).cast_mut().cast()).collect();
        let [x, y, z] = launch.grid;
        // SAFETY: the driver copies the arguments before it returns; what they point to is the caller's promise.
        unsafe {
            result::launch_kernel(
                function.cu_function(),
                (x, y, z),
                (launch.threads, 1, 1),
                launch.shared,
                stream.cu_stream(),
                &mut addresses,
            )
        }
        .map_err(driver(launch.kernel))
    }
}

/// Code of a program: kept, or compiled now and then kept.
fn cubin(
    name: &str,
    text: &str,
    options: &[String],
    toolkit: &Toolkit,
    nvrtc: &mut Option<Nvrtc>,
) -> Result<Vec<u8>, DeviceError> {
    let file = toolkit.kept.as_ref().map(|folder| folder.join(kept_as(name, text, options)));
    if let Some(cubin) = file.as_ref().and_then(|file| std::fs::read(file).ok()) {
        return Ok(cubin);
    }
    let nvrtc = match nvrtc {
        Some(nvrtc) => nvrtc,
        None => nvrtc.insert(Nvrtc::open(toolkit.libraries.as_deref())?),
    };
    let compiled = nvrtc.compile(name, text, options)?;
    if let Some(file) = file {
        keep(&file, &compiled.cubin);
    }
    Ok(compiled.cubin)
}

/// Name under which a program's code is kept: everything it depends on but the compiler, whose every version will do.
fn kept_as(name: &str, text: &str, options: &[String]) -> String {
    // FNV-1a: of files that we write ourselves, and no defence is needed.
    let bytes = options.iter().map(String::as_str).chain([text]).flat_map(|part| part.bytes().chain([0]));
    let digest = bytes
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    format!("{name}-{digest:016x}.cubin")
}

/// Keeps code for the next start. A folder that cannot be written to costs compiling again, and nothing else.
fn keep(file: &Path, cubin: &[u8]) {
    let beside = file.with_extension(format!("{}.part", std::process::id()));
    let written = file.parent().map_or(Ok(()), std::fs::create_dir_all);
    let written =
        written.and_then(|()| std::fs::write(&beside, cubin)).and_then(|()| std::fs::rename(&beside, file));
    if written.is_err() {
        _ = std::fs::remove_file(&beside);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_gpu_is_told_so_in_one_line() {
        let heads = Heads { queries: 4, kv: 2, dim: 32 };
        match Gpu::open(0, heads, &Toolkit::default()) {
            // A GPU machine: the comparison tests are for that.
            Ok(_) => eprintln!("skipped: this machine has a GPU"),
            Err(error) => assert_eq!(error.to_string().lines().count(), 1),
        }
        let wrong = Gpu::open(0, Heads { dim: 80, ..heads }, &Toolkit::default()).unwrap_err();
        assert!(wrong.to_string().contains("80 dimensions"));
    }

    #[test]
    fn what_is_kept_depends_on_text_and_options() {
        let options = |cap| Heads { queries: 4, kv: 2, dim: 32 }.options(cap).unwrap();
        let name = kept_as("place.cu", "text", &options((9, 0)));
        assert_ne!(name, kept_as("place.cu", "texts", &options((9, 0))));
        assert_ne!(name, kept_as("place.cu", "text", &options((8, 0))));
        let folder = tempfile::tempdir().unwrap();
        let toolkit = Toolkit { kept: Some(folder.path().join("new")), ..Toolkit::default() };
        keep(&folder.path().join("new").join(&name), b"code");
        // Found, so that no compiler is looked for.
        let found = cubin("place.cu", "text", &options((9, 0)), &toolkit, &mut None).unwrap();
        assert_eq!(found, b"code");
    }
}
