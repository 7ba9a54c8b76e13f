//! The machine that the driver is: each call is one of the driver's.

use super::Heads;
use super::device::{Gpu, driver};
use super::error::DeviceError;
use super::launch::{Address, Launch};
use super::machine::{Event, Machine, Product, Stream};
use cudarc::driver::sys::{self, CUevent_flags_enum, CUresult};
use cudarc::driver::{CudaEvent, DriverError, result};
use std::slice;
use std::sync::{Arc, MutexGuard, PoisonError};

impl Gpu {
    fn bound(&self) -> Result<(), DeviceError> {
        self.context.bind_to_thread().map_err(driver("bind its context"))
    }

    fn all_events(&self) -> MutexGuard<'_, Vec<Arc<CudaEvent>>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn of(&self, event: Event) -> Result<Arc<CudaEvent>, DeviceError> {
        let found = self.all_events().get(event.0 as usize).cloned();
        found.ok_or_else(|| DeviceError::Fault("find an event", event.0.to_string()))
    }
}

impl Machine for Gpu {
    fn heads(&self) -> Heads {
        Gpu::heads(self)
    }

    fn multiprocessors(&self) -> u32 {
        Gpu::multiprocessors(self)
    }

    fn description(&self) -> String {
        self.description.clone()
    }

    fn free_memory(&self) -> Result<u64, DeviceError> {
        let (free, _) = self.context.mem_get_info().map_err(driver("say what memory is free"))?;
        Ok(free as u64)
    }

    fn allocate(&self, bytes: usize) -> Result<Address, DeviceError> {
        self.bound()?;
        // SAFETY: the driver checks the size.
        unsafe { result::malloc_sync(bytes) }.map_err(driver("reserve memory"))
    }

    unsafe fn free(&self, address: Address) {
        // A device that is lost frees everything by itself.
        _ = self.bound();
        // SAFETY: of the caller.
        _ = unsafe { result::free_sync(address) };
    }

    fn pin(&self, bytes: usize) -> Result<*mut u8, DeviceError> {
        self.bound()?;
        // SAFETY: the driver checks the size.
        let memory = unsafe { result::malloc_host(bytes, 0) }.map_err(driver("lock host memory"))?;
        Ok(memory.cast())
    }

    unsafe fn unpin(&self, memory: *mut u8) {
        _ = self.bound();
        // SAFETY: of the caller.
        _ = unsafe { result::free_host(memory.cast()) };
    }

    unsafe fn launch(&self, stream: Stream, launch: &Launch) -> Result<(), DeviceError> {
        // SAFETY: of the caller.
        unsafe { Gpu::launch(self, &self.streams[stream as usize], launch) }
    }

    unsafe fn multiply(&self, product: &Product) -> Result<(), DeviceError> {
        self.bound()?;
        let mut blas = self.blas.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: of the caller.
        unsafe { blas.multiply(product) }
    }

    unsafe fn upload(
        &self,
        stream: Stream,
        to: Address,
        from: *const u8,
        bytes: usize,
    ) -> Result<(), DeviceError> {
        if bytes == 0 {
            return Ok(());
        }
        self.bound()?;
        // SAFETY: of the caller.
        unsafe {
            let from = slice::from_raw_parts(from, bytes);
            result::memcpy_htod_async(to, from, self.streams[stream as usize].cu_stream())
        }
        .map_err(driver("copy to itself"))
    }

    unsafe fn download(
        &self,
        stream: Stream,
        to: *mut u8,
        from: Address,
        bytes: usize,
    ) -> Result<(), DeviceError> {
        if bytes == 0 {
            return Ok(());
        }
        self.bound()?;
        // SAFETY: of the caller.
        unsafe {
            let to = slice::from_raw_parts_mut(to, bytes);
            result::memcpy_dtoh_async(to, from, self.streams[stream as usize].cu_stream())
        }
        .map_err(driver("copy to the host"))
    }

    unsafe fn copy(
        &self,
        stream: Stream,
        to: Address,
        from: Address,
        bytes: usize,
    ) -> Result<(), DeviceError> {
        self.bound()?;
        // SAFETY: of the caller.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.streams[stream as usize].cu_stream()) }
            .map_err(driver("copy inside itself"))
    }

    fn event(&self) -> Result<Event, DeviceError> {
        let flags = CUevent_flags_enum::CU_EVENT_DEFAULT;
        let event = self.context.new_event(Some(flags)).map_err(driver("make an event"))?;
        let mut events = self.all_events();
        events.push(Arc::new(event));
        Ok(Event(events.len() as u32 - 1))
    }

    fn record(&self, event: Event, stream: Stream) -> Result<(), DeviceError> {
        self.of(event)?.record(&self.streams[stream as usize]).map_err(driver("record an event"))
    }

    fn wait(&self, stream: Stream, event: Event) -> Result<(), DeviceError> {
        self.streams[stream as usize].wait(&*self.of(event)?).map_err(driver("wait for an event"))
    }

    fn happened(&self, event: Event) -> Result<bool, DeviceError> {
        self.bound()?;
        self.of(event)?.try_is_complete().map_err(driver("do what it was told"))
    }

    fn elapsed(&self, from: Event, to: Event) -> Result<f32, DeviceError> {
        self.of(from)?.elapsed_ms(&*self.of(to)?).map_err(driver("tell the time"))
    }

    fn sound(&self) -> bool {
        if self.bound().is_err() {
            return false;
        }
        // SAFETY: a stream of the context that was just bound.
        let queried = unsafe { sys::cuStreamQuery(self.streams[0].cu_stream()) };
        matches!(queried, CUresult::CUDA_SUCCESS | CUresult::CUDA_ERROR_NOT_READY)
    }

    fn finish(&self, stream: Stream) -> Result<(), DeviceError> {
        let done: Result<(), DriverError> = self.streams[stream as usize].synchronize();
        done.map_err(driver("do what it was told"))
    }
}
