//! Records summed up: per family, policy and ratio, with paired intervals.

use super::bench::{Cell, Record};
use super::families::Family;
use super::pair::Pair;
use super::policies::{FULL, Policy};
use super::prepare::KvError;
use super::stats::{Interval, Resamples, interval};
use super::suite::Settings;
use serde::{Deserialize, Serialize};

/// Full attention must get at least this share of a family right for the family to count in pooled rows: below it,
/// keeping full attention's answers says little.
const ANSWERABLE: f64 = 0.5;
/// Name of the pooled cross-chunk families.
pub(super) const CROSS: &str = "all cross-chunk";
/// Name of the pooled needle families.
pub(super) const NEEDLES: &str = "all niah";

/// What a run found.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// Name of the suite.
    pub suite: String,
    /// Of tasks, lots and resamples.
    pub seed: u64,
    /// Ratios asked for.
    pub ratios: Vec<f32>,
    /// First bytes of the primary's weights digest, in hexadecimal.
    pub primary: String,
    /// Of the auxiliary model's.
    pub aux: String,
    /// What both instances proved: name and relative error of each check.
    pub certificates: [String; 2],
    /// The families with full attention's accuracy.
    pub families: Vec<FamilyRow>,
    /// The policies, by name: what each is.
    pub policies: Vec<(String, String)>,
    /// One per family (and pool), policy and ratio.
    pub rows: Vec<Row>,
    /// Ours against every rival, pooled over cross-chunk families.
    pub differences: Vec<Difference>,
    /// The stale cache's mean relative error.
    pub kv_error: KvError,
    /// How signals find what matters, where that was measured.
    pub signals: Vec<SignalRow>,
    /// Seconds of all threads by stage, and of the whole run by the clock (`wall`): the only figures that differ
    /// from run to run.
    pub seconds: Vec<(String, f64)>,
}

/// A family.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FamilyRow {
    /// Its name.
    pub family: String,
    /// Whether the answer needs more than one chunk read together; unknown for given tasks.
    pub cross_chunk: bool,
    /// Whether it counts in pooled rows: full attention gets at least half of it right.
    pub answerable: bool,
    /// Full attention's accuracy, absolute.
    pub full_accuracy: f64,
    /// Mean tokens of a prompt.
    pub tokens: f64,
    /// Tasks.
    pub n: usize,
}

/// A policy at a ratio on a family or a pool.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    /// Family or pool.
    pub family: String,
    /// Policy.
    pub policy: String,
    /// Ratio asked for; none for policies with a budget of their own.
    pub ratio: Option<f32>,
    /// Mean score, absolute.
    pub accuracy: f64,
    /// Of full attention's on the same tasks, in percent; none where that is zero.
    pub pct_of_full: Option<f64>,
    /// Bounds of the paired bootstrap's 95 % interval of `pct_of_full`.
    pub ci_low: Option<f64>,
    /// The upper.
    pub ci_high: Option<f64>,
    /// Mean realised ratio.
    pub realised_ratio: f64,
    /// Tasks.
    pub n: usize,
    /// Mean KL to full prefill along the right answer, in nats.
    pub kl: f64,
    /// Share of tasks whose first token is full prefill's.
    pub first_token_agreement: f64,
}

/// A paired difference, in points of full attention.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Difference {
    /// One of ours.
    pub policy: String,
    /// The rival.
    pub rival: String,
    /// Ratio asked for.
    pub ratio: f32,
    /// Whether no other rival is better at this ratio.
    pub best_rival: bool,
    /// Ours less the rival's.
    pub points: f64,
    /// Its 95 % interval.
    pub interval: Option<Interval>,
    /// Tasks.
    pub n: usize,
}

/// A signal on a family: means over tasks.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SignalRow {
    /// Family.
    pub family: String,
    /// Signal.
    pub signal: String,
    /// Share of decisive candidate rows among the best 10 %.
    pub recall_10: f64,
    /// Among the best 20 %.
    pub recall_20: f64,
    /// Of the best 20 % with what full prefill's question looks at most.
    pub overlap_20: f64,
    /// Share of that attention that the best 20 % hold.
    pub mass_20: f64,
    /// Tasks.
    pub n: usize,
}

/// One policy at one ratio on one family, resampled.
struct Spread {
    scores: f64,
    full: f64,
    realised: f64,
    kl: f64,
    first: f64,
    n: usize,
    /// Sums of scores, and of full attention's, in every resample.
    resampled: Vec<f64>,
    full_resampled: Vec<f64>,
}

