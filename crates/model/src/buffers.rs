//! Activation buffers that are used again: fresh ones are as large as a megabyte per matrix and token block, and the
//! system zeroes every page of them at its first touch.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

/// Most buffers a thread keeps: as many as a layer has at the same time, and some.
const KEPT: usize = 8;

thread_local! {
    static FREE: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Values that go back to the thread's free list when dropped.
#[derive(Debug)]
pub(crate) struct Buffer(Vec<f32>);

impl Buffer {
    /// `length` values, of any content.
    pub(crate) fn of(length: usize) -> Self {
        let mut values = FREE.with_borrow_mut(|free| {
            let fits = free.iter().enumerate().filter(|(_, values)| values.capacity() >= length);
            let smallest = fits.min_by_key(|(_, values)| values.capacity()).map(|(index, _)| index);
            smallest.map_or_else(Vec::new, |index| free.swap_remove(index))
        });
        values.resize(length, 0.0);
        Self(values)
    }
}

impl Clone for Buffer {
    fn clone(&self) -> Self {
        let mut copy = Self::of(self.len());
        copy.copy_from_slice(self);
        copy
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let values = std::mem::take(&mut self.0);
        FREE.with_borrow_mut(|free| {
            free.push(values);
            if free.len() > KEPT {
                // The one that is needed least often: the smallest is allocated again for little.
                let smallest = free.iter().enumerate().min_by_key(|(_, values)| values.capacity());
                if let Some((index, _)) = smallest {
                    free.swap_remove(index);
                }
            }
        });
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.0
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_buffer_is_the_next_one_of_its_size() {
        let first = Buffer::of(1000);
        let place = first.as_ptr();
        drop(first);
        let second = Buffer::of(900);
        assert_eq!((second.as_ptr(), second.len()), (place, 900));
        assert_ne!(Buffer::of(900).as_ptr(), place, "one that is in use is nobody else's");
    }

    #[test]
    fn a_thread_keeps_a_few() {
        let many: Vec<Buffer> = (1..50).map(Buffer::of).collect();
        drop(many);
        FREE.with_borrow(|free| assert!(free.len() <= KEPT));
    }
}
