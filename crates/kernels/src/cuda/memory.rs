//! Device memory within a budget. What is given back is kept for the next of its size: in steady state nothing is
//! allocated, and nothing waits for the driver.
//!
//! A buffer belongs to a stream. It goes back as soon as the host drops it, while the device may still use it: who gets it
//! next asks for work in the same stream, which comes behind.

use super::error::DeviceError;
use super::launch::Address;
use super::machine::{Machine, Stream};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Smallest size.
const LEAST: usize = 512;
/// Sizes above are whole multiples of this, those below are powers of two.
const LARGE: usize = 1 << 20;

/// A device's memory.
#[derive(Debug)]
pub struct Memory {
    machine: Arc<dyn Machine>,
    limit: u64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Bytes that were allocated and not freed.
    used: u64,
    /// What was given back, by stream and size.
    kept: [BTreeMap<usize, Vec<Address>>; 2],
}

/// Memory on a device that goes back when it is dropped.
#[derive(Debug)]
pub struct Buffer {
    memory: Arc<Memory>,
    address: Address,
    size: usize,
    bytes: usize,
    stream: Stream,
}

/// Bytes that are allocated for `bytes`.
pub fn allocated(bytes: usize) -> usize {
    if bytes > LARGE { bytes.next_multiple_of(LARGE) } else { bytes.next_power_of_two().max(LEAST) }
}

impl Memory {
    /// Up to `limit` bytes of a machine's memory.
    pub fn new(machine: Arc<dyn Machine>, limit: u64) -> Arc<Self> {
        Arc::new(Self { machine, limit, state: Mutex::default() })
    }

    /// Most bytes there may be in use.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Bytes in use, those kept for later included.
    pub fn used(&self) -> u64 {
        self.state().used
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        // What a panic leaves behind is a list of addresses, whole at any time.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Memory of any content, for work in `stream`.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`], also where the driver has less than the budget.
    pub fn buffer(self: &Arc<Self>, stream: Stream, bytes: usize) -> Result<Buffer, DeviceError> {
        self.leaving(stream, bytes, 0)
    }

    /// As [`buffer`](Self::buffer), of what would stay for long: `left` bytes of the budget remain for others.
    ///
    /// # Errors
    /// As [`buffer`](Self::buffer).
    pub fn leaving(self: &Arc<Self>, stream: Stream, bytes: usize, left: u64) -> Result<Buffer, DeviceError> {
        let size = allocated(bytes);
        let mut state = self.state();
        let of = |address, size| Buffer { memory: Arc::clone(self), address, size, bytes, stream };
        let kept = &mut state.kept[stream as usize];
        // Twice what is asked for is not too much: sizes of a pass differ by its last block.
        if let Some((&found, addresses)) = kept.range_mut(size..=2 * size).next() {
            let address = addresses.pop();
            if addresses.is_empty() {
                kept.remove(&found);
            }
            if let Some(address) = address {
                return Ok(of(address, found));
            }
        }
        let fits = |state: &State| state.used + size as u64 + left <= self.limit;
        if !fits(&state) {
            self.shed(&mut state)?;
        }
        let full = |used| DeviceError::OutOfMemory { wanted: size as u64, used, limit: self.limit };
        if !fits(&state) {
            return Err(full(state.used));
        }
        let address = match self.machine.allocate(size) {
            Err(DeviceError::OutOfMemory { .. }) => {
                self.shed(&mut state)?;
                self.machine.allocate(size).map_err(|_| full(state.used))?
            }
            other => other?,
        };
        state.used += size as u64;
        Ok(of(address, size))
    }

    /// Frees what is kept, once the device is done with it.
    fn shed(&self, state: &mut State) -> Result<(), DeviceError> {
        self.machine.finish(Stream::Compute)?;
        self.machine.finish(Stream::Copy)?;
        for kept in &mut state.kept {
            for (size, addresses) in std::mem::take(kept) {
                for address in addresses {
                    // SAFETY: it was allocated, nobody has it, and both streams are empty.
                    unsafe { self.machine.free(address) };
                    state.used -= size as u64;
                }
            }
        }
        Ok(())
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let mut state = std::mem::take(&mut *self.state());
        // After a fault there is nothing left to free: the context goes as a whole.
        _ = self.shed(&mut state);
    }
}

impl Buffer {
    /// Where it is, for launches in its stream.
    pub(super) fn address(&self) -> Address {
        self.address
    }

    /// Bytes that were asked for.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let kept = &mut self.memory.state().kept[self.stream as usize];
        kept.entry(self.size).or_default().push(self.address);
    }
}
