//! A CUDA device with the kernels of one model loaded: how it is opened. What it does is in `driver.rs`.
//!
//! **Not run on a GPU yet**: it compiles against cudarc, and what is asked of it is tested on an emulated device.

use super::blas::{Blas, WORKSPACE};
pub use super::error::DeviceError;
use super::launch::{self, Launch};
use super::nvrtc::{Nvrtc, NvrtcError};
use super::{Heads, PROGRAMS};
use cudarc::driver::sys::{self, CUdevice_attribute_enum, CUfunction_attribute_enum, CUresult};
use cudarc::driver::{CudaContext, CudaEvent, CudaFunction, CudaStream, DriverError, result};
use cudarc::nvrtc::Ptx;
use std::collections::HashMap;
use std::ffi::c_void;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// The oldest driver that has all functions this calls, as drivers number themselves.
const OLDEST_DRIVER: u32 = 12_040;

impl From<NvrtcError> for DeviceError {
    fn from(error: NvrtcError) -> Self {
        Self::Toolkit(error.to_string())
    }
}

/// What the driver said, in one line.
pub(super) fn driver(what: &'static str) -> impl FnOnce(DriverError) -> DeviceError {
    move |error| match error.0 {
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => DeviceError::OutOfMemory { wanted: 0, used: 0, limit: 0 },
        _ => DeviceError::Fault(what, format!("{:?}", error.0)),
    }
}

/// Where compiled kernels and cuBLAS come from.
#[derive(Clone, Debug, Default)]
pub struct Toolkit {
    /// Folder with NVRTC's and cuBLAS's libraries; none where the loader finds them.
    pub libraries: Option<PathBuf>,
    /// Folder in which compiled kernels are kept. A machine that finds all of them there needs no NVRTC.
    pub kept: Option<PathBuf>,
}

impl Toolkit {
    /// Compiles the kernels for `heads` for a kind of device that need not be here, and keeps them; the files.
    ///
    /// # Errors
    /// No compiler, heads or a device that no kernels are for, or no folder to keep them in.
    pub fn keep(&self, heads: Heads, capability: (u32, u32)) -> Result<Vec<PathBuf>, DeviceError> {
        let options = heads.checked()?.options(capability)?;
        let none = || DeviceError::Toolkit("no folder to keep kernels in was named".into());
        let folder = self.kept.as_ref().ok_or_else(none)?;
        let mut nvrtc = None;
        let mut files = Vec::new();
        for program in PROGRAMS {
            cubin(program.name, &program.text(), &options, self, &mut nvrtc)?;
            let file = folder.join(kept_as(program.name, &program.text(), &options));
            if !file.is_file() {
                return Err(DeviceError::Toolkit(format!("cannot write {}", file.display())));
            }
            files.push(file);
        }
        Ok(files)
    }
}

/// A device with the kernels of one model, and two streams.
#[derive(Debug)]
pub struct Gpu {
    // Before the stream and the workspace that it uses.
    pub(super) blas: Mutex<Blas>,
    workspace: u64,
    /// By [`Stream`](super::machine::Stream).
    pub(super) streams: [Arc<CudaStream>; 2],
    pub(super) events: Mutex<Vec<Arc<CudaEvent>>>,
    functions: HashMap<&'static str, CudaFunction>,
    pub(super) context: Arc<CudaContext>,
    heads: Heads,
    multiprocessors: u32,
    pub(super) description: String,
}

