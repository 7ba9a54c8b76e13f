//! A decoder's forward: any rows, at any positions, against a paged cache that already holds the others.

use crate::config::Config;
use crate::device::{At, Device, Geometry, Look};
use crate::error::Error;
use crate::kv::{ChunkKv, Export, LayerKv};
use crate::walk::Collect;
use cacheclip_kernels::probe::Reduce;
use cacheclip_kernels::rope::RopeTable;
use std::ops::Range;
use std::sync::Arc;

/// Weights of one layer.
pub(crate) struct Layer<D: Device> {
    pub(crate) attention_norm: D::Vector,
    /// Queries, keys and values stacked, `[(heads + 2·kv_heads)·head_dim, hidden]`.
    pub(crate) qkv: D::Matrix,
    /// Stacked as `qkv`, in families that have them.
    pub(crate) qkv_bias: Option<D::Vector>,
    /// In families that norm their heads.
    pub(crate) head_norms: Option<HeadNorms<D>>,
    pub(crate) output: D::Matrix,
    pub(crate) mlp_norm: D::Vector,
    /// Gate and up stacked, `[2·intermediate, hidden]`.
    pub(crate) gate_up: D::Matrix,
    pub(crate) down: D::Matrix,
}

/// Weights of the norms of every query head and of every key head, `[head_dim]`.
pub(crate) struct HeadNorms<D: Device> {
    pub(crate) query: D::Vector,
    pub(crate) key: D::Vector,
}

/// All weights of a model on its device.
pub(crate) struct Weights<D: Device> {
    pub(crate) embedding: Arc<D::Matrix>,
    pub(crate) layers: Vec<Layer<D>>,
    pub(crate) norm: D::Vector,
    /// The embedding table itself where the model ties them.
    pub(crate) head: Arc<D::Matrix>,
}

/// A causal language model on a device. Cheap to clone; clones share the weights.
pub struct Decoder<D: Device> {
    pub(crate) device: Arc<D>,
    pub(crate) config: Arc<Config>,
    pub(crate) weights: Arc<Weights<D>>,
    pub(crate) rope: Arc<RopeTable>,
}

impl<D: Device> std::fmt::Debug for Decoder<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decoder").field("config", &self.config).finish_non_exhaustive()
    }
}

impl<D: Device> Clone for Decoder<D> {
    fn clone(&self) -> Self {
        Self {
            device: Arc::clone(&self.device),
            config: Arc::clone(&self.config),
            weights: Arc::clone(&self.weights),
            rope: Arc::clone(&self.rope),
        }
    }
}

/// Which rows' logits a pass returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Logits {
    /// None: the pass only fills the cache.
    None,
    /// The last row's, `[vocab]`.
    Last,
    /// Every row's, `[rows, vocab]`.
    All,
}

/// Attention of some rows of a pass, for scoring: reduced over heads, then rows, then layers.
#[derive(Clone, Debug)]
pub struct Probe {
    /// First position whose row counts; rows before it are computed but not looked at.
    pub from_position: u32,
    /// Columns reported, from 0.
    pub columns: usize,
    /// Layers looked at.
    pub layers: Range<usize>,
    /// Reduction over heads.
    pub heads: Reduce,
    /// Reduction over rows, if any.
    pub rows: Option<Reduce>,
    across: Reduce,
    sums: Vec<f32>,
    weight: f32,
}

impl Probe {
    /// Looks at `layers`, from the rows at or after `from_position`, over columns `0..columns`.
    pub fn new(
        from_position: u32,
        columns: usize,
        layers: Range<usize>,
        heads: Reduce,
        rows: Reduce,
    ) -> Self {
        Self {
            from_position,
            columns,
            layers,
            heads,
            rows: Some(rows),
            across: Reduce::Mean,
            sums: vec![0.0; columns],
            weight: 0.0,
        }
    }

    /// Takes the largest over layers instead of the mean.
    pub fn largest_over_layers(self) -> Self {
        Self { across: Reduce::Max, ..self }
    }

