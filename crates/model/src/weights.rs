//! Where the values of weights come from before they are on a device.

use cacheclip_kernels::random;
use rayon::prelude::*;

/// Values of a weight, or of a part of one.
#[derive(Clone, Debug)]
pub enum Values {
    /// Read from somewhere.
    Given(Vec<f32>),
    /// Of a pseudo-random sequence ([`random`]): a device may make them itself.
    Random {
        /// Which sequence.
        base: u64,
        /// Most that a value is away from zero.
        bound: f32,
        /// How many.
        count: usize,
    },
}

impl Values {
    /// How many.
    pub fn len(&self) -> usize {
        match self {
            Self::Given(values) => values.len(),
            Self::Random { count, .. } => *count,
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// On the host.
    pub fn into_vec(self) -> Vec<f32> {
        match self {
            Self::Given(values) => values,
            Self::Random { base, bound, count } => {
                (0..count as u64).into_par_iter().map(|index| random::value(base, index, bound)).collect()
            }
        }
    }

    /// Parts behind each other, on the host.
    pub fn join(parts: Vec<Self>) -> Vec<f32> {
        let mut parts = parts.into_iter().map(Self::into_vec);
        let mut all = parts.next().unwrap_or_default();
        parts.for_each(|part| all.extend(part));
        all
    }
}
