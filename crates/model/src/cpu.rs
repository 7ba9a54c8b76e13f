//! The CPU device: `f32` activations in plain vectors, kernels from `cacheclip-kernels`.

use crate::buffers::Buffer;
use crate::device::{At, Device, Geometry, Look};
use crate::error::Error;
use crate::kv::{ChunkKv, LayerKv};
use crate::weights::Values;
use cacheclip_kernels::attend::{Queries, attend_each, attend_rows};
use cacheclip_kernels::matrix::Matrix;
use cacheclip_kernels::ops;
use cacheclip_kernels::page::{HeadShape, LayerView};
use cacheclip_kernels::place::{StoredLayer, place, scatter};
use cacheclip_kernels::probe::{attend_and_look, probe, probe_rows};
use cacheclip_kernels::rope::RopeTable;
use rayon::prelude::*;

/// Rows that one thread norms the heads of: fewer are not worth handing over.
const NORM_ROWS: usize = 32;
/// Bytes of a cache line, and of the widest vector.
const CACHE_LINE: usize = 64;

/// The host's processor; rayon's threads are its cores.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cpu;

/// Activations `[rows, width]`.
#[derive(Clone, Debug)]
pub struct Rows {
    data: Buffer,
    width: usize,
}

impl Rows {
    /// Of any content: every operation writes all of its result.
    fn new(rows: usize, width: usize) -> Self {
        Self { data: Buffer::of(rows * width), width }
    }

    fn rows(&self) -> usize {
        self.data.len() / self.width
    }
}

/// Paged KV: one pool per layer.
#[derive(Debug)]
pub struct Pages {
    layers: Vec<Pool>,
    shape: HeadShape,
}

/// One layer's pages from a cache line's beginning on, so that no vector of a tile lies across two lines.
#[derive(Debug)]
struct Pool {
    data: Vec<f32>,
    first: usize,
}

impl Pool {
    /// Zeroed memory is only committed when touched, so an idle pool costs nothing. (An allocation that asks for the
    /// alignment would be written to be zeroed.)
    fn new(floats: usize) -> Self {
        let data = vec![0.0; floats + CACHE_LINE / size_of::<f32>()];
        let first = data.as_ptr().align_offset(CACHE_LINE);
        Self { data, first }
    }

    fn get(&self) -> &[f32] {
        &self.data[self.first..]
    }

    fn get_mut(&mut self) -> &mut [f32] {
        &mut self.data[self.first..]
    }
}

impl Pages {
    fn view<'a>(&'a self, at: At<'a>) -> LayerView<'a> {
        LayerView { pool: self.layers[at.layer].get(), table: at.table, shape: self.shape }
    }
}

impl Device for Cpu {
    type Matrix = Matrix;
    type Vector = Vec<f32>;
    type Rows = Rows;
    type Pages = Pages;

