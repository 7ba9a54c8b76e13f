//! What becomes of several runs.

use serde::Serialize;

/// Several runs of the same thing.
#[derive(Clone, Debug, Serialize)]
pub struct Runs {
    /// The middle one (of an even number, the lower of the two).
    pub median: f64,
    /// The smallest.
    pub least: f64,
    /// The largest.
    pub most: f64,
    /// How many.
    pub n: usize,
}

impl Runs {
    /// Of measured values, in any order.
    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let median = values.get(values.len().saturating_sub(1) / 2).copied().unwrap_or(f64::NAN);
        let end = |value: Option<&f64>| value.copied().unwrap_or(f64::NAN);
        Self { median, least: end(values.first()), most: end(values.last()), n: values.len() }
    }

    /// The same in another unit.
    pub fn map(&self, unit: impl Fn(f64) -> f64) -> Self {
        Self { median: unit(self.median), least: unit(self.least), most: unit(self.most), n: self.n }
    }

    /// `median [least, most]`.
    pub fn text(&self, digits: usize) -> String {
        format!("{:.digits$} [{:.digits$}, {:.digits$}]", self.median, self.least, self.most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_lies_between_the_ends() {
        let runs = Runs::of(vec![3.0, 1.0, 2.0, 9.0]);
        assert_eq!((runs.least, runs.median, runs.most, runs.n), (1.0, 2.0, 9.0, 4));
        assert_eq!(runs.text(1), "2.0 [1.0, 9.0]");
        assert!(Runs::of(Vec::new()).median.is_nan());
    }
}
