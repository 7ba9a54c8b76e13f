//! The `cacheclip` policy: fused ranks, chunk heads, then the best rows, one by one or in windows; an exact budget.

use crate::assembly::Assembly;
use std::cmp::Ordering;
use std::collections::BinaryHeap;

/// What the policy is made of. Defaults are the design's but for the window, which was chosen on development tasks
/// (`docs/adr/0010-single-tokens.md`).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// Tokens that are recomputed together. Windows are for keeping an entity from being half fresh, half stale. The
    /// default is 1: fused ranks are flat, so a window of mediocre rows outweighs one that holds the decisive row, and
    /// windows of 8 kept fewer answers at every budget measured (`docs/quality.md`).
    pub window: usize,
    /// First tokens of each later chunk that are always recomputed, as far as `head_share` allows.
    pub head: usize,
    /// Largest share of the budget that chunk heads may take.
    pub head_share: f32,
    /// Offset of reciprocal rank fusion: larger means flatter.
    pub fusion_offset: f32,
    /// Bonus factor of a window that touches rows already chosen.
    pub adjacency: f32,
}

impl Default for Settings {
    fn default() -> Self {
        Self { window: 1, head: 16, head_share: 0.25, fusion_offset: 18.0, adjacency: 1.1 }
    }
}

/// Reciprocal rank fusion (Cormack et al., SIGIR 2009): only the order within each signal counts, so models
/// with different scales need no calibration. Each signal is `[rows]`; ties go to the earlier row. A signal's
/// zeros were never looked at and get no rank.
pub fn fuse(signals: &[&[f32]], offset: f32) -> Vec<f32> {
    let rows = signals.first().map_or(0, |signal| signal.len());
    let mut fused = vec![0.0; rows];
    for signal in signals {
        let mut order: Vec<usize> = (0..rows).filter(|&row| signal[row] > 0.0).collect();
        order.sort_by(|&a, &b| signal[b].total_cmp(&signal[a]).then(a.cmp(&b)));
        for (rank, row) in order.into_iter().enumerate() {
            fused[row] += 1.0 / (offset + rank as f32);
        }
    }
    fused
}

/// Exactly `budget` candidate rows (or all, if there are fewer), ascending. `scores` is `[reused rows]`.
pub(crate) fn windows(assembly: &Assembly, settings: &Settings, scores: &[f32], budget: usize) -> Vec<u32> {
    let budget = budget.min(assembly.candidate_rows());
    let mut picker = Picker::new(assembly, settings, scores);
    picker.take_heads(settings, budget);
    picker.take_windows(budget);
    picker.into_rows()
}

/// One sliding window in the queue; stale entries are skipped when popped.
#[derive(Debug)]
struct Entry {
    density: f32,
    start: usize,
    version: u32,
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> Ordering {
        self.density.total_cmp(&other.density).then(other.start.cmp(&self.start))
    }
}
impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl Eq for Entry {}

struct Picker<'a> {
    assembly: &'a Assembly,
    window: usize,
    adjacency: f32,
    scores: &'a [f32],
    /// Chunk of each reused row.
    chunk: Vec<usize>,
    chosen: Vec<bool>,
    count: usize,
    /// Bumped whenever a window's worth changes.
    version: Vec<u32>,
    queue: BinaryHeap<Entry>,
}

impl<'a> Picker<'a> {
    fn new(assembly: &'a Assembly, settings: &Settings, scores: &'a [f32]) -> Self {
        let rows = assembly.reused().len();
        let chunk =
            (0..assembly.chunks()).flat_map(|i| std::iter::repeat_n(i, assembly.chunk(i).len())).collect();
        Self {
            assembly,
            window: settings.window.max(1),
            adjacency: settings.adjacency,
            scores,
            chunk,
            chosen: vec![false; rows],
            count: 0,
            version: vec![0; rows],
            queue: BinaryHeap::new(),
        }
    }

