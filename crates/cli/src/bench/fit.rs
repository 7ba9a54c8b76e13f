//! What becomes of many measurements: percentiles, a cost as a function of length, a trend over time.

use serde::Serialize;

/// The value that a share of all values does not exceed (nearest rank); NaN of none.
pub(crate) fn percentile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

/// Cost as a function of length: `fixed + linear · k + quadratic · k²`, k in 1,024 tokens.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Fit {
    pub(crate) fixed_ms: f64,
    pub(crate) linear_ms: f64,
    pub(crate) quadratic_ms: f64,
    /// The worst point: how far the cost there is from the fit's, as a share of the cost.
    pub(crate) worst_residual: f64,
}

impl Fit {
    /// The least squares of relative errors whose parts are not negative, of (tokens, ms); `None` of no points. Errors
    /// are relative so that the shortest prompts count as much as the longest.
    pub(crate) fn of(points: &[(f64, f64)]) -> Option<Self> {
        // With three parts, trying which of them are zero is the whole of non-negative least squares.
        let fits = (1u8..8).filter(|kept| kept.count_ones() as usize <= points.len());
        let fits = fits.filter_map(|kept| Some(Self::with(solve(points, kept)?)));
        let fits =
            fits.filter(|fit| [fit.fixed_ms, fit.linear_ms, fit.quadratic_ms].iter().all(|&it| it >= 0.0));
        let best = fits.min_by(|a, b| a.error(points).total_cmp(&b.error(points)))?;
        let worst = points.iter().map(|&point| best.residual(point).abs()).fold(0.0, f64::max);
        Some(Self { worst_residual: worst, ..best })
    }

    fn with([fixed_ms, linear_ms, quadratic_ms]: [f64; 3]) -> Self {
        Self { fixed_ms, linear_ms, quadratic_ms, worst_residual: 0.0 }
    }

    /// Milliseconds at a length.
    pub(crate) fn at(&self, tokens: f64) -> f64 {
        let k = tokens / 1024.0;
        self.fixed_ms + self.linear_ms * k + self.quadratic_ms * k * k
    }

    fn residual(&self, (tokens, ms): (f64, f64)) -> f64 {
        self.at(tokens) / ms - 1.0
    }

    fn error(&self, points: &[(f64, f64)]) -> f64 {
        points.iter().map(|&point| self.residual(point).powi(2)).sum()
    }

    /// `120 + 2500 k + 80 k² ms (within 3 %)`.
    pub(crate) fn text(&self) -> String {
        let Self { fixed_ms, linear_ms, quadratic_ms, worst_residual } = self;
        let within = worst_residual * 100.0;
        format!(
            "{fixed_ms:.0} + {linear_ms:.1} k + {quadratic_ms:.2} k² ms, k = 1,024 tokens (within {within:.0} %)"
        )
    }
}

/// Least squares with the parts whose bits are set in `kept`; the others are zero. `None` where they are not
/// determined.
fn solve(points: &[(f64, f64)], kept: u8) -> Option<[f64; 3]> {
    // Normal equations, the right side in the last column; a part that is left out says that it is zero.
    let mut rows = [[0.0; 4]; 3];
    for &(tokens, ms) in points {
        let k = tokens / 1024.0;
        let terms = [1.0 / ms, k / ms, k * k / ms, 1.0];
        for (row, term) in rows.iter_mut().zip(terms) {
            row.iter_mut().zip(terms).for_each(|(cell, other)| *cell += term * other);
        }
    }
    for (part, row) in rows.iter_mut().enumerate().filter(|(part, _)| kept & (1 << part) == 0) {
        *row = std::array::from_fn(|column| f64::from(u8::from(column == part)));
    }
    for pivot in 0..3 {
        let best = (pivot..3).max_by(|&a, &b| rows[a][pivot].abs().total_cmp(&rows[b][pivot].abs()))?;
        rows.swap(pivot, best);
        let divisor = rows[pivot][pivot];
        rows[pivot].iter_mut().for_each(|cell| *cell /= divisor);
        for other in (0..3).filter(|&other| other != pivot) {
            let factor = rows[other][pivot];
            let subtracted = rows[pivot].map(|cell| cell * factor);
            rows[other].iter_mut().zip(subtracted).for_each(|(cell, part)| *cell -= part);
        }
    }
    let solved = rows.map(|row| row[3]);
    solved.iter().all(|part| part.is_finite()).then_some(solved)
}