impl Spread {
    fn of(records: &[&Record], at: usize, resamples: &Resamples, full_resampled: &[f64]) -> Self {
        let scores: Vec<f32> = records.iter().map(|record| record.outcomes[at].score).collect();
        let sum = |value: &dyn Fn(&Record) -> f32| records.iter().map(|it| f64::from(value(it))).sum();
        Self {
            scores: sum(&|it| it.outcomes[at].score),
            full: sum(&|it| it.full),
            realised: sum(&|it| it.outcomes[at].realised),
            kl: sum(&|it| it.outcomes[at].kl),
            first: sum(&|it| f32::from(it.outcomes[at].first)),
            n: records.len(),
            resampled: resamples.sums(&scores),
            full_resampled: full_resampled.to_vec(),
        }
    }

    fn pool(spreads: &[&Self]) -> Self {
        let sum = |value: &dyn Fn(&Self) -> f64| spreads.iter().map(|it| value(it)).sum();
        let added = |values: &dyn Fn(&Self) -> &[f64]| {
            let count = spreads.first().map_or(0, |it| values(it).len());
            (0..count).map(|i| spreads.iter().map(|it| values(it)[i]).sum()).collect()
        };
        Self {
            scores: sum(&|it| it.scores),
            full: sum(&|it| it.full),
            realised: sum(&|it| it.realised),
            kl: sum(&|it| it.kl),
            first: sum(&|it| it.first),
            n: spreads.iter().map(|it| it.n).sum(),
            resampled: added(&|it| &it.resampled),
            full_resampled: added(&|it| &it.full_resampled),
        }
    }

    fn row(&self, family: &str, cell: &Cell<'_>) -> Row {
        let n = self.n.max(1) as f64;
        let percent = self.resampled.iter().zip(&self.full_resampled).map(|(ours, full)| 100.0 * ours / full);
        let bounds = interval(percent);
        Row {
            family: family.to_owned(),
            policy: cell.policy.name().to_owned(),
            ratio: cell.ratio,
            accuracy: self.scores / n,
            pct_of_full: (self.full > 0.0).then(|| 100.0 * self.scores / self.full),
            ci_low: bounds.map(|it| it.low),
            ci_high: bounds.map(|it| it.high),
            realised_ratio: self.realised / n,
            n: self.n,
            kl: self.kl / n,
            first_token_agreement: self.first / n,
        }
    }
}

