//! What took its turn, how long each turn took, and what was promised of it.

use super::super::measure::Runs;
use serde::Serialize;

/// Seconds of everything that takes its turn in a round, round by round.
#[derive(Debug, Default)]
pub(crate) struct Times(Vec<(&'static str, Vec<f64>)>);

impl Times {
    /// One turn.
    pub(crate) fn add(&mut self, name: &'static str, seconds: f64) {
        match self.0.iter_mut().find(|(known, _)| *known == name) {
            Some((_, all)) => all.push(seconds),
            None => self.0.push((name, vec![seconds])),
        }
    }

    /// The first round was not to count.
    pub(crate) fn forget(&mut self) {
        self.0.iter_mut().for_each(|(_, all)| all.clear());
    }

    /// Each turn as `of` of its seconds; `None` where it had none.
    pub(crate) fn runs(&self, name: &str, of: impl Fn(f64) -> f64) -> Option<Runs> {
        let (_, all) = self.0.iter().find(|(known, all)| *known == name && !all.is_empty())?;
        Some(Runs::of(all.iter().copied().map(of).collect()))
    }

    /// Bytes per second.
    pub(crate) fn rate(&self, name: &str, bytes: u64) -> Option<Runs> {
        self.runs(name, |seconds| bytes as f64 / seconds)
    }

    /// Seconds of one over seconds of another, within each round.
    pub(crate) fn ratio(&self, over: &str, under: &str) -> Option<Runs> {
        let of = |name: &str| self.0.iter().find(|(known, all)| *known == name && !all.is_empty());
        let ((_, over), (_, under)) = (of(over)?, of(under)?);
        Some(Runs::of(over.iter().zip(under).map(|(over, under)| over / under).collect()))
    }
}

/// Throughput of one thing that took its turn.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) name: &'static str,
    pub(crate) mib: usize,
    pub(crate) bytes_per_second: Option<Runs>,
    /// Why there is none.
    pub(crate) skipped: Option<String>,
}

/// What is promised of a value.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Wanted {
    AtLeast(f64),
    AtMost(f64),
}

/// A promise and what was measured of it; ratios are taken within a round.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Promise {
    pub(crate) what: &'static str,
    /// Of one transfer, where it depends on that.
    pub(crate) mib: Option<usize>,
    pub(crate) value: Runs,
    pub(crate) wanted: Wanted,
    /// By the median.
    pub(crate) kept: bool,
}

impl Promise {
    pub(crate) fn new(what: &'static str, mib: Option<usize>, value: Runs, wanted: Wanted) -> Self {
        let kept = match wanted {
            Wanted::AtLeast(least) => value.median >= least,
            Wanted::AtMost(most) => value.median <= most,
        };
        Self { what, mib, value, wanted, kept }
    }

    pub(crate) fn cells(&self) -> Vec<String> {
        let wanted = match self.wanted {
            Wanted::AtLeast(least) => format!("≥ {least}"),
            Wanted::AtMost(most) => format!("≤ {most}"),
        };
        vec![
            self.what.to_owned(),
            self.mib.map_or("-".into(), |mib| mib.to_string()),
            self.value.text(3),
            wanted,
            if self.kept { "kept" } else { "missed" }.to_owned(),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_taken_within_a_round_and_the_first_round_can_be_forgotten() {
        let mut times = Times::default();
        times.add("a", 100.0);
        times.add("b", 1.0);
        times.forget();
        assert!(times.ratio("a", "b").is_none() && times.rate("a", 1).is_none());
        for (a, b) in [(2.0, 1.0), (30.0, 10.0), (4.0, 1.0)] {
            times.add("a", a);
            times.add("b", b);
        }
        let ratio = times.ratio("a", "b").expect("both took their turns");
        assert_eq!((ratio.least, ratio.median, ratio.most), (2.0, 3.0, 4.0));
        assert_eq!(times.rate("b", 100).expect("three turns").most, 100.0);
        assert!(times.ratio("a", "c").is_none());
    }

    #[test]
    fn a_promise_is_kept_by_the_median() {
        let value = Runs::of(vec![1.0, 2.0, 9.0]);
        assert!(Promise::new("x", None, value.clone(), Wanted::AtLeast(2.0)).kept);
        assert!(!Promise::new("x", None, value.clone(), Wanted::AtMost(1.9)).kept);
        assert!(!Promise::new("x", None, value, Wanted::AtLeast(2.1)).kept);
    }
}