/// What changes over a sequence of measurements.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Drift {
    /// From first to last, as a share of the median: the median slope of all pairs (Theil and Sen), which no few
    /// disturbed measurements can move.
    pub(crate) trend: f64,
    /// The last tenth's median over the first tenth's, less one.
    pub(crate) last_over_first: f64,
}

impl Drift {
    /// Of values in the order in which they were measured; `None` of fewer than two.
    pub(crate) fn of(values: &[f64]) -> Option<Self> {
        let count = values.len();
        let pairs = (0..count).flat_map(|i| (i + 1..count).map(move |j| (i, j)));
        let slopes: Vec<f64> = pairs.map(|(i, j)| (values[j] - values[i]) / (j - i) as f64).collect();
        if slopes.is_empty() {
            return None;
        }
        let tenth = count.div_ceil(10);
        let (first, last) = (median(&values[..tenth]), median(&values[count - tenth..]));
        let trend = median(&slopes) * (count - 1) as f64 / median(values);
        Some(Self { trend, last_over_first: last / first - 1.0 })
    }

    /// Both in percent.
    pub(crate) fn text(&self) -> String {
        let (trend, tenths) = (self.trend * 100.0, self.last_over_first * 100.0);
        format!("{trend:+.1} % by trend, {tenths:+.1} % from the first to the last tenth")
    }
}

/// The middle value (of an even number, the lower of the two).
pub(crate) fn median(values: &[f64]) -> f64 {
    percentile(values, 0.5)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_a_value_that_was_measured() {
        let values = [5.0, 1.0, 4.0, 2.0, 3.0];
        assert_eq!(
            [0.0, 0.5, 0.8, 0.99, 1.0].map(|share| percentile(&values, share)),
            [1.0, 3.0, 4.0, 5.0, 5.0]
        );
        assert!(percentile(&[], 0.5).is_nan());
    }

    #[test]
    fn the_parts_of_a_cost_are_found_and_none_is_negative() {
        let lengths = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0].map(|k| k * 1024.0);
        let of = |cost: &dyn Fn(f64) -> f64| lengths.map(|tokens| (tokens, cost(tokens / 1024.0)));
        let fit = Fit::of(&of(&|k| 100.0 + 50.0 * k + 3.0 * k * k)).expect("points");
        for (got, was) in [(fit.fixed_ms, 100.0), (fit.linear_ms, 50.0), (fit.quadratic_ms, 3.0)] {
            assert!((got - was).abs() < 1e-6 * was, "{fit:?}");
        }
        assert!(fit.worst_residual < 1e-6);
        // Grows more slowly than any sum of these parts: what would have to be negative is zero.
        let fit = Fit::of(&of(&|k| 10.0 * k.sqrt())).expect("points");
        assert!(fit.quadratic_ms == 0.0 && fit.linear_ms >= 0.0 && fit.worst_residual > 0.1, "{fit:?}");
        assert!(Fit::of(&[]).is_none());
        let one = Fit::of(&[(2048.0, 10.0)]).expect("a point");
        assert!((one.at(2048.0) - 10.0).abs() < 1e-9, "{one:?}");
    }

    #[test]
    fn a_trend_is_seen_and_a_disturbed_measurement_is_no_trend() {
        let mut flat: Vec<f64> = (0..100).map(|i| 1.0 + 0.01 * f64::from(i % 3)).collect();
        flat[97] = 50.0;
        let drift = Drift::of(&flat).expect("values");
        assert!(drift.trend.abs() < 0.01 && drift.last_over_first.abs() < 0.02, "{drift:?}");
        let rising: Vec<f64> = (0..101).map(|i| 1.0 + 0.002 * f64::from(i)).collect();
        let drift = Drift::of(&rising).expect("values");
        assert!((drift.trend - 0.2 / 1.1).abs() < 1e-9 && drift.last_over_first > 0.15, "{drift:?}");
        assert!(Drift::of(&[1.0]).is_none());
    }
}
