//! A machine whose memory is the host's and whose kernels are the device's text, run by `emulate.h`.
//!
//! What is asked for is kept in queues, one to a stream, until somebody waits for it. Then one stream is run as far as it
//! goes, and the other only as far as events demand, or the other way round: what lacks an event between two streams, or
//! reuses what queued work still needs, gives wrong numbers in one of the two orders.
#![allow(unsafe_code, reason = "functions of a C++ library, and memory by its address")]
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

#[path = "host.rs"]
mod host;

use cacheclip_kernels::cuda::launch::{Address, Launch};
use cacheclip_kernels::cuda::machine::{Event, Machine, Product, Stream};
use cacheclip_kernels::cuda::{DeviceError, Heads};
use half::bf16;
use host::Host;
use std::alloc::{Layout, alloc, dealloc};
use std::collections::{HashMap, VecDeque};
use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::sync::{Arc, Mutex};

type Function = unsafe extern "C" fn(
    *const c_char,
    *const c_uint,
    c_uint,
    c_uint,
    *mut *mut c_void,
    c_uint,
    c_int,
) -> c_int;

/// Which stream runs ahead of the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    CopiesLate,
    CopiesEarly,
}

enum Queued {
    Work(Box<dyn FnOnce() + Send>),
    Record(Event, u64),
    Wait(Event, u64),
}

#[derive(Default)]
struct State {
    queues: [VecDeque<Queued>; 2],
    /// Of each event: how often it was recorded, and how many of those have happened.
    events: Vec<(u64, u64)>,
    memory: HashMap<usize, Layout>,
    /// Whether everything fails from now on.
    broken: bool,
}

/// A device with the kernels of one model.
pub(crate) struct Emulated {
    kernels: Arc<Host>,
    heads: Heads,
    order: Order,
    /// Bytes of memory it has.
    bytes: usize,
    state: Mutex<State>,
}

impl std::fmt::Debug for Emulated {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "an emulated device, {:?}", self.order)
    }
}

impl Emulated {
    /// A device of `bytes` bytes; none where there is no compiler, which it says.
    pub(crate) fn open(heads: Heads, order: Order, bytes: usize) -> Option<Arc<Self>> {
        let kernels = Arc::new(Host::open(heads.checked().unwrap())?);
        Some(Arc::new(Self { kernels, heads, order, bytes, state: Mutex::default() }))
    }

    /// Bytes that are allocated, page-locked ones included.
    pub(crate) fn used(&self) -> usize {
        self.state.lock().unwrap().memory.values().map(Layout::size).sum()
    }

    /// Has everything fail from now on, as after a fault on a device.
    pub(crate) fn break_down(&self) {
        self.state.lock().unwrap().broken = true;
    }

    fn working(&self) -> Result<(), DeviceError> {
        match self.sound() {
            true => Ok(()),
            false => Err(DeviceError::Fault("do what it was told", "broken by a test".into())),
        }
    }

    fn queue(&self, stream: Stream, work: impl FnOnce() + Send + 'static) {
        self.state.lock().unwrap().queues[stream as usize].push_back(Queued::Work(Box::new(work)));
    }

    /// Does what is next in a stream; false when there is nothing.
    fn step(&self, stream: Stream) -> bool {
        let next = self.state.lock().unwrap().queues[stream as usize].pop_front();
        match next {
            None => return false,
            Some(Queued::Work(work)) => work(),
            Some(Queued::Record(event, count)) => {
                self.state.lock().unwrap().events[event.0 as usize].1 = count;
            }
            Some(Queued::Wait(event, count)) => {
                let other = if stream == Stream::Copy { Stream::Compute } else { Stream::Copy };
                while self.state.lock().unwrap().events[event.0 as usize].1 < count {
                    assert!(self.step(other), "a stream waits for what nobody will do");
                }
            }
        }
        true
    }

    fn reserve(&self, bytes: usize) -> Result<usize, DeviceError> {
        let used = self.used();
        if used + bytes > self.bytes {
            let (wanted, used, limit) = (bytes as u64, used as u64, self.bytes as u64);
            return Err(DeviceError::OutOfMemory { wanted, used, limit });
        }
        let layout = Layout::from_size_align(bytes.max(1), 256).unwrap();
        // SAFETY: the size is not zero.
        let memory = unsafe { alloc(layout) };
        assert!(!memory.is_null());
        // SAFETY: as long as that. NaNs, of any width.
        unsafe { memory.write_bytes(0xff, layout.size()) };
        self.state.lock().unwrap().memory.insert(memory as usize, layout);
        Ok(memory as usize)
    }

    fn release(&self, memory: usize) {
        let layout = self.state.lock().unwrap().memory.remove(&memory).expect("memory of this device");
        // SAFETY: it was reserved with this layout. Whoever still uses it shall see something else.
        unsafe {
            (memory as *mut u8).write_bytes(0xff, layout.size());
            dealloc(memory as *mut u8, layout);
        }
    }

    fn copied(&self, stream: Stream, to: usize, from: usize, bytes: usize) {
        // SAFETY: of the caller of the machine's function.
        self.queue(stream, move || unsafe {
            std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, bytes);
        });
    }
}

/// Reads `count` numbers of a type at an address.
///
/// # Safety
/// They are there.
unsafe fn read<T: Copy>(at: Address, count: usize) -> Vec<T> {
    // SAFETY: of the caller.
    (0..count).map(|i| unsafe { (at as *const T).add(i).read_unaligned() }).collect()
}