    /// On one of rayon's threads: a call from there shares its work with the others without putting anyone to sleep.
    fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        rayon::scope(|_| work())
    }

    fn matrix(&self, parts: Vec<Values>, outputs: usize, inputs: usize) -> Result<Matrix, Error> {
        Ok(Matrix::new(Values::join(parts), outputs, inputs))
    }

    fn matrix_bytes(&self, matrix: &Matrix) -> usize {
        matrix.bytes()
    }

    fn vector(&self, data: Vec<f32>) -> Result<Vec<f32>, Error> {
        Ok(data)
    }

    fn pages(&self, geometry: &Geometry, count: usize) -> Result<Pages, Error> {
        let shape = HeadShape { kv_heads: geometry.kv_heads, head_dim: geometry.head_dim };
        let layers = (0..geometry.layers).map(|_| Pool::new(count * shape.page())).collect();
        Ok(Pages { layers, shape })
    }

    fn embed(&self, table: &Matrix, ids: &[u32]) -> Result<Rows, Error> {
        let mut rows = Rows::new(ids.len(), table.inputs());
        for (into, &id) in rows.data.chunks_exact_mut(table.inputs()).zip(ids) {
            table.row_into(id as usize, into);
        }
        Ok(rows)
    }

    fn norm(&self, x: &Rows, weight: &Vec<f32>, eps: f32) -> Result<Rows, Error> {
        let mut out = Rows::new(x.rows(), x.width);
        ops::rms_norm(&x.data, weight, eps, &mut out.data);
        Ok(out)
    }

    fn project(&self, x: &Rows, weight: &Matrix) -> Result<Rows, Error> {
        let mut out = Rows::new(x.rows(), weight.outputs());
        weight.project(&x.data, &mut out.data);
        Ok(out)
    }

    fn project_add(&self, out: &mut Rows, x: &Rows, weight: &Matrix) -> Result<(), Error> {
        weight.project_add(&x.data, &mut out.data);
        Ok(())
    }

    fn add_bias(&self, x: &mut Rows, bias: &Vec<f32>) -> Result<(), Error> {
        ops::add_bias(&mut x.data, bias);
        Ok(())
    }

    fn gate(&self, gate_up: &Rows) -> Result<Rows, Error> {
        let width = gate_up.width / 2;
        let mut out = Rows::new(gate_up.rows(), width);
        ops::silu_gate(&gate_up.data, width, &mut out.data);
        Ok(out)
    }

    fn take(&self, x: &Rows, rows: &[usize]) -> Result<Rows, Error> {
        let mut taken = Rows::new(rows.len(), x.width);
        for (into, &row) in taken.data.chunks_exact_mut(x.width).zip(rows) {
            into.copy_from_slice(&x.data[row * x.width..(row + 1) * x.width]);
        }
        Ok(taken)
    }

    fn logits(&self, x: &Rows, weight: &Matrix, out: &mut Vec<f32>) -> Result<(), Error> {
        let first = out.len();
        out.resize(first + x.rows() * weight.outputs(), 0.0);
        weight.project(&x.data, &mut out[first..]);
        Ok(())
    }

    fn norm_heads(
        &self,
        qkv: &mut Rows,
        geometry: &Geometry,
        query: &Vec<f32>,
        key: &Vec<f32>,
        eps: f32,
    ) -> Result<(), Error> {
        let normed = geometry.heads + geometry.kv_heads;
        let buffer = || vec![0.0; geometry.head_dim];
        let row = |before: &mut Vec<f32>, row: &mut [f32]| {
            for (index, head) in row.chunks_exact_mut(geometry.head_dim).take(normed).enumerate() {
                before.copy_from_slice(head);
                ops::rms_norm(before, if index < geometry.heads { query } else { key }, eps, head);
            }
        };
        qkv.data.par_chunks_exact_mut(qkv.width).with_min_len(NORM_ROWS).for_each_init(buffer, row);
        Ok(())
    }

    fn export(&self, qkv: &Rows, geometry: &Geometry) -> Result<LayerKv, Error> {
        let (dim, tokens) = (geometry.head_dim, qkv.rows());
        let mut data = Vec::with_capacity(2 * geometry.kv_heads * tokens * dim);
        for head in geometry.heads..geometry.heads + 2 * geometry.kv_heads {
            for row in qkv.data.chunks_exact(qkv.width) {
                data.extend_from_slice(&row[head * dim..(head + 1) * dim]);
            }
        }
        Ok(LayerKv::new(data, tokens))
    }

    fn place(
        &self,
        pages: &mut Pages,
        at: At<'_>,
        kv: &LayerKv,
        start: usize,
        rope: &RopeTable,
    ) -> Result<(), Error> {
        let (k, v) = (kv.k(), kv.v());
        let stored = StoredLayer { k: &k, v: &v, tokens: kv.tokens };
        place(pages.layers[at.layer].get_mut(), at.table, pages.shape, stored, start, rope);
        Ok(())
    }

    fn place_layers(
        &self,
        pages: &mut Pages,
        table: &[u32],
        kv: &ChunkKv,
        start: usize,
        rope: &RopeTable,
    ) -> Result<(), Error> {
        let shape = pages.shape;
        pages.layers.par_iter_mut().enumerate().for_each(|(layer, pool)| {
            let Some(kv) = kv.layer(layer) else { return };
            let (k, v) = (kv.k(), kv.v());
            let stored = StoredLayer { k: &k, v: &v, tokens: kv.tokens };
            place(pool.get_mut(), table, shape, stored, start, rope);
        });
        Ok(())
    }

    fn scatter(
        &self,
        pages: &mut Pages,
        at: At<'_>,
        qkv: &mut Rows,
        geometry: &Geometry,
        positions: &[u32],
        rope: &RopeTable,
    ) -> Result<(), Error> {
        let pool = pages.layers[at.layer].get_mut();
        scatter(pool, at.table, pages.shape, geometry.heads, &mut qkv.data, positions, rope);
        Ok(())
    }

    fn attend_rows(
        &self,
        pages: &Pages,
        at: At<'_>,
        qkv: &Rows,
        geometry: &Geometry,
        positions: &[u32],
    ) -> Result<Rows, Error> {
        let mut out = Rows::new(qkv.rows(), geometry.heads * geometry.head_dim);
        let queries = Queries { data: &qkv.data, stride: qkv.width, heads: geometry.heads, positions };
        attend_rows(&pages.view(at), queries, &mut out.data);
        Ok(out)
    }

    fn scatter_each(
        &self,
        pages: &mut Pages,
        layer: usize,
        tables: &[&[u32]],
        qkv: &mut Rows,
        geometry: &Geometry,
        positions: &[u32],
        rope: &RopeTable,
    ) -> Result<(), Error> {
        let (pool, shape, width) = (pages.layers[layer].get_mut(), pages.shape, qkv.width);
        let rows = qkv.data.chunks_exact_mut(width).zip(positions.chunks(1));
        for ((row, position), table) in rows.zip(tables) {
            scatter(pool, table, shape, geometry.heads, row, position, rope);
        }
        Ok(())
    }

    fn attend_each(
        &self,
        pages: &Pages,
        layer: usize,
        tables: &[&[u32]],
        qkv: &Rows,
        geometry: &Geometry,
        positions: &[u32],
    ) -> Result<Rows, Error> {
        let mut out = Rows::new(qkv.rows(), geometry.heads * geometry.head_dim);
        let queries = Queries { data: &qkv.data, stride: qkv.width, heads: geometry.heads, positions };
        attend_each(|row| pages.view(At { layer, table: tables[row] }), queries, &mut out.data);
        Ok(out)
    }

    fn probe(
        &self,
        pages: &Pages,
        look: Look<'_>,
        qkv: &Rows,
        geometry: &Geometry,
    ) -> Result<Vec<f32>, Error> {
        let queries = Queries {
            data: &qkv.data[look.first * qkv.width..],
            stride: qkv.width,
            heads: geometry.heads,
            positions: &look.positions[look.first..],
        };
        let view = pages.view(look.at);
        Ok(match look.rows {
            Some(rows) => probe(&view, queries, look.columns, look.heads, rows),
            None => probe_rows(&view, queries, look.columns, look.heads),
        })
    }

    fn attend_and_look(
        &self,
        pages: &Pages,
        look: Look<'_>,
        qkv: &Rows,
        geometry: &Geometry,
    ) -> Result<(Rows, Vec<f32>), Error> {
        let mut out = Rows::new(qkv.rows(), geometry.heads * geometry.head_dim);
        let (heads, positions) = (geometry.heads, look.positions);
        let queries = Queries { data: &qkv.data, stride: qkv.width, heads, positions };
        let values = attend_and_look(&pages.view(look.at), queries, look.rows_alone(), &mut out.data);
        Ok((out, values))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::load::{Source, load};
    use crate::pages::Allocator;
    use crate::{Batch, Pass};

    #[test]
    fn a_decoding_step_writes_its_own_tokens_kv_and_moves_nothing_else() {
        let config = Config { layers: 2, vocab: 500, ..Config::shape("aux-30m").expect("a known shape") };
        let (layers, written) = (config.layers, 2 * config.kv_heads * config.head_dim);
        let decoder = load(&Source::Random { config, seed: 3 }, Cpu).expect("random weights").decoder;
        let mut pages = decoder.pages(8).expect("pages");
        let sequence = Allocator::new(8).sequence(100).expect("room");
        let (ids, positions): (Vec<u32>, Vec<u32>) = (0..90).map(|i| (i * 7 % 500, i)).unzip();
        decoder.forward(&mut pages, Pass::new(&ids, &positions, sequence.table())).expect("a prefill");
        let before: Vec<Vec<f32>> = pages.layers.iter().map(|pool| pool.get().to_vec()).collect();
        let batch = Batch { ids: &[1], positions: &[90], tables: &[sequence.table()] };
        decoder.decode(&mut pages, batch, &mut Vec::new()).expect("a step");
        for (layer, before) in before.iter().enumerate() {
            let after = pages.layers[layer].get();
            let changed = before.iter().zip(after).filter(|(was, is)| was.to_bits() != is.to_bits()).count();
            assert!(
                changed <= written && changed > written / 2,
                "layer {layer} of {layers}: {changed} floats"
            );
        }
    }

    #[test]
    fn pages_begin_on_a_cache_line() {
        let geometry = Geometry { layers: 3, heads: 2, kv_heads: 1, head_dim: 64 };
        let pages = Cpu.pages(&geometry, 1000).expect("pages");
        for pool in &pages.layers {
            assert_eq!(pool.get().as_ptr() as usize % CACHE_LINE, 0);
            assert!(pool.get().len() >= 1000 * pages.shape.page());
        }
    }
}