    /// Keeps the rows apart: scores are `[rows, columns]`. For passes of no
    /// more than a block of rows ([`walk`](crate::walk)).
    pub fn row_by_row(self) -> Self {
        Self { rows: None, ..self }
    }

    /// Score per column, `[columns]` (or as [`row_by_row`](Self::row_by_row) says): mean (or largest) over the layers (and over row blocks) looked at.
    pub fn scores(&self) -> Vec<f32> {
        match self.across {
            Reduce::Mean => self.sums.iter().map(|sum| sum / self.weight.max(f32::MIN_POSITIVE)).collect(),
            Reduce::Max => self.sums.clone(),
        }
    }

    /// What is looked at in a layer of a pass, if anything.
    fn look<'a>(&self, at: At<'a>, positions: &'a [u32]) -> Option<Look<'a>> {
        let first = positions.partition_point(|&p| p < self.from_position);
        let looks = self.layers.contains(&at.layer) && first < positions.len();
        let (columns, heads, rows) = (self.columns, self.heads, self.rows);
        looks.then_some(Look { at, first, positions, columns, heads, rows })
    }

    fn add(&mut self, values: &[f32], rows: usize) {
        // Of rows that are kept apart there are as many as the pass has.
        self.sums.resize(values.len(), 0.0);
        match self.across {
            Reduce::Mean => {
                self.sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += value * rows as f32)
            }
            Reduce::Max => self.sums.iter_mut().zip(values).for_each(|(sum, &value)| *sum = sum.max(value)),
        }
        self.weight += rows as f32;
    }
}

/// One trip through the layers.
#[derive(Debug)]
pub struct Pass<'a> {
    /// Token of each row.
    pub ids: &'a [u32],
    /// Position of each row, ascending; unique.
    pub positions: &'a [u32],
    /// The sequence's pages; they must cover the last position.
    pub table: &'a [u32],
    /// What to return.
    pub logits: Logits,
    /// Collects the rows' position-free KV.
    pub export: Option<&'a mut Export>,
    /// Collects attention.
    pub probe: Option<&'a mut Probe>,
}

impl<'a> Pass<'a> {
    /// A pass that returns the last row's logits and collects nothing.
    pub fn new(ids: &'a [u32], positions: &'a [u32], table: &'a [u32]) -> Self {
        Self { ids, positions, table, logits: Logits::Last, export: None, probe: None }
    }
}

impl<D: Device> Decoder<D> {
    pub(crate) fn assemble(device: Arc<D>, config: Config, weights: Weights<D>) -> Self {
        let rope =
            RopeTable::new(config.head_dim, config.max_positions, config.rope_theta, config.rope_scaling);
        Self { device, config: Arc::new(config), weights: Arc::new(weights), rope: Arc::new(rope) }
    }

    /// The same weights under other rotary angles: a negative control for certificates.
    pub(crate) fn with_theta(&self, theta: f64) -> Self {
        let (dim, positions) = (self.config.head_dim, self.config.max_positions);
        let rope = RopeTable::new(dim, positions, theta, self.config.rope_scaling);
        Self { rope: Arc::new(rope), ..self.clone() }
    }

    /// The device.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// Bytes of its weight matrices on the device, a table that is used twice counted once.
    pub fn weight_bytes(&self) -> usize {
        let Weights { embedding, layers, head, .. } = &*self.weights;
        let bytes = |matrix: &D::Matrix| self.device.matrix_bytes(matrix);
        let layer = |it: &Layer<D>| {
            [&it.qkv, &it.output, &it.gate_up, &it.down].into_iter().map(bytes).sum::<usize>()
        };
        let head = if Arc::ptr_eq(embedding, head) { 0 } else { bytes(head) };
        bytes(embedding) + head + layers.iter().map(layer).sum::<usize>()
    }