impl Gpu {
    /// Opens a device and loads the kernels for `heads`, compiling those that are not kept.
    ///
    /// # Errors
    /// No driver, no device of that number, none that kernels are for, no cuBLAS, or no compiler where one is needed.
    pub fn open(ordinal: usize, heads: Heads, toolkit: &Toolkit) -> Result<Self, DeviceError> {
        let heads = heads.checked()?;
        let version = driver_version()?;
        let context = CudaContext::new(ordinal).map_err(|error| match error.0 {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => driver("open a device")(error),
            other => DeviceError::NoDevice(format!("the driver opens no device {ordinal}: {other:?}")),
        })?;
        let (major, minor) = context.compute_capability().map_err(driver("describe itself"))?;
        let multiprocessors = context
            .attribute(CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
            .map_err(driver("describe itself"))?
            .unsigned_abs();
        let name = context.name().map_err(driver("describe itself"))?;
        let options = heads.options((major.unsigned_abs(), minor.unsigned_abs()))?;
        let functions = functions(&context, version, heads, &options, toolkit)?;
        // What is placed is short, and the next layer's copy waits for it: its blocks go before those that compute, beside
        // which there is no room for them.
        let (least, greatest) = result::stream::get_priority_range().map_err(driver("make a stream"))?;
        let stream = |priority| context.new_stream_with_priority(priority).map_err(driver("make a stream"));
        let streams = [stream(least)?, stream(greatest)?];
        // SAFETY: memory of the device, freed when this is dropped.
        let workspace = unsafe { result::malloc_sync(WORKSPACE) }.map_err(driver("reserve a workspace"))?;
        let blas = Blas::open(
            toolkit.libraries.as_deref(),
            version / 1000,
            streams[0].cu_stream().cast(),
            workspace,
        )?;
        let description = format!(
            "{name}, compute capability {major}.{minor}, {multiprocessors} multiprocessors, driver of CUDA {}, cuBLAS {}",
            dotted(version),
            blas.version(),
        );
        Ok(Self {
            blas: Mutex::new(blas),
            workspace,
            streams,
            events: Mutex::default(),
            functions,
            context,
            heads,
            multiprocessors,
            description,
        })
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
            return Err(DeviceError::Fault("find a kernel", launch.kernel.into()));
        };
        self.context.bind_to_thread().map_err(driver("bind its context"))?;
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

impl Drop for Gpu {
    fn drop(&mut self) {
        _ = self.context.bind_to_thread();
        // SAFETY: it was allocated, and this waits for what uses it.
        _ = unsafe { result::free_sync(self.workspace) };
    }
}

/// CUDA's version as numbers have it: 13000 is 13.0.
fn dotted(version: u32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// The driver's version, once it is known to be there and to be new enough. cudarc panics where it is not, and has a way to
/// ask only where it is not linked to one.
fn driver_version() -> Result<u32, DeviceError> {
    // SAFETY: the driver's library does nothing when it is loaded.
    match unsafe { libloading::Library::new("libcuda.so.1") } {
        // It stays: to unload a driver and load it again gains nothing.
        Ok(library) => std::mem::forget(library),
        Err(error) => return Err(DeviceError::NoDevice(format!("no driver ({error})"))),
    }
    let mut version = 0;
    // SAFETY: it writes a number, and needs nothing before.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(driver("say its driver's version"))?;
    new_enough(version.unsigned_abs())
}

fn new_enough(version: u32) -> Result<u32, DeviceError> {
    if version < OLDEST_DRIVER {
        let (is, least) = (dotted(version), dotted(OLDEST_DRIVER));
        return Err(DeviceError::OldDriver(format!("it is of CUDA {is}, and this build needs {least}")));
    }
    Ok(version)
}

/// Every kernel, loaded.
fn functions(
    context: &Arc<CudaContext>,
    version: u32,
    heads: Heads,
    options: &[String],
    toolkit: &Toolkit,
) -> Result<HashMap<&'static str, CudaFunction>, DeviceError> {
    let mut nvrtc = None;
    let mut functions = HashMap::new();
    for program in PROGRAMS {
        let text = program.text();
        let code = cubin(program.name, &text, options, toolkit, &mut nvrtc)?;
        let loaded = context.load_module(Ptx::from_binary(code)).or_else(|error| {
            // Kept code of a newer compiler than this driver knows; one beside the driver may do.
            let here = Toolkit { kept: None, ..toolkit.clone() };
            match cubin(program.name, &text, options, &here, &mut nvrtc) {
                Ok(code) => context.load_module(Ptx::from_binary(code)),
                Err(_) => Err(error),
            }
        });
        let module = loaded.map_err(|error| {
            let by = nvrtc.as_ref().map_or_else(
                || "a toolkit that is not here".into(),
                |it: &Nvrtc| format!("NVRTC {}.{}", it.version().0, it.version().1),
            );
            let (name, is) = (program.name, dotted(version));
            DeviceError::OldDriver(format!(
                "it is of CUDA {is} and does not load {name}, compiled by {by} ({:?})",
                error.0
            ))
        })?;
        for kernel in program.kernels {
            let function = module.load_function(kernel).map_err(driver("find a kernel"))?;
            functions.insert(*kernel, function);
        }
    }
    if let Some(function) = functions.get("attend_rows") {
        // The one that has more shared memory than blocks get unasked.
        let wanted = CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let bytes = 2 * 2 * launch::ATTEND_TILE * heads.dim * 2;
        function.set_attribute(wanted, bytes.cast_signed()).map_err(driver("give a block its memory"))?;
    }
    Ok(functions)
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
            Err(error) => {
                assert_eq!(error.to_string().lines().count(), 1);
                assert!(matches!(error, DeviceError::NoDevice(_)), "{error}");
            }
        }
        let wrong = Gpu::open(0, Heads { dim: 80, ..heads }, &Toolkit::default()).unwrap_err();
        assert!(wrong.to_string().contains("80 dimensions"));
    }

    #[test]
    fn a_driver_that_is_too_old_is_told_apart_from_none() {
        assert_eq!(new_enough(13_000), Ok(13_000));
        let line = new_enough(12_020).unwrap_err().to_string();
        assert!(line.contains("of CUDA 12.2") && line.contains("needs 12.4"), "{line}");
    }

    #[test]
    fn a_toolkit_without_cublas_is_one_line() {
        let folder = tempfile::tempdir().unwrap();
        let error = Blas::open(Some(folder.path()), 13, std::ptr::null_mut(), 0).unwrap_err().to_string();
        assert!(error.starts_with("cuBLAS was not found: ") && error.lines().count() == 1, "{error}");
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
