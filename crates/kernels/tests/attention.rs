//! The paged kernels against attention written out in f64, at shapes that hit every edge of their tiling.

use cacheclip_kernels::attend::{Queries, attend_each, attend_rows};
use cacheclip_kernels::page::{HeadShape, LayerView, pages_for};
use cacheclip_kernels::place::{StoredLayer, place};
use cacheclip_kernels::probe::{Look, Reduce, attend_and_look, probe, probe_rows};
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

fn on_threads<T: Send>(count: usize, work: impl FnOnce() -> T + Send) -> T {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(count).build().expect("threads");
    pool.install(work)
}

fn close(a: &[f32], b: &[f32], tolerance: f32) {
    assert_eq!(a.len(), b.len());
    for (index, (a, b)) in a.iter().zip(b).enumerate() {
        assert!((a - b).abs() <= tolerance, "{index}: {a} {b}");
    }
}

#[test]
fn columns_that_several_threads_share_give_what_one_sweep_gives() {
    for (kv_heads, group, rows) in [(1, 7, 1), (3, 3, 1), (2, 2, 33), (1, 5, 60)] {
        let case = Case::new(11, kv_heads, group, 64, 1500);
        let q = case.queries(12, rows);
        let positions: Vec<u32> = (0..rows as u32).map(|row| 1499 - 20 * (rows as u32 - 1 - row)).collect();
        let queries = Queries { data: &q, stride: q.len() / rows, heads: case.heads, positions: &positions };
        let attended = |threads| {
            let mut out = vec![0.0; q.len()];
            on_threads(threads, || attend_rows(&case.view(), queries, &mut out));
            out
        };
        let alone = attended(1);
        [2, 5, 16].into_iter().for_each(|threads| close(&attended(threads), &alone, 2e-6));
    }
}

#[test]
fn rows_of_several_sequences_attend_as_each_does_alone() {
    let cases = [1, 40, 700, 2100].map(|tokens| Case::new(tokens as u64, 2, 7, 64, tokens));
    let (views, positions) =
        (cases.each_ref().map(Case::view), cases.each_ref().map(|it| it.tokens as u32 - 1));
    let q = cases[0].queries(13, cases.len());
    let width = q.len() / cases.len();
    let queries = Queries { data: &q, stride: width, heads: 14, positions: &positions };
    for threads in [1, 3] {
        let mut together = vec![0.0; q.len()];
        on_threads(threads, || attend_each(|row| views[row], queries, &mut together));
        for (row, view) in views.iter().enumerate() {
            let queries = Queries { data: &q[row * width..], positions: &positions[row..=row], ..queries };
            let mut alone = vec![0.0; width];
            attend_rows(view, queries, &mut alone);
            close(&together[row * width..][..width], &alone, 2e-6);
        }
    }
}

#[test]
fn attending_and_looking_at_once_gives_what_each_gives_alone() {
    let case = Case::new(17, 2, 3, 64, 1000);
    let width = case.heads * 64;
    let end: Vec<u32> = (960..1000).collect();
    let spread: Vec<u32> = (0..40).map(|row| row * 25 + 3).collect();
    for (positions, first, columns) in [(&end, 0, 960), (&end, 13, 1000), (&spread, 0, 777), (&spread, 2, 16)]
    {
        let q = case.queries(18, positions.len());
        let queries = Queries { data: &q, stride: width, heads: case.heads, positions };
        let seen = Queries { data: &q[first * width..], positions: &positions[first..], ..queries };
        let mut attended = vec![0.0; q.len()];
        attend_rows(&case.view(), queries, &mut attended);
        for (threads, heads, rows) in [
            (1, Reduce::Mean, Some(Reduce::Mean)),
            (2, Reduce::Max, Some(Reduce::Max)),
            (3, Reduce::Mean, Some(Reduce::Max)),
            (4, Reduce::Max, None),
        ] {
            let mut out = vec![0.0; q.len()];
            let look = Look { first, columns, heads, rows };
            let got = on_threads(threads, || attend_and_look(&case.view(), queries, look, &mut out));
            close(&out, &attended, 1e-5);
            let want = match rows {
                Some(rows) => probe(&case.view(), seen, columns, heads, rows),
                None => probe_rows(&case.view(), seen, columns, heads),
            };
            close(&got, &want, 1e-5);
        }
    }
}

#[test]
fn probabilities_of_a_row_by_row_look_are_those_of_attention() {
    let case = Case::new(19, 2, 2, 32, 600);
    let positions = [3u32, 130, 599];
    let q = case.queries(20, 3);
    let width = case.heads * 32;
    let queries = Queries { data: &q, stride: width, heads: case.heads, positions: &positions };
    let got = on_threads(3, || probe_rows(&case.view(), queries, 590, Reduce::Max));
    for (row, &position) in positions.iter().enumerate() {
        let mut want = vec![0.0f32; 590];
        for head in 0..case.heads {
            let q = &q[row * width + head * 32..][..32];
            let weights = case.weights(q, head, position as usize);
            want.iter_mut().zip(weights).for_each(|(into, weight)| *into = into.max(weight as f32));
        }
        close(&got[row * 590..(row + 1) * 590], &want, 1e-5);
    }
}
