//! A machine that launches kernels, and numbers in its memory.

use cacheclip_kernels::cuda::launch::{Address, Launch};
use std::marker::PhantomData;

/// What launches kernels.
pub(crate) trait Machine {
    /// Copies bytes to memory of the machine, on 16 bytes at least.
    fn upload(&self, bytes: &[u8]) -> Box<dyn Memory + '_>;
    /// Launches a kernel and waits for it.
    fn run(&self, launch: &Launch);
}

/// Memory of a machine.
pub(crate) trait Memory {
    fn address(&self) -> Address;
    fn read(&self) -> Vec<u8>;
}

/// Numbers in a machine's memory.
pub(crate) struct Buffer<'a, T>(Box<dyn Memory + 'a>, PhantomData<T>);

impl<'a, T: bytemuck::Pod> Buffer<'a, T> {
    pub(crate) fn new(machine: &'a dyn Machine, values: &[T]) -> Self {
        Self(machine.upload(bytemuck::cast_slice(values)), PhantomData)
    }

    pub(crate) fn filled(machine: &'a dyn Machine, value: T, length: usize) -> Self {
        Self::new(machine, &vec![value; length])
    }

    pub(crate) fn address(&self) -> Address {
        self.0.address()
    }

    pub(crate) fn values(&self) -> Vec<T> {
        self.0.read().chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect()
    }
}