    /// Rows of the chunk that holds `row`, relative to the first reused row.
    fn bounds(&self, row: usize) -> std::ops::Range<usize> {
        let rows = self.assembly.chunk(self.chunk[row]);
        let base = self.assembly.reused().start;
        rows.start - base..rows.end - base
    }

    fn choose(&mut self, row: usize) {
        if !self.chosen[row] {
            self.chosen[row] = true;
            self.count += 1;
        }
    }

    fn take_heads(&mut self, settings: &Settings, budget: usize) {
        let base = self.assembly.reused().start;
        let later: Vec<_> = self.assembly.candidates().filter(|(index, _)| *index > 0).collect();
        if later.is_empty() {
            return;
        }
        let share = (budget as f32 * settings.head_share) as usize / later.len();
        for (_, rows) in later {
            let head = share.min(settings.head).min(rows.len());
            (rows.start..rows.start + head).for_each(|row| self.choose(row - base));
        }
    }

    fn take_windows(&mut self, budget: usize) {
        let base = self.assembly.reused().start;
        let starts: Vec<usize> =
            self.assembly.candidates().flat_map(|(_, rows)| rows).map(|row| row - base).collect();
        for start in starts {
            self.push(start);
        }
        while self.count < budget {
            let Some(entry) = self.queue.pop() else { break };
            if entry.version != self.version[entry.start] {
                continue;
            }
            let rows = self.span(entry.start);
            let open: Vec<usize> = rows.clone().filter(|&row| !self.chosen[row]).collect();
            let room = budget - self.count;
            let taken = if open.len() <= room { &open[..] } else { self.best_run(&open, room) };
            let taken = taken.to_vec();
            taken.iter().for_each(|&row| self.choose(row));
            self.refresh(&taken);
        }
    }

    /// The window starting at `start`, cut at its chunk's end.
    fn span(&self, start: usize) -> std::ops::Range<usize> {
        start..(start + self.window).min(self.bounds(start).end)
    }

    /// The `room` neighbours among `open` with the largest sum: what is left of the budget still goes to
    /// whole runs.
    fn best_run<'b>(&self, open: &'b [usize], room: usize) -> &'b [usize] {
        let sum = |run: &[usize]| run.iter().map(|&row| self.scores[row]).sum::<f32>();
        let best =
            open.windows(room).enumerate().max_by(|a, b| sum(a.1).total_cmp(&sum(b.1)).then(b.0.cmp(&a.0)));
        best.map_or(&open[..room], |(_, run)| run)
    }

    /// Queues the window at `start` by score per row it would newly cost.
    fn push(&mut self, start: usize) {
        let span = self.span(start);
        let bounds = self.bounds(start);
        let (mut gain, mut cost) = (0.0, 0);
        for row in span.clone().filter(|&row| !self.chosen[row]) {
            gain += self.scores[row];
            cost += 1;
        }
        if cost == 0 {
            return;
        }
        let touches = cost < span.len()
            || (span.start > bounds.start && self.chosen[span.start - 1])
            || (span.end < bounds.end && self.chosen[span.end]);
        // A window cut short at a chunk's end must not win by its small cost alone.
        let density = gain / if touches { cost } else { self.window } as f32;
        let density = if touches { density * self.adjacency } else { density };
        self.queue.push(Entry { density, start, version: self.version[start] });
    }

    fn refresh(&mut self, taken: &[usize]) {
        let (Some(&low), Some(&high)) = (taken.first(), taken.last()) else { return };
        let bounds = self.bounds(low);
        let from = low.saturating_sub(self.window).max(bounds.start);
        for start in from..(high + 2).min(bounds.end) {
            self.version[start] += 1;
            self.push(start);
        }
    }

    fn into_rows(self) -> Vec<u32> {
        let base = self.assembly.reused().start;
        self.chosen
            .iter()
            .enumerate()
            .filter(|(_, chosen)| **chosen)
            .map(|(row, _)| (row + base) as u32)
            .collect()
    }
}