/// # Safety
/// As [`Machine::multiply`].
unsafe fn multiply(product: Product) {
    let Product { rows, inputs, outputs, add, wide, .. } = product;
    let (rows, inputs, outputs) = (rows as usize, inputs as usize, outputs as usize);
    // SAFETY: of the caller.
    unsafe {
        let widened = |at, count| read::<bf16>(at, count).into_iter().map(bf16::to_f32).collect::<Vec<_>>();
        let (x, weight) = (widened(product.x, rows * inputs), widened(product.weight, outputs * inputs));
        for (row, x) in x.chunks_exact(inputs).enumerate() {
            for (output, weight) in weight.chunks_exact(inputs).enumerate() {
                let at = row * outputs + output;
                let sum: f32 = x.iter().zip(weight).map(|(a, b)| a * b).sum();
                if wide {
                    (product.out as *mut f32).add(at).write(sum);
                } else {
                    let to = (product.out as *mut bf16).add(at);
                    to.write(bf16::from_f32(if add { sum + to.read().to_f32() } else { sum }));
                }
            }
        }
    }
}

impl Machine for Emulated {
    fn heads(&self) -> Heads {
        self.heads
    }

    /// Few, so that small launches are split, and large ones are not.
    fn multiprocessors(&self) -> u32 {
        4
    }

    fn description(&self) -> String {
        format!("{self:?}")
    }

    fn free_memory(&self) -> Result<u64, DeviceError> {
        Ok((self.bytes - self.used()) as u64)
    }

    fn allocate(&self, bytes: usize) -> Result<Address, DeviceError> {
        Ok(self.reserve(bytes)? as Address)
    }

    unsafe fn free(&self, address: Address) {
        self.release(address as usize);
    }

    fn pin(&self, bytes: usize) -> Result<*mut u8, DeviceError> {
        Ok(self.reserve(bytes)? as *mut u8)
    }

    unsafe fn unpin(&self, memory: *mut u8) {
        self.release(memory as usize);
    }

    unsafe fn launch(&self, stream: Stream, launch: &Launch) -> Result<(), DeviceError> {
        self.working()?;
        let (kernels, launch) = (Arc::clone(&self.kernels), launch.clone());
        self.queue(stream, move || {
            let name = CString::new(launch.kernel).unwrap();
            let mut slots = launch.arguments.slots().to_vec();
            let mut addresses: Vec<*mut c_void> =
                slots.iter_mut().map(|slot| (slot as *mut u64).cast()).collect();
            // SAFETY: the type is that of `emulated` in host.cpp; buffers are the caller's promise.
            let status = unsafe {
                kernels.function::<Function>("emulated")(
                    name.as_ptr(),
                    launch.grid.as_ptr(),
                    launch.threads,
                    launch.shared,
                    addresses.as_mut_ptr(),
                    addresses.len() as c_uint,
                    1,
                )
            };
            assert_eq!(status, 0, "{} with {} arguments", launch.kernel, slots.len());
        });
        Ok(())
    }

    unsafe fn multiply(&self, product: &Product) -> Result<(), DeviceError> {
        let product = *product;
        // SAFETY: of the caller.
        self.queue(Stream::Compute, move || unsafe { multiply(product) });
        Ok(())
    }

    unsafe fn upload(
        &self,
        stream: Stream,
        to: Address,
        from: *const u8,
        bytes: usize,
    ) -> Result<(), DeviceError> {
        self.copied(stream, to as usize, from as usize, bytes);
        Ok(())
    }

    unsafe fn download(
        &self,
        stream: Stream,
        to: *mut u8,
        from: Address,
        bytes: usize,
    ) -> Result<(), DeviceError> {
        self.copied(stream, to as usize, from as usize, bytes);
        Ok(())
    }

    unsafe fn copy(
        &self,
        stream: Stream,
        to: Address,
        from: Address,
        bytes: usize,
    ) -> Result<(), DeviceError> {
        self.copied(stream, to as usize, from as usize, bytes);
        Ok(())
    }

    fn event(&self) -> Result<Event, DeviceError> {
        let mut state = self.state.lock().unwrap();
        state.events.push((0, 0));
        Ok(Event(state.events.len() as u32 - 1))
    }

    fn record(&self, event: Event, stream: Stream) -> Result<(), DeviceError> {
        let mut state = self.state.lock().unwrap();
        let (recorded, _) = &mut state.events[event.0 as usize];
        *recorded += 1;
        let count = *recorded;
        state.queues[stream as usize].push_back(Queued::Record(event, count));
        Ok(())
    }

    fn wait(&self, stream: Stream, event: Event) -> Result<(), DeviceError> {
        let mut state = self.state.lock().unwrap();
        let (count, _) = state.events[event.0 as usize];
        state.queues[stream as usize].push_back(Queued::Wait(event, count));
        Ok(())
    }

    fn happened(&self, event: Event) -> Result<bool, DeviceError> {
        let (recorded, happened) = self.state.lock().unwrap().events[event.0 as usize];
        Ok(happened == recorded)
    }

    /// No clock: one millisecond.
    fn elapsed(&self, _from: Event, _to: Event) -> Result<f32, DeviceError> {
        Ok(1.0)
    }

    fn sound(&self) -> bool {
        !self.state.lock().unwrap().broken
    }

    fn finish(&self, stream: Stream) -> Result<(), DeviceError> {
        self.working()?;
        if self.order == Order::CopiesEarly {
            while self.step(Stream::Copy) {}
        }
        while self.step(stream) {}
        Ok(())
    }
}

impl Drop for Emulated {
    fn drop(&mut self) {
        for (memory, layout) in self.state.lock().unwrap().memory.drain() {
            // SAFETY: it was reserved with this layout.
            unsafe { dealloc(memory as *mut u8, layout) };
        }
    }
}
