//! Which pages are free, and the pages of one sequence.

use crate::config::Config;
use crate::error::Error;
use cacheclip_kernels::page::HeadShape;
pub use cacheclip_kernels::page::pages_for;
use parking_lot::Mutex;
use std::sync::Arc;

/// Bytes of a page of KV through all layers, of elements of so many bytes.
pub fn page_bytes(config: &Config, element: usize) -> u64 {
    let shape = HeadShape { kv_heads: config.kv_heads, head_dim: config.head_dim };
    (shape.page() * config.layers * element) as u64
}

/// Hands out pages from a fixed budget; returned when the sequence is dropped.
#[derive(Clone, Debug)]
pub struct Allocator {
    free: Arc<Mutex<Vec<u32>>>,
    total: usize,
}

impl Allocator {
    /// Manages pages `0..total`.
    pub fn new(total: usize) -> Self {
        // Popped from the end: low pages first, so an idle pool's memory stays untouched.
        Self { free: Arc::new(Mutex::new((0..total as u32).rev().collect())), total }
    }

    /// Pages there are.
    pub fn total(&self) -> usize {
        self.total
    }

    /// Pages nobody holds.
    pub fn free(&self) -> usize {
        self.free.lock().len()
    }

    /// Pages for a sequence of up to `tokens` tokens, all or nothing.
    ///
    /// # Errors
    /// [`Error::OutOfPages`] when too few are free.
    pub fn sequence(&self, tokens: usize) -> Result<Sequence, Error> {
        let wanted = pages_for(tokens);
        let mut free = self.free.lock();
        if wanted > free.len() {
            return Err(Error::OutOfPages { wanted, free: free.len(), total: self.total });
        }
        let at = free.len() - wanted;
        let table = free.split_off(at);
        drop(free);
        Ok(Sequence { table, free: Arc::clone(&self.free) })
    }
}

/// The pages of one sequence, in order of position.
#[derive(Debug)]
pub struct Sequence {
    table: Vec<u32>,
    free: Arc<Mutex<Vec<u32>>>,
}

impl Sequence {
    /// The page table.
    pub fn table(&self) -> &[u32] {
        &self.table
    }
}

impl Drop for Sequence {
    fn drop(&mut self) {
        self.free.lock().append(&mut self.table);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_return_when_their_sequence_ends_and_are_never_shared() {
        let pages = Allocator::new(4);
        let (a, b) = (pages.sequence(17).unwrap(), pages.sequence(32).unwrap());
        let mut held: Vec<u32> = a.table().iter().chain(b.table()).copied().collect();
        held.sort_unstable();
        assert_eq!(held, [0, 1, 2, 3]);
        assert!(matches!(pages.sequence(1), Err(Error::OutOfPages { wanted: 1, free: 0, total: 4 })));
        drop(a);
        assert_eq!(pages.free(), 2);
        assert!(pages.sequence(32).is_ok());
    }
}
