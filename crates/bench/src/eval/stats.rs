//! Paired bootstrap: the same tasks are drawn again for every policy.

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use serde::{Deserialize, Serialize};

/// Resamples of each family.
const COUNT: usize = 2000;

/// A 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// 2.5 % lie below.
    pub low: f64,
    /// 2.5 % lie above.
    pub high: f64,
}

/// How often each of a family's tasks is drawn, resample by resample.
#[derive(Debug)]
pub struct Resamples {
    times: Vec<Vec<u16>>,
}

impl Resamples {
    /// Draws with replacement from `tasks` tasks; the same seed, the same draws.
    pub fn new(seed: u64, tasks: usize) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let draw = |_| {
            let mut times = vec![0; tasks];
            (0..tasks).for_each(|_| times[random.random_range(0..tasks)] += 1);
            times
        };
        Self { times: (0..COUNT).map(draw).collect() }
    }

    /// Sum of the tasks' values in every resample. Sums of several families add up to a resample of them all,
    /// stratified.
    pub fn sums(&self, values: &[f32]) -> Vec<f64> {
        let sum = |times: &Vec<u16>| {
            times.iter().zip(values).map(|(&times, &value)| f64::from(times) * f64::from(value)).sum()
        };
        self.times.iter().map(sum).collect()
    }
}

/// The interval of `value` over resamples, leaving out those where it is undefined.
pub(super) fn interval(value: impl Iterator<Item = f64>) -> Option<Interval> {
    let mut values: Vec<f64> = value.filter(|value| value.is_finite()).collect();
    if values.is_empty() {
        return None;
    }
    values.sort_by(f64::total_cmp);
    let at = |share: f64| values[((values.len() - 1) as f64 * share).round() as usize];
    Some(Interval { low: at(0.025), high: at(0.975) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_of_a_mean_is_what_the_normal_law_says() {
        let values: Vec<f32> = (0..400).map(|i| f32::from(i % 4 == 0)).collect();
        let sums = Resamples::new(1, 400).sums(&values);
        let found = interval(sums.iter().map(|sum| sum / 400.0)).unwrap();
        // 1.96 · √(p(1 − p) / n) around 0.25.
        assert!((found.low - (0.25 - 0.0424)).abs() < 0.006, "{found:?}");
        assert!((found.high - (0.25 + 0.0424)).abs() < 0.006, "{found:?}");
        assert_eq!(Resamples::new(1, 400).sums(&values), sums);
    }

    #[test]
    fn a_paired_difference_of_nothing_has_no_width() {
        let values = [1.0, 0.0, 1.0, 1.0];
        let resamples = Resamples::new(7, 4);
        let (a, b) = (resamples.sums(&values), resamples.sums(&values));
        let found = interval(a.iter().zip(&b).map(|(a, b)| a - b)).unwrap();
        assert_eq!((found.low, found.high), (0.0, 0.0));
        assert_eq!(interval([f64::NAN].into_iter()), None);
    }
}