impl Report {
    pub(super) fn new(
        pair: &Pair,
        settings: &Settings,
        policies: &[Box<dyn Policy>],
        cells: &[Cell<'_>],
        records: &[Record],
        wall: f64,
    ) -> Self {
        let mut families: Vec<FamilyRow> = Vec::new();
        let mut spreads: Vec<Vec<Spread>> = Vec::new();
        let mut signals = Vec::new();
        for group in records.chunk_by(|a, b| a.family == b.family) {
            let group: Vec<&Record> = group.iter().collect();
            families.push(family_row(&group));
            let full: Vec<f32> = group.iter().map(|record| record.full).collect();
            let resamples = Resamples::new(settings.seed ^ families.len() as u64, group.len());
            let full = resamples.sums(&full);
            spreads.push((0..cells.len()).map(|at| Spread::of(&group, at, &resamples, &full)).collect());
            signals.extend(signal_rows(&group));
        }
        let mut rows = Vec::new();
        for (family, spreads) in families.iter().zip(&spreads) {
            rows.extend(spreads.iter().zip(cells).map(|(spread, cell)| spread.row(&family.family, cell)));
        }
        let mut differences = Vec::new();
        let cross = |it: &FamilyRow| it.cross_chunk && it.answerable;
        let needle = |it: &FamilyRow| it.family.starts_with("niah") && it.answerable;
        for (name, within) in [(CROSS, &cross as &dyn Fn(&FamilyRow) -> bool), (NEEDLES, &needle)] {
            let of: Vec<&Vec<Spread>> = families
                .iter()
                .zip(&spreads)
                .filter(|(family, _)| within(family))
                .map(|(_, it)| it)
                .collect();
            if of.is_empty() {
                continue;
            }
            let pooled: Vec<Spread> = (0..cells.len())
                .map(|at| Spread::pool(&of.iter().map(|it| &it[at]).collect::<Vec<_>>()))
                .collect();
            rows.extend(pooled.iter().zip(cells).map(|(spread, cell)| spread.row(name, cell)));
            if name == CROSS {
                differences = compare(&pooled, cells, &settings.ratios);
            }
        }
        let mut seconds: Vec<(String, f64)> = Vec::new();
        for (stage, time) in records.iter().flat_map(|record| &record.seconds) {
            match seconds.iter_mut().find(|(known, _)| known == stage) {
                Some((_, sum)) => *sum += time,
                None => seconds.push((stage.clone(), *time)),
            }
        }
        seconds.push(("wall".into(), wall));
        Self {
            suite: settings.suite.clone(),
            seed: settings.seed,
            ratios: settings.ratios.clone(),
            primary: pair.primary.weights.clone(),
            aux: pair.aux.weights.clone(),
            certificates: [pair.primary.certificate.to_string(), pair.aux.certificate.to_string()],
            policies: policies.iter().map(|it| (it.name().to_owned(), it.about().to_owned())).collect(),
            kv_error: mean_error(records),
            families,
            rows,
            differences,
            signals,
            seconds,
        }
    }

    /// A row by its family, policy and ratio.
    pub fn row(&self, family: &str, policy: &str, ratio: Option<f32>) -> Option<&Row> {
        let same = |row: &&Row| row.family == family && row.policy == policy && row.ratio == ratio;
        self.rows.iter().find(same)
    }
}

fn family_row(group: &[&Record]) -> FamilyRow {
    let n = group.len() as f64;
    let full_accuracy = group.iter().map(|it| f64::from(it.full)).sum::<f64>() / n;
    FamilyRow {
        family: group[0].family.clone(),
        cross_chunk: Family::named(&group[0].family).is_some_and(Family::cross_chunk),
        answerable: full_accuracy >= ANSWERABLE,
        full_accuracy,
        tokens: group.iter().map(|it| it.tokens as f64).sum::<f64>() / n,
        n: group.len(),
    }
}

/// Each of ours (ablations aside) against each rival, at each ratio.
fn compare(pooled: &[Spread], cells: &[Cell<'_>], ratios: &[f32]) -> Vec<Difference> {
    let mut differences = Vec::new();
    for &ratio in ratios {
        let at = |cell: &Cell<'_>| cell.ratio.is_none_or(|it| it == ratio);
        let rival = |policy: &dyn Policy| {
            // What recomputes everything whatever the ratio is no rival at a ratio.
            !policy.ours() && !policy.informed() && policy.name() != FULL && policy.name() != "prefix-only"
        };
        let here = || cells.iter().zip(pooled).filter(|(cell, _)| at(cell));
        let rivals: Vec<_> = here().filter(|(cell, _)| rival(cell.policy)).collect();
        let best = rivals.iter().map(|(_, spread)| spread.scores).fold(f64::NEG_INFINITY, f64::max);
        for (ours, ours_spread) in here().filter(|(cell, _)| cell.policy.ours() && !cell.policy.ablation()) {
            for (rival, spread) in &rivals {
                let both = ours_spread.resampled.iter().zip(&spread.resampled).zip(&spread.full_resampled);
                differences.push(Difference {
                    policy: ours.policy.name().to_owned(),
                    rival: rival.policy.name().to_owned(),
                    ratio,
                    best_rival: spread.scores == best,
                    points: 100.0 * (ours_spread.scores - spread.scores) / spread.full,
                    interval: interval(both.map(|((a, b), full)| 100.0 * (a - b) / full)),
                    n: spread.n,
                });
            }
        }
    }
    differences
}

fn signal_rows(group: &[&Record]) -> Vec<SignalRow> {
    let measured: Vec<&&Record> = group.iter().filter(|record| !record.agreement.is_empty()).collect();
    let names = measured.first().map_or(&[][..], |record| &record.agreement);
    let row = |(at, name): (usize, &super::Agreement)| {
        let of = || measured.iter().map(|record| &record.agreement[at]);
        let mean = |values: Vec<f32>| {
            values.iter().map(|&value| f64::from(value)).sum::<f64>() / values.len().max(1) as f64
        };
        SignalRow {
            family: group[0].family.clone(),
            signal: name.signal.clone(),
            recall_10: mean(of().filter_map(|it| it.recall_10).collect()),
            recall_20: mean(of().filter_map(|it| it.recall_20).collect()),
            overlap_20: mean(of().map(|it| it.overlap_20).collect()),
            mass_20: mean(of().map(|it| it.mass_20).collect()),
            n: measured.len(),
        }
    };
    names.iter().enumerate().map(row).collect()
}

fn mean_error(records: &[Record]) -> KvError {
    let mean = |pick: &dyn Fn(&KvError) -> [f32; 2]| {
        let n = records.len().max(1) as f32;
        [0, 1].map(|part| records.iter().map(|it| pick(&it.kv_error)[part]).sum::<f32>() / n)
    };
    KvError { first: mean(&|it| it.first), head: mean(&|it| it.head), interior: mean(&|it| it.interior) }
}
