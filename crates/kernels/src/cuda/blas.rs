//! cuBLAS, opened where it lies: six functions, and nothing linked.
//!
//! As with NVRTC: cudarc's binding aborts where the library is not found, and takes no folder.

use super::error::DeviceError;
use super::machine::Product;
use libloading::Library;
use std::ffi::{c_int, c_void};
use std::mem::ManuallyDrop;
use std::path::Path;
use std::ptr;

type Handle = *mut c_void;
type Create = unsafe extern "C" fn(*mut Handle) -> c_int;
type Destroy = unsafe extern "C" fn(Handle) -> c_int;
type SetStream = unsafe extern "C" fn(Handle, *mut c_void) -> c_int;
type SetWorkspace = unsafe extern "C" fn(Handle, *mut c_void, usize) -> c_int;
type Version = unsafe extern "C" fn(Handle, *mut c_int) -> c_int;
type GemmEx = unsafe extern "C" fn(
    Handle,
    c_int,
    c_int,
    c_int,
    c_int,
    c_int,
    *const c_void,
    *const c_void,
    c_int,
    c_int,
    *const c_void,
    c_int,
    c_int,
    *const c_void,
    *mut c_void,
    c_int,
    c_int,
    c_int,
    c_int,
) -> c_int;

/// Versions of the library whose functions have these signatures, newest first.
const MAJORS: [u32; 2] = [13, 12];
/// Bytes that cuBLAS computes in; what NVIDIA recommends for its newest devices.
pub(super) const WORKSPACE: usize = 32 << 20;

/// `cublasOperation_t`.
const AS_IT_IS: c_int = 0;
const TRANSPOSED: c_int = 1;
/// `cudaDataType_t`.
const F32: c_int = 0;
const BF16: c_int = 14;
/// `cublasComputeType_t`: sums in f32.
const COMPUTE_F32: c_int = 68;
/// `cublasGemmAlgo_t`: the library chooses.
const DEFAULT: c_int = -1;

/// The library with a handle on one stream.
#[derive(Debug)]
pub(super) struct Blas {
    handle: Handle,
    gemm: GemmEx,
    destroy: Destroy,
    version: u32,
    // The functions are its. Never closed: to open it again is what costs, and it has a state of its own in the context.
    _libraries: ManuallyDrop<Vec<Library>>,
}

// SAFETY: a handle may go from thread to thread; who shares it takes turns (a mutex).
unsafe impl Send for Blas {}

fn done(call: &'static str, status: c_int) -> Result<(), DeviceError> {
    if status == 0 {
        Ok(())
    } else {
        Err(DeviceError::Fault("use cuBLAS", format!("{call} gave status {status}")))
    }
}

impl Blas {
    /// Opens the library in `folder`, or wherever the loader finds it, for products in `stream`; the newest that a driver of
    /// this major version knows. The device's context is the thread's.
    pub(super) fn open(
        folder: Option<&Path>,
        driver: u32,
        stream: *mut c_void,
        workspace: u64,
    ) -> Result<Self, DeviceError> {
        let path = |name: String| folder.map_or_else(|| name.clone().into(), |folder| folder.join(&name));
        let mut missing = String::new();
        for major in MAJORS.into_iter().filter(|&major| major <= driver) {
            // It opens this second one by name: open before, it is found in a folder that the loader does not know.
            // SAFETY: NVIDIA's libraries do nothing when they are loaded.
            let lower = unsafe { Library::new(path(format!("libcublasLt.so.{major}"))) }.ok();
            // SAFETY: as above.
            match unsafe { Library::new(path(format!("libcublas.so.{major}"))) } {
                Ok(library) => return Self::with(library, lower, stream, workspace),
                Err(error) if missing.is_empty() => missing = error.to_string(),
                Err(_) => {}
            }
        }
        Err(DeviceError::Toolkit(format!("cuBLAS was not found: {missing}")))
    }

    fn with(
        library: Library,
        lower: Option<Library>,
        stream: *mut c_void,
        workspace: u64,
    ) -> Result<Self, DeviceError> {
        let lacks = |error: libloading::Error| DeviceError::Toolkit(format!("cuBLAS: {error}"));
        let (mut handle, mut version): (Handle, c_int) = (ptr::null_mut(), 0);
        // SAFETY: signatures are those of cublas_v2.h; the stream and the workspace are the device's and outlive the
        // handle, which their owner drops first.
        unsafe {
            let create = *library.get::<Create>(b"cublasCreate_v2").map_err(lacks)?;
            let destroy = *library.get::<Destroy>(b"cublasDestroy_v2").map_err(lacks)?;
            let set_stream = *library.get::<SetStream>(b"cublasSetStream_v2").map_err(lacks)?;
            let set_workspace = *library.get::<SetWorkspace>(b"cublasSetWorkspace_v2").map_err(lacks)?;
            let get_version = *library.get::<Version>(b"cublasGetVersion_v2").map_err(lacks)?;
            let gemm = *library.get::<GemmEx>(b"cublasGemmEx").map_err(lacks)?;
            done("cublasCreate", create(&mut handle))?;
            let libraries = [Some(library), lower].into_iter().flatten().collect();
            let mut blas =
                Self { handle, gemm, destroy, version: 0, _libraries: ManuallyDrop::new(libraries) };
            done("cublasSetStream", set_stream(handle, stream))?;
            // Behind the stream, which takes the workspace away.
            done("cublasSetWorkspace", set_workspace(handle, workspace as *mut c_void, WORKSPACE))?;
            done("cublasGetVersion", get_version(handle, &mut version))?;
            blas.version = version.unsigned_abs();
            Ok(blas)
        }
    }

    /// The library's version, as it numbers them.
    pub(super) fn version(&self) -> u32 {
        self.version
    }

    /// Puts a product into the stream.
    ///
    /// # Safety
    /// As [`multiply`](super::machine::Machine::multiply); the device's context is the thread's.
    pub(super) unsafe fn multiply(&mut self, product: &Product) -> Result<(), DeviceError> {
        let int = |value: u32| value.cast_signed();
        let (one, beta) = (1.0f32, if product.add { 1.0f32 } else { 0.0 });
        // Columns come first there: the transposed result is W · xᵀ, of a matrix that lies transposed.
        // SAFETY: the signature is that of cublas_v2.h; scalars are read before it returns, the rest is the caller's.
        let status = unsafe {
            (self.gemm)(
                self.handle,
                TRANSPOSED,
                AS_IT_IS,
                int(product.outputs),
                int(product.rows),
                int(product.inputs),
                ptr::from_ref(&one).cast(),
                product.weight as *const c_void,
                BF16,
                int(product.inputs),
                product.x as *const c_void,
                BF16,
                int(product.inputs),
                ptr::from_ref(&beta).cast(),
                product.out as *mut c_void,
                if product.wide { F32 } else { BF16 },
                int(product.outputs),
                COMPUTE_F32,
                DEFAULT,
            )
        };
        done("cublasGemmEx", status)
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        // SAFETY: the handle is this one's, and nobody has it any more.
        _ = unsafe { (self.destroy)(self.handle) };
    }
}
