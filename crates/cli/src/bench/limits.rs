//! What this machine can do at most, measured in the run that is compared with it.

use pulp::{Arch, Simd, WithSimd};
use serde::Serialize;
use std::hint::black_box;
use std::time::{Duration, Instant};

/// Long enough for a clock that rises under load, short enough to be forgotten.
const MEASURED: Duration = Duration::from_millis(300);
/// Bytes that are read: more than any cache holds.
const READ_BYTES: usize = 256 << 20;

/// Limits of all threads together.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Limits {
    /// Floating-point operations per second of multiply-adds whose operands are in registers.
    pub(crate) flops: f64,
    /// Bytes per second of reading memory in order.
    pub(crate) read_bytes: f64,
}

impl Limits {
    pub(crate) fn measure(threads: usize) -> Self {
        let memory: Vec<f32> = vec![1.0; READ_BYTES / size_of::<f32>()];
        let share = memory.len().div_ceil(threads.max(1));
        let arch = Arch::new();
        Self {
            flops: rate(threads, |_| arch.dispatch(MultiplyAdds)),
            read_bytes: rate(threads, |thread| {
                let part = memory.chunks(share).nth(thread).unwrap_or_default();
                arch.dispatch(Read(part));
                size_of_val(part) as f64
            }),
        }
    }
}

/// What `work` returns, per second, of all threads together.
fn rate(threads: usize, work: impl Fn(usize) -> f64 + Sync) -> f64 {
    let began = Instant::now();
    let one = |thread| {
        let mut done = 0.0;
        while began.elapsed() < MEASURED {
            done += work(thread);
        }
        done / began.elapsed().as_secs_f64()
    };
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..threads.max(1)).map(|thread| scope.spawn(move || one(thread))).collect();
        all.into_iter().filter_map(|thread| thread.join().ok()).sum()
    })
}

/// Independent chains of multiply-adds, enough of them to hide the latency of each.
struct MultiplyAdds;

impl WithSimd for MultiplyAdds {
    /// Operations done.
    type Output = f64;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f64 {
        const CHAINS: usize = 12;
        const STEPS: usize = 100_000;
        let (factor, term) = (simd.splat_f32s(black_box(0.999)), simd.splat_f32s(black_box(0.001)));
        let mut sums = [simd.splat_f32s(0.5); CHAINS];
        for _ in 0..STEPS {
            for sum in &mut sums {
                *sum = simd.mul_add_e_f32s(*sum, factor, term);
            }
        }
        black_box(sums.map(|sum| simd.reduce_sum_f32s(sum)));
        (2 * CHAINS * STEPS * S::F32_LANES) as f64
    }
}

/// Adds everything up.
struct Read<'a>(&'a [f32]);

impl WithSimd for Read<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (vectors, _) = S::as_simd_f32s(self.0);
        let (eights, _) = vectors.as_chunks::<8>();
        let mut sums = [simd.splat_f32s(0.0); 8];
        for eight in eights {
            for (sum, vector) in sums.iter_mut().zip(eight) {
                *sum = simd.add_f32s(*sum, *vector);
            }
        }
        black_box(sums.map(|sum| simd.reduce_sum_f32s(sum)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_multiplies_and_reads_something() {
        let limits = Limits::measure(1);
        assert!(limits.flops > 1e8 && limits.read_bytes > 1e8, "{limits:?}");
    }
}
