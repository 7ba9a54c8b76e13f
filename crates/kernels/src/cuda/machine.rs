//! What operations need of a device, and no more: memory, copies, launches, products, events.
//!
//! There are two: the driver's (`device`, behind the feature `cuda`), and the tests', which keeps what it
//! is asked for in queues and does it as late as the events between them allow.

use super::Heads;
use super::error::DeviceError;
use super::launch::{Address, Launch};
use std::fmt::Debug;

/// A queue of work on the device: what is asked for in one stream happens in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stream {
    /// Where a model computes.
    Compute,
    /// Where stored KV is copied to the device and placed.
    Copy,
}

/// An event of a machine, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event(pub u32);

/// `out = x · Wᵀ`, or `out += x · Wᵀ`, with sums in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Product {
    /// bf16 `[rows, inputs]`.
    pub x: Address,
    /// bf16 `[outputs, inputs]`.
    pub weight: Address,
    /// `[rows, outputs]`.
    pub out: Address,
    /// Rows.
    pub rows: u32,
    /// Width of `x`.
    pub inputs: u32,
    /// Width of `out`.
    pub outputs: u32,
    /// Whether to add to what `out` holds.
    pub add: bool,
    /// Whether `out` is f32; bf16 otherwise.
    pub wide: bool,
}

/// A device.
///
/// Everything that takes a [`Stream`] returns before it has happened. The device does it later, in the stream's order:
/// what it is given must live, and stay where it is, until then.
pub trait Machine: Debug + Send + Sync + 'static {
    /// What its kernels are for.
    fn heads(&self) -> Heads;
    /// Multiprocessors, by which launches are split.
    fn multiprocessors(&self) -> u32;
    /// Its name and kind, for people.
    fn description(&self) -> String;
    /// Bytes of device memory that nobody has.
    ///
    /// # Errors
    /// A fault.
    fn free_memory(&self) -> Result<u64, DeviceError>;

    /// Reserves device memory, on 256 bytes, of any content.
    ///
    /// # Errors
    /// There is no more.
    fn allocate(&self, bytes: usize) -> Result<Address, DeviceError>;
    /// Gives device memory back.
    ///
    /// # Safety
    /// It is of [`allocate`](Self::allocate), and nothing uses it, queued work included.
    unsafe fn free(&self, address: Address);
    /// Reserves page-locked host memory, on 256 bytes, of any content.
    ///
    /// # Errors
    /// There is no more.
    fn pin(&self, bytes: usize) -> Result<*mut u8, DeviceError>;
    /// Gives page-locked memory back.
    ///
    /// # Safety
    /// It is of [`pin`](Self::pin), and nothing uses it, queued work included.
    unsafe fn unpin(&self, memory: *mut u8);

    /// Launches a kernel. An empty grid is no launch.
    ///
    /// # Errors
    /// A fault, now or before.
    ///
    /// # Safety
    /// Buffers are as long as the kernel's file says, and live until the stream has come past the launch.
    unsafe fn launch(&self, stream: Stream, launch: &Launch) -> Result<(), DeviceError>;
    /// Multiplies, in the compute stream.
    ///
    /// # Errors
    /// As [`launch`](Self::launch).
    ///
    /// # Safety
    /// As [`launch`](Self::launch).
    unsafe fn multiply(&self, product: &Product) -> Result<(), DeviceError>;
    /// Copies to the device.
    ///
    /// # Errors
    /// As [`launch`](Self::launch).
    ///
    /// # Safety
    /// As [`launch`](Self::launch); `from` is not written to meanwhile.
    unsafe fn upload(
        &self,
        stream: Stream,
        to: Address,
        from: *const u8,
        bytes: usize,
    ) -> Result<(), DeviceError>;
    /// Copies to the host.
    ///
    /// # Errors
    /// As [`launch`](Self::launch).
    ///
    /// # Safety
    /// As [`launch`](Self::launch); `to` is not touched meanwhile.
    unsafe fn download(
        &self,
        stream: Stream,
        to: *mut u8,
        from: Address,
        bytes: usize,
    ) -> Result<(), DeviceError>;
    /// Copies on the device.
    ///
    /// # Errors
    /// As [`launch`](Self::launch).
    ///
    /// # Safety
    /// As [`launch`](Self::launch); the two do not overlap.
    unsafe fn copy(
        &self,
        stream: Stream,
        to: Address,
        from: Address,
        bytes: usize,
    ) -> Result<(), DeviceError>;

    /// A new event. There are as many as were asked for; they go with the machine.
    ///
    /// # Errors
    /// A fault.
    fn event(&self) -> Result<Event, DeviceError>;
    /// Records an event: it happens when the stream has come this far.
    ///
    /// # Errors
    /// A fault.
    fn record(&self, event: Event, stream: Stream) -> Result<(), DeviceError>;
    /// Has a stream wait for what an event was last recorded for.
    ///
    /// # Errors
    /// A fault.
    fn wait(&self, stream: Stream, event: Event) -> Result<(), DeviceError>;
    /// Whether an event has happened.
    ///
    /// # Errors
    /// A fault.
    fn happened(&self, event: Event) -> Result<bool, DeviceError>;
    /// Milliseconds between two events that have happened.
    ///
    /// # Errors
    /// A fault.
    fn elapsed(&self, from: Event, to: Event) -> Result<f32, DeviceError>;
    /// Whether nothing has gone wrong that every later call would meet again. Asks, and waits for nothing.
    fn sound(&self) -> bool;
    /// Waits until a stream is empty.
    ///
    /// # Errors
    /// A fault, now or before.
    fn finish(&self, stream: Stream) -> Result<(), DeviceError>;
}
