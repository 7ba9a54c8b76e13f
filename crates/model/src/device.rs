//! The seam under which devices differ and above which model families are written once.
//!
//! Five operations carry the method: [`project`](Device::project), [`place`](Device::place),
//! [`scatter`](Device::scatter), [`attend_rows`](Device::attend_rows) and [`probe`](Device::probe). The rest
//! is elementwise. Activations, weights and pages are opaque: what lives on a device stays there until
//! [`read`](Device::read) or [`export`](Device::export).

use crate::error::Error;
use crate::kv::{ChunkKv, LayerKv};
use cacheclip_kernels::probe::Reduce;
use cacheclip_kernels::rope::RopeTable;

/// Heads of a model's attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
}

impl Geometry {
    /// Width of a fused query, key and value row.
    pub fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }
}

/// One sequence's place in the pages: its page table and the layer at hand.
#[derive(Clone, Copy, Debug)]
pub struct At<'a> {
    /// Layer, from 0.
    pub layer: usize,
    /// Page `i` holds positions `16·i .. 16·i + 16`.
    pub table: &'a [u32],
}

/// A compute device.
pub trait Device: Send + Sync + 'static {
    /// Weights `[outputs, inputs]`.
    type Matrix: Send + Sync;
    /// Weights `[width]`.
    type Vector: Send + Sync;
    /// Activations `[rows, width]`.
    type Rows: Send;
    /// The paged KV of all sequences.
    type Pages: Send;

    /// Runs `work` where calls to the device cost least.
    fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        work()
    }

    /// Uploads a weight matrix, row-major.
    ///
    /// # Errors
    /// The device is out of memory.
    fn matrix(&self, data: Vec<f32>, outputs: usize, inputs: usize) -> Result<Self::Matrix, Error>;
    /// Uploads a weight vector.
    ///
    /// # Errors
    /// The device is out of memory.
    fn vector(&self, data: Vec<f32>) -> Result<Self::Vector, Error>;
    /// Reserves `count` pages per layer.
    ///
    /// # Errors
    /// The device is out of memory.
    fn pages(&self, geometry: &Geometry, count: usize) -> Result<Self::Pages, Error>;

    /// Embeddings of `ids`, `[ids, hidden]`.
    fn embed(&self, table: &Self::Matrix, ids: &[u32]) -> Self::Rows;
    /// Root-mean-square norm of each row.
    fn norm(&self, x: &Self::Rows, weight: &Self::Vector, eps: f32) -> Self::Rows;
    /// `x · Wᵀ`.
    fn project(&self, x: &Self::Rows, weight: &Self::Matrix) -> Self::Rows;
    /// `out += x · Wᵀ`.
    fn project_add(&self, out: &mut Self::Rows, x: &Self::Rows, weight: &Self::Matrix);
    /// `x += bias` in every row.
    fn add_bias(&self, x: &mut Self::Rows, bias: &Self::Vector);
    /// `silu(gate) · up` of rows that hold both halves.
    fn gate(&self, gate_up: &Self::Rows) -> Self::Rows;
    /// The given rows of `x`.
    fn take(&self, x: &Self::Rows, rows: &[usize]) -> Self::Rows;
    /// Appends row-major values to `out`, on the host.
    fn read(&self, x: &Self::Rows, out: &mut Vec<f32>);

    /// Root-mean-square norm of every query head and every key head of freshly projected rows, in place and
    /// before [`export`](Self::export); values stay as they are.
    fn norm_heads(
        &self,
        qkv: &mut Self::Rows,
        geometry: &Geometry,
        query: &Self::Vector,
        key: &Self::Vector,
        eps: f32,
    );
    /// Position-free keys and values of freshly projected rows, before [`scatter`](Self::scatter).
    fn export(&self, qkv: &Self::Rows, geometry: &Geometry) -> LayerKv;
    /// Places stored KV at positions `start..`, rotating K.
    ///
    /// # Errors
    /// A device fault.
    fn place(
        &self,
        pages: &mut Self::Pages,
        at: At<'_>,
        kv: &LayerKv,
        start: usize,
        rope: &RopeTable,
    ) -> Result<(), Error>;
    /// As [`place`](Self::place) for all layers of a section.
    ///
    /// # Errors
    /// A device fault.
    fn place_layers(
        &self,
        pages: &mut Self::Pages,
        table: &[u32],
        kv: &ChunkKv,
        start: usize,
        rope: &RopeTable,
    ) -> Result<(), Error> {
        for (layer, kv) in kv.layers().enumerate() {
            self.place(pages, At { layer, table }, kv, start, rope)?;
        }
        Ok(())
    }
    /// Rotates the queries of `qkv` in place and writes its keys (rotated) and values to `positions`.
    ///
    /// # Errors
    /// A device fault.
    fn scatter(
        &self,
        pages: &mut Self::Pages,
        at: At<'_>,
        qkv: &mut Self::Rows,
        geometry: &Geometry,
        positions: &[u32],
        rope: &RopeTable,
    ) -> Result<(), Error>;
    /// Attention of the rotated queries of `qkv` over everything at or before their positions (ascending):
    /// `[rows, heads · head_dim]`.
    fn attend_rows(
        &self,
        pages: &Self::Pages,
        at: At<'_>,
        qkv: &Self::Rows,
        geometry: &Geometry,
        positions: &[u32],
    ) -> Self::Rows;
    /// As [`scatter`](Self::scatter) where every row is of another sequence: row `i` goes to `tables[i]`.
    ///
    /// # Errors
    /// A device fault.
    #[allow(clippy::too_many_arguments)]
    fn scatter_each(
        &self,
        pages: &mut Self::Pages,
        layer: usize,
        tables: &[&[u32]],
        qkv: &mut Self::Rows,
        geometry: &Geometry,
        positions: &[u32],
        rope: &RopeTable,
    ) -> Result<(), Error>;
    /// As [`attend_rows`](Self::attend_rows) where every row is of another sequence (positions in any order).
    fn attend_each(
        &self,
        pages: &Self::Pages,
        layer: usize,
        tables: &[&[u32]],
        qkv: &Self::Rows,
        geometry: &Geometry,
        positions: &[u32],
    ) -> Self::Rows;
    /// Attention probabilities of rows `first..` over columns `0..columns`, reduced over heads, then (where the look
    /// says how) over rows: `[columns]`, else `[rows, columns]`.
    fn probe(&self, pages: &Self::Pages, look: Look<'_>, qkv: &Self::Rows, geometry: &Geometry) -> Vec<f32>;
    /// [`attend_rows`](Self::attend_rows) and [`probe`](Self::probe) of one pass: a device that can computes scores once
    /// for both.
    fn attend_and_look(
        &self,
        pages: &Self::Pages,
        look: Look<'_>,
        qkv: &Self::Rows,
        geometry: &Geometry,
    ) -> (Self::Rows, Vec<f32>) {
        let attended = self.attend_rows(pages, look.at, qkv, geometry, look.positions);
        (attended, self.probe(pages, look, qkv, geometry))
    }
}

/// What a probe looks at.
#[derive(Clone, Copy, Debug)]
pub struct Look<'a> {
    /// The layer and the sequence.
    pub at: At<'a>,
    /// First row of the pass that counts.
    pub first: usize,
    /// Positions of all rows of the pass.
    pub positions: &'a [u32],
    /// Columns reported.
    pub columns: usize,
    /// Reduction over heads.
    pub heads: Reduce,
    /// Reduction over rows, if any.
    pub rows: Option<Reduce>,
}
