//! NVRTC, opened where it lies: seven functions, and nothing linked.
//!
//! The library is looked for in a folder, when one is named, because a toolkit from Python packages is in no place that
//! the loader knows. It opens a second library by name as soon as it compiles; opening that one before makes it found.

use libloading::Library;
use std::ffi::{CString, c_char, c_int, c_void};
use std::path::Path;
use std::ptr;

type Handle = *mut c_void;
type Create = unsafe extern "C" fn(
    *mut Handle,
    *const c_char,
    *const c_char,
    c_int,
    *const *const c_char,
    *const *const c_char,
) -> c_int;
type Compile = unsafe extern "C" fn(Handle, c_int, *const *const c_char) -> c_int;
type Size = unsafe extern "C" fn(Handle, *mut usize) -> c_int;
type Text = unsafe extern "C" fn(Handle, *mut c_char) -> c_int;
type Destroy = unsafe extern "C" fn(*mut Handle) -> c_int;
type Version = unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int;

/// The compiler.
#[derive(Debug)]
pub(crate) struct Nvrtc {
    library: Library,
    version: (u32, u32),
    _builtins: Option<Library>,
}

/// What a compilation gave.
#[derive(Debug)]
pub(crate) struct Compiled {
    /// Code for one kind of device.
    pub(crate) cubin: Vec<u8>,
    /// What the compiler said, registers and spills included.
    pub(crate) log: String,
}

/// Why nothing was compiled.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NvrtcError {
    /// No library, or one without a function that is needed.
    #[error("NVRTC was not found: {0}")]
    Missing(libloading::Error),
    /// The compiler refused; its log.
    #[error("{program} does not compile (NVRTC error {status}): {log}")]
    Refused { program: String, status: c_int, log: String },
    /// It failed elsewhere.
    #[error("{call} failed (NVRTC error {status})")]
    Failed { call: &'static str, status: c_int },
}

impl From<libloading::Error> for NvrtcError {
    fn from(error: libloading::Error) -> Self {
        Self::Missing(error)
    }
}

fn done(call: &'static str, status: c_int) -> Result<(), NvrtcError> {
    if status == 0 { Ok(()) } else { Err(NvrtcError::Failed { call, status }) }
}

/// Versions of the library that are known to compile these kernels, newest first.
const MAJORS: [u32; 2] = [13, 12];

impl Nvrtc {
    /// Opens the library in `folder`, or wherever the loader finds it.
    pub(crate) fn open(folder: Option<&Path>) -> Result<Self, NvrtcError> {
        let path = |name: String| folder.map_or_else(|| name.clone().into(), |folder| folder.join(&name));
        let mut missing = None;
        for major in MAJORS {
            // SAFETY: NVIDIA's library does nothing when it is loaded.
            match unsafe { Library::new(path(format!("libnvrtc.so.{major}"))) } {
                Ok(library) => {
                    let mut version = (0, 0);
                    // SAFETY: this is the function's signature in nvrtc.h, as are those below.
                    let status =
                        unsafe { library.get::<Version>(b"nvrtcVersion")?(&mut version.0, &mut version.1) };
                    done("nvrtcVersion", status)?;
                    let (major, minor) = version;
                    // Where the loader finds this by itself, it need not be opened here.
                    // SAFETY: as above.
                    let builtins =
                        unsafe { Library::new(path(format!("libnvrtc-builtins.so.{major}.{minor}"))) }.ok();
                    return Ok(Self { library, version: (major as u32, minor as u32), _builtins: builtins });
                }
                Err(error) => missing = missing.or(Some(error)),
            }
        }
        Err(missing.map_or(NvrtcError::Failed { call: "open", status: 0 }, NvrtcError::Missing))
    }

    /// The compiler's version.
    pub(crate) fn version(&self) -> (u32, u32) {
        self.version
    }

    /// Compiles one program.
    pub(crate) fn compile(&self, name: &str, text: &str, options: &[String]) -> Result<Compiled, NvrtcError> {
        let strings = |texts: &[&str]| -> Vec<CString> {
            // No text of ours has a zero byte; what comes after one would not be compiled.
            texts.iter().map(|text| CString::new(text.replace('\0', " ")).unwrap_or_default()).collect()
        };
        let source = strings(&[text, name]);
        let options = strings(&options.iter().map(String::as_str).collect::<Vec<_>>());
        let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        let mut handle: Handle = ptr::null_mut();
        // SAFETY: signatures are those of nvrtc.h; pointers are to values that live until the call returns.
        unsafe {
            let create = self.library.get::<Create>(b"nvrtcCreateProgram")?;
            let status =
                create(&mut handle, source[0].as_ptr(), source[1].as_ptr(), 0, ptr::null(), ptr::null());
            done("nvrtcCreateProgram", status)?;
            let result = self.finish(name, handle, &options);
            self.library.get::<Destroy>(b"nvrtcDestroyProgram")?(&mut handle);
            result
        }
    }

    /// # Safety
    /// `handle` is a program, `options` are strings.
    unsafe fn finish(
        &self,
        name: &str,
        handle: Handle,
        options: &[*const c_char],
    ) -> Result<Compiled, NvrtcError> {
        // SAFETY: as in `compile`.
        unsafe {
            let compile = self.library.get::<Compile>(b"nvrtcCompileProgram")?;
            let status = compile(handle, options.len() as c_int, options.as_ptr());
            let log = self.bytes(handle, b"nvrtcGetProgramLogSize", b"nvrtcGetProgramLog")?;
            let log = String::from_utf8_lossy(&log).trim_end_matches('\0').trim().to_string();
            if status != 0 {
                return Err(NvrtcError::Refused { program: name.into(), status, log });
            }
            let cubin = self.bytes(handle, b"nvrtcGetCUBINSize", b"nvrtcGetCUBIN")?;
            Ok(Compiled { cubin, log })
        }
    }

    /// # Safety
    /// `handle` is a program; `text` writes as many bytes as `size` says.
    unsafe fn bytes(&self, handle: Handle, size: &[u8], text: &[u8]) -> Result<Vec<u8>, NvrtcError> {
        let mut length = 0;
        // SAFETY: as in `compile`; the buffer is as long as the library asked for.
        unsafe {
            done("nvrtcGet…Size", self.library.get::<Size>(size)?(handle, &mut length))?;
            let mut bytes = vec![0u8; length];
            done("nvrtcGet…", self.library.get::<Text>(text)?(handle, bytes.as_mut_ptr().cast()))?;
            Ok(bytes)
        }
    }
}
