//! The seam under which devices differ and above which model families are written once.
//!
//! Five operations carry the method: [`project`](Device::project), [`place`](Device::place),
//! [`scatter`](Device::scatter), [`attend_rows`](Device::attend_rows) and [`probe`](Device::probe). The rest
//! is elementwise. Activations, weights and pages are opaque: what lives on a device stays there until
//! [`logits`](Device::logits), [`export`](Device::export) or [`probe`](Device::probe).
//!
//! Everything may fail: a device can run out of memory for one request and go on with the others.

use crate::error::Error;
use crate::kv::{ChunkKv, HostPool, LayerKv};
use crate::walk::BLOCK_ROWS;
use crate::weights::Values;
use cacheclip_chunk::Dtype;
use cacheclip_kernels::probe::{self, Reduce};
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

/// How far two ways to the same logits may be apart: largest difference over largest magnitude.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Precision {
    /// What rounding may cause.
    pub tolerance: f32,
    /// What a negative control must exceed.
    pub control: f32,
}

impl Precision {
    /// Of arithmetic in f32: a control misses by a hundred times the tolerance.
    pub const F32: Self = Self { tolerance: 1e-4, control: 1e-2 };
    /// Of activations, weights and KV in bf16, with sums in f32. Every product is rounded by up to 2⁻⁹, and ten of those may
    /// add up; a mistake need not do much more, so that a control is asked for half as much again.
    pub const BF16: Self = Self { tolerance: 2e-2, control: 3e-2 };
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

