//! Bytes on the host from which a device copies while others compute.
//!
//! Page-locked memory is dear to reserve, so what is given back is kept for the next of its size. What does not fit into
//! the budget lies in ordinary memory: slower to copy, and never an error.

use super::machine::Machine;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

/// Where bytes for a device are reserved; cheap to clone. Without a machine, in ordinary memory.
#[derive(Clone, Debug, Default)]
pub struct HostPool(Option<Arc<Pool>>);

#[derive(Debug)]
struct Pool {
    machine: Arc<dyn Machine>,
    limit: u64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    used: u64,
    /// Addresses of what was given back, by size.
    kept: BTreeMap<usize, Vec<usize>>,
}

/// Bytes of a pool; they go back when they are dropped.
pub struct HostBytes(Held);

enum Held {
    Ordinary(Box<[u8]>),
    Pinned { pool: Arc<Pool>, memory: *mut u8, size: usize, bytes: usize },
}

// SAFETY: the memory is the value's own.
unsafe impl Send for HostBytes {}
// SAFETY: as above; it is only written to through a unique reference.
unsafe impl Sync for HostBytes {}

impl HostPool {
    /// Up to `limit` bytes of page-locked memory.
    pub fn pinned(machine: Arc<dyn Machine>, limit: u64) -> Self {
        Self(Some(Arc::new(Pool { machine, limit, state: Mutex::default() })))
    }

    /// Bytes in page-locked memory, those kept for later included.
    pub fn used(&self) -> u64 {
        self.0.as_ref().map_or(0, |pool| pool.state().used)
    }

    /// So many bytes, of any content.
    pub fn bytes(&self, bytes: usize) -> HostBytes {
        let pinned = self.0.as_ref().and_then(|pool| {
            let size = locked(bytes);
            let memory = pool.reserve(size)?;
            Some(Held::Pinned { pool: Arc::clone(pool), memory, size, bytes })
        });
        HostBytes(pinned.unwrap_or_else(|| Held::Ordinary(vec![0; bytes].into())))
    }

    /// Words of `N` bytes each, one after the other.
    pub fn words<const N: usize>(&self, words: impl ExactSizeIterator<Item = [u8; N]>) -> HostBytes {
        let mut bytes = self.bytes(N * words.len());
        bytes.as_chunks_mut().0.iter_mut().zip(words).for_each(|(to, word)| *to = word);
        bytes
    }

    /// A copy of `bytes`.
    pub fn copy(&self, bytes: &[u8]) -> HostBytes {
        let mut copy = self.bytes(bytes.len());
        copy.copy_from_slice(bytes);
        copy
    }
}

/// Bytes that are locked for `bytes`: at most an eighth more, so that what is given back fits what comes next, and a budget
/// of what is kept is not spent on rounding.
fn locked(bytes: usize) -> usize {
    let bytes = bytes.max(1);
    bytes.next_multiple_of((bytes.next_power_of_two() / 16).max(4096))
}

impl HostBytes {
    /// A copy of `bytes`, in the pool that these are in.
    pub fn beside(&self, bytes: &[u8]) -> Self {
        let pool = match &self.0 {
            Held::Ordinary(_) => HostPool::default(),
            Held::Pinned { pool, .. } => HostPool(Some(Arc::clone(pool))),
        };
        pool.copy(bytes)
    }
}

impl Pool {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reserve(&self, size: usize) -> Option<*mut u8> {
        let mut state = self.state();
        if let Some(memory) = state.kept.get_mut(&size).and_then(Vec::pop) {
            return Some(memory as *mut u8);
        }
        if state.used + size as u64 > self.limit {
            self.shed(&mut state);
        }
        if state.used + size as u64 > self.limit {
            return None;
        }
        let memory = self.machine.pin(size).ok()?;
        // SAFETY: it is ours and as long as that. What a driver leaves in it need not be initialised.
        unsafe { memory.write_bytes(0, size) };
        state.used += size as u64;
        Some(memory)
    }

    fn shed(&self, state: &mut State) {
        for (size, kept) in std::mem::take(&mut state.kept) {
            for memory in kept {
                // SAFETY: it is of `pin`; what a copy reads is held until the copy is done, so nothing uses it.
                unsafe { self.machine.unpin(memory as *mut u8) };
                state.used -= size as u64;
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let mut state = std::mem::take(&mut *self.state());
        self.shed(&mut state);
    }
}

impl Deref for HostBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.0 {
            Held::Ordinary(bytes) => bytes,
            // SAFETY: it is initialised, as long as that, and ours.
            Held::Pinned { memory, bytes, .. } => unsafe { std::slice::from_raw_parts(*memory, *bytes) },
        }
    }
}

impl DerefMut for HostBytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        match &mut self.0 {
            Held::Ordinary(bytes) => bytes,
            // SAFETY: as above, and the reference is unique.
            Held::Pinned { memory, bytes, .. } => unsafe { std::slice::from_raw_parts_mut(*memory, *bytes) },
        }
    }
}

impl Drop for HostBytes {
    fn drop(&mut self) {
        if let Held::Pinned { pool, memory, size, .. } = &self.0 {
            pool.state().kept.entry(*size).or_default().push(*memory as usize);
        }
    }
}

impl fmt::Debug for HostBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = if matches!(self.0, Held::Pinned { .. }) { "page-locked" } else { "ordinary" };
        write!(f, "{} {place} bytes", self.len())
    }
}