    /// The model's shape.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Heads and layers.
    pub fn geometry(&self) -> Geometry {
        let c = &self.config;
        Geometry { layers: c.layers, heads: c.heads, kv_heads: c.kv_heads, head_dim: c.head_dim }
    }

    /// Reserves `count` pages per layer for this model's sequences.
    ///
    /// # Errors
    /// The device is out of memory.
    pub fn pages(&self, count: usize) -> Result<D::Pages, Error> {
        self.device.pages(&self.geometry(), count)
    }

    /// Places a section's KV at positions `start..`, all layers.
    ///
    /// # Errors
    /// A device fault.
    pub fn place(
        &self,
        pages: &mut D::Pages,
        table: &[u32],
        kv: &ChunkKv,
        start: usize,
    ) -> Result<(), Error> {
        self.device.place_layers(pages, table, kv, start, &self.rope)
    }

    /// Places sections at their positions, all layers.
    ///
    /// # Errors
    /// A device fault.
    pub fn place_all(
        &self,
        pages: &mut D::Pages,
        table: &[u32],
        sections: &[(&ChunkKv, usize)],
    ) -> Result<(), Error> {
        self.device.place_all(pages, table, sections, &self.rope)
    }

    /// Places one layer of a section, for callers that place layer by layer.
    ///
    /// # Errors
    /// A device fault.
    pub fn place_layer(
        &self,
        pages: &mut D::Pages,
        at: At<'_>,
        kv: &LayerKv,
        start: usize,
    ) -> Result<(), Error> {
        self.device.place(pages, at, kv, start, &self.rope)
    }

    /// As [`place_layer`](Self::place_layer), of several sections.
    ///
    /// # Errors
    /// A device fault.
    pub fn place_sections(
        &self,
        pages: &mut D::Pages,
        at: At<'_>,
        sections: &[(&LayerKv, usize)],
    ) -> Result<(), Error> {
        self.device.place_sections(pages, at, sections, &self.rope)
    }

    /// Computes the rows of `pass`: at each layer their K/V are scattered first, then they attend to the
    /// whole cache at or before their own positions. Returns logits `[rows asked for, vocab]`, empty for
    /// [`Logits::None`].
    ///
    /// # Errors
    /// A device fault.
    pub fn forward(&self, pages: &mut D::Pages, pass: Pass<'_>) -> Result<Vec<f32>, Error> {
        let Pass { ids, positions, table, logits, mut export, mut probe } = pass;
        let mut walk = self.walk(ids, positions.to_vec(), logits, self.device.block_rows())?;
        while !walk.done() {
            let collect = Collect { export: export.as_deref_mut(), probe: probe.as_deref_mut() };
            self.step(pages, &mut walk, table, collect)?;
        }
        self.logits(walk)
    }

    /// Attends all rows of `qkv` at a layer, and adds their attention to `probe` if it looks there.
    pub(crate) fn attend(
        &self,
        pages: &D::Pages,
        at: At<'_>,
        qkv: &D::Rows,
        positions: &[u32],
        probe: Option<&mut Probe>,
    ) -> Result<D::Rows, Error> {
        let (device, geometry) = (&*self.device, self.geometry());
        match probe.and_then(|probe| Some((probe.look(at, positions)?, probe))) {
            None => device.attend_rows(pages, at, qkv, &geometry, positions),
            Some((look, probe)) => {
                let (attended, values) = device.attend_and_look(pages, look, qkv, &geometry)?;
                probe.add(&values, positions.len() - look.first);
                Ok(attended)
            }
        }
    }

    /// Adds the attention of `qkv` at a layer to `probe`, if it looks there.
    pub(crate) fn look(
        &self,
        pages: &D::Pages,
        at: At<'_>,
        qkv: &D::Rows,
        positions: &[u32],
        probe: &mut Probe,
    ) -> Result<(), Error> {
        if let Some(look) = probe.look(at, positions) {
            let values = self.device.probe(pages, look, qkv, &self.geometry())?;
            probe.add(&values, positions.len() - look.first);
        }
        Ok(())
    }
}