    /// Type of the KV it computes.
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }
    /// How far two ways to the same result may be apart on it.
    fn precision(&self) -> Precision {
        Precision::F32
    }
    /// Rows of a block where nobody else waits for it: more would not make the products faster.
    fn block_rows(&self) -> usize {
        BLOCK_ROWS
    }
    /// Whether it is of no more use to this process: after a fault, every call would fail.
    fn lost(&self) -> bool {
        false
    }
    /// Where KV for it is kept on the host.
    fn host(&self) -> HostPool {
        HostPool::default()
    }

    /// Makes a weight matrix `[outputs, inputs]` of parts that lie one above the other, each row-major.
    ///
    /// # Errors
    /// The device is out of memory.
    fn matrix(&self, parts: Vec<Values>, outputs: usize, inputs: usize) -> Result<Self::Matrix, Error>;
    /// Bytes that a weight matrix takes, in the device's memory.
    fn matrix_bytes(&self, matrix: &Self::Matrix) -> usize;
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
    ///
    /// # Errors
    /// The device is out of memory; a device fault.
    fn embed(&self, table: &Self::Matrix, ids: &[u32]) -> Result<Self::Rows, Error>;
    /// Root-mean-square norm of each row.
    ///
    /// # Errors
    /// The device is out of memory; a device fault.
    fn norm(&self, x: &Self::Rows, weight: &Self::Vector, eps: f32) -> Result<Self::Rows, Error>;
    /// `x · Wᵀ`.
    ///
    /// # Errors
    /// The device is out of memory; a device fault.
    fn project(&self, x: &Self::Rows, weight: &Self::Matrix) -> Result<Self::Rows, Error>;
    /// `out += x · Wᵀ`.
    ///
    /// # Errors
    /// The device is out of memory; a device fault.
    fn project_add(&self, out: &mut Self::Rows, x: &Self::Rows, weight: &Self::Matrix) -> Result<(), Error>;
    /// `x += bias` in every row.
    ///
    /// # Errors
    /// The device is out of memory; a device fault.
    fn add_bias(&self, x: &mut Self::Rows, bias: &Self::Vector) -> Result<(), Error>;
    /// `silu(gate) · up` of rows that hold both halves.
    ///
    /// # Errors
    /// The device is out of memory; a device fault.
    fn gate(&self, gate_up: &Self::Rows) -> Result<Self::Rows, Error>;
    /// The given rows of `x`.
    ///
    /// # Errors
    /// The device is out of memory; a device fault.
    fn take(&self, x: &Self::Rows, rows: &[usize]) -> Result<Self::Rows, Error>;
    /// Appends `x · Wᵀ` to `out`, on the host, row-major and in f32.
    ///
    /// # Errors
    /// The device is out of memory; a device fault.
    fn logits(&self, x: &Self::Rows, weight: &Self::Matrix, out: &mut Vec<f32>) -> Result<(), Error>;

    /// Root-mean-square norm of every query head and every key head of freshly projected rows, in place and
    /// before [`export`](Self::export); values stay as they are.
    ///
    /// # Errors
    /// The device is out of memory; a device fault.
    fn norm_heads(
        &self,
        qkv: &mut Self::Rows,
        geometry: &Geometry,
        query: &Self::Vector,
        key: &Self::Vector,
        eps: f32,
    ) -> Result<(), Error>;
    /// Position-free keys and values of freshly projected rows, before [`scatter`](Self::scatter).
    ///
    /// # Errors
    /// The device is out of memory; a device fault.
    fn export(&self, qkv: &Self::Rows, geometry: &Geometry) -> Result<LayerKv, Error>;
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
    /// As [`place`](Self::place) for one layer of several sections of a sequence.
    ///
    /// # Errors
    /// A device fault.
    fn place_sections(
        &self,
        pages: &mut Self::Pages,
        at: At<'_>,
        sections: &[(&LayerKv, usize)],
        rope: &RopeTable,
    ) -> Result<(), Error> {
        sections.iter().try_for_each(|(kv, start)| self.place(pages, at, kv, *start, rope))
    }
    /// As [`place`](Self::place) for all layers of several sections of a sequence. A device that places beside computing
    /// goes layer by layer, so that the first can be computed as soon as it is there.
    ///
    /// # Errors
    /// A device fault.
    fn place_all(
        &self,
        pages: &mut Self::Pages,
        table: &[u32],
        sections: &[(&ChunkKv, usize)],
        rope: &RopeTable,
    ) -> Result<(), Error> {
        sections.iter().try_for_each(|(kv, start)| self.place_layers(pages, table, kv, *start, rope))
    }
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
    ///
    /// # Errors
    /// The device is out of memory; a device fault.
    fn attend_rows(
        &self,
        pages: &Self::Pages,
        at: At<'_>,
        qkv: &Self::Rows,
        geometry: &Geometry,
        positions: &[u32],
    ) -> Result<Self::Rows, Error>;
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
    ///
    /// # Errors
    /// The device is out of memory; a device fault.
    fn attend_each(
        &self,
        pages: &Self::Pages,
        layer: usize,
        tables: &[&[u32]],
        qkv: &Self::Rows,
        geometry: &Geometry,
        positions: &[u32],
    ) -> Result<Self::Rows, Error>;
    /// Attention probabilities of rows `first..` over columns `0..columns`, reduced over heads, then (where the look
    /// says how) over rows: `[columns]`, else `[rows, columns]`.
    ///
    /// # Errors
    /// The device is out of memory; a device fault.
    fn probe(
        &self,
        pages: &Self::Pages,
        look: Look<'_>,
        qkv: &Self::Rows,
        geometry: &Geometry,
    ) -> Result<Vec<f32>, Error>;
    /// [`attend_rows`](Self::attend_rows) and [`probe`](Self::probe) of one pass: a device that can computes scores once
    /// for both.
    ///
    /// # Errors
    /// The device is out of memory; a device fault.
    fn attend_and_look(
        &self,
        pages: &Self::Pages,
        look: Look<'_>,
        qkv: &Self::Rows,
        geometry: &Geometry,
    ) -> Result<(Self::Rows, Vec<f32>), Error> {
        let attended = self.attend_rows(pages, look.at, qkv, geometry, look.positions)?;
        Ok((attended, self.probe(pages, look, qkv, geometry)?))
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

impl Look<'_> {
    /// The same as kernels have it, to whom sequence and positions come with the rows.
    pub(crate) fn rows_alone(&self) -> probe::Look {
        probe::Look { first: self.first, columns: self.columns, heads: self.heads, rows: self.rows }
    }
}
