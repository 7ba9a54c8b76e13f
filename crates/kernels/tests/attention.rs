//! The paged kernels against attention written out in f64, at shapes that hit every edge of their tiling.

use cacheclip_kernels::attend::{Queries, attend_rows};
use cacheclip_kernels::page::{HeadShape, LayerView, pages_for};
use cacheclip_kernels::place::{StoredLayer, place};
use cacheclip_kernels::probe::{Reduce, probe};
use cacheclip_kernels::rope::RopeTable;
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use rand::{Rng as _, SeedableRng as _};

struct Case {
    shape: HeadShape,
    heads: usize,
    tokens: usize,
    k: Vec<f32>,
    v: Vec<f32>,
    pool: Vec<f32>,
    table: Vec<u32>,
    rope: RopeTable,
}

impl Case {
    fn new(seed: u64, kv_heads: usize, group: usize, head_dim: usize, tokens: usize) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let shape = HeadShape { kv_heads, head_dim };
        let mut values = |n: usize| -> Vec<f32> { (0..n).map(|_| random.random_range(-2.0..2.0)).collect() };
        let (k, v) = (values(kv_heads * tokens * head_dim), values(kv_heads * tokens * head_dim));
        let pages = pages_for(tokens) + 3;
        let mut table: Vec<u32> = (0..pages as u32).collect();
        table.shuffle(&mut random);
        table.truncate(pages_for(tokens));
        // Pages nobody owns hold rubbish that must never be read.
        let mut pool = vec![f32::NAN; pages * shape.page()];
        for &page in &table {
            pool[page as usize * shape.page()..][..shape.page()].fill(0.0);
        }
        let rope = RopeTable::new(head_dim, tokens, 10_000.0, None);
        place(&mut pool, &table, shape, StoredLayer { k: &k, v: &v, tokens }, 0, &rope);
        Self { shape, heads: kv_heads * group, tokens, k, v, pool, table, rope }
    }

    fn view(&self) -> LayerView<'_> {
        LayerView { pool: &self.pool, table: &self.table, shape: self.shape }
    }

    fn queries(&self, seed: u64, rows: usize) -> Vec<f32> {
        let mut random = StdRng::seed_from_u64(seed);
        (0..rows * self.heads * self.shape.head_dim).map(|_| random.random_range(-2.0..2.0)).collect()
    }

    /// Probabilities of one query head at `position`, in f64.
    fn weights(&self, q: &[f32], head: usize, position: usize) -> Vec<f64> {
        let (dim, kv) = (self.shape.head_dim, head * self.shape.kv_heads / self.heads);
        let scores: Vec<f64> = (0..=position)
            .map(|column| {
                let mut key = self.k[(kv * self.tokens + column) * dim..][..dim].to_vec();
                self.rope.rotate(&mut key, column);
                let dot: f64 = key.iter().zip(q).map(|(a, b)| *a as f64 * *b as f64).sum();
                dot / (dim as f64).sqrt()
            })
            .collect();
        let peak = scores.iter().cloned().fold(f64::MIN, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - peak).exp()).collect();
        let total: f64 = weights.iter().sum();
        weights.iter().map(|w| w / total).collect()
    }
}

#[test]
fn rows_at_arbitrary_positions_attend_to_exactly_what_stands_before_them() {
    for (seed, (kv_heads, group, dim, tokens)) in [
        (1, 1, 32, 1),
        (2, 2, 32, 17),
        (1, 3, 64, 300),
        (3, 3, 64, 129),
        (2, 4, 128, 128),
        (1, 1, 8, 45),
        (2, 5, 48, 257),
    ]
    .into_iter()
    .enumerate()
    {
        let case = Case::new(seed as u64, kv_heads, group, dim, tokens);
        let positions: Vec<u32> =
            (0..tokens as u32).filter(|p| tokens < 20 || p % 3 == 0 || *p as usize == tokens - 1).collect();
        let width = case.heads * dim;
        let q = case.queries(99, positions.len());
        let mut out = vec![0.0; q.len()];
        let queries = Queries { data: &q, stride: width, heads: case.heads, positions: &positions };
        attend_rows(&case.view(), queries, &mut out);
        for (row, &position) in positions.iter().enumerate() {
            for head in 0..case.heads {
                let at = row * width + head * dim;
                let weights = case.weights(&q[at..at + dim], head, position as usize);
                let kv = head / group;
                for d in 0..dim {
                    let want: f64 = weights
                        .iter()
                        .enumerate()
                        .map(|(column, w)| w * case.v[(kv * tokens + column) * dim + d] as f64)
                        .sum();
                    let got = out[at + d] as f64;
                    assert!(
                        (got - want).abs() < 2e-5,
                        "shape {seed}, row {position}, head {head}: {got} {want}"
                    );
                }
            }
        }
    }
}

#[test]
fn one_row_alone_equals_the_same_row_among_others() {
    let case = Case::new(5, 2, 3, 64, 200);
    let width = case.heads * 64;
    let q = case.queries(7, 2);
    let mut both = vec![0.0; 2 * width];
    let positions = [150, 199];
    attend_rows(
        &case.view(),
        Queries { data: &q, stride: width, heads: 6, positions: &positions },
        &mut both,
    );
    let mut alone = vec![0.0; width];
    let last = Queries { data: &q[width..], stride: width, heads: 6, positions: &positions[1..] };
    attend_rows(&case.view(), last, &mut alone);
    for (a, b) in alone.iter().zip(&both[width..]) {
        assert!((a - b).abs() < 1e-6);
    }
}

#[test]
fn the_probe_reports_the_probabilities_attention_uses() {
    let case = Case::new(9, 2, 2, 32, 70);
    let positions = [40u32, 69];
    let q = case.queries(3, 2);
    let width = case.heads * 32;
    let queries = Queries { data: &q, stride: width, heads: case.heads, positions: &positions };
    for (heads, rows) in
        [(Reduce::Mean, Reduce::Mean), (Reduce::Max, Reduce::Max), (Reduce::Mean, Reduce::Max)]
    {
        let got = probe(&case.view(), queries, 70, heads, rows);
        let mut want = vec![0.0f32; 70];
        for (row, &position) in positions.iter().enumerate() {
            let mut reduced = vec![0.0f32; 70];
            for head in 0..case.heads {
                let at = row * width + head * 32;
                for (column, w) in case.weights(&q[at..at + 32], head, position as usize).iter().enumerate() {
                    heads.fold(&mut reduced[column], *w as f32);
                }
            }
            heads.finish(&mut reduced, case.heads);
            want.iter_mut().zip(reduced).for_each(|(into, value)| rows.fold(into, value));
        }
        rows.finish(&mut want, 2);
        for (a, b) in got.iter().zip(&want) {
            assert!((a - b).abs() < 1e-5, "{a} {b}");
        }
    }
}
