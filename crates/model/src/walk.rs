//! A pass that may rest: layer by layer and, within a layer, block by block of rows.
//!
//! Layer-major, because KV that is on its way arrives by layers, and because the weights and keys of one layer are used
//! again while they are near. Blocks ascend: at every layer a block's rows see what the blocks before it have scattered
//! there, and nothing behind their own positions, so that the result is that of all rows at once. Between two blocks
//! the device is free for others, and what is kept is one `[rows, hidden]`.

use crate::decoder::{Decoder, Layer, Logits, Probe};
use crate::device::{At, Device};
use crate::error::Error;
use crate::kv::Export;
use std::ops::Range;

/// As [`Device::block_rows`], of the CPU.
pub const BLOCK_ROWS: usize = 512;

/// Rows on their way through the layers.
pub struct Walk<D: Device> {
    /// Activations of each block behind the last layer it went through, `[rows, hidden]`.
    blocks: Vec<D::Rows>,
    positions: Vec<u32>,
    wanted: Logits,
    /// Rows of a block; fewer in the last.
    block_rows: usize,
    layers: usize,
    layer: usize,
    block: usize,
}

impl<D: Device> std::fmt::Debug for Walk<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (rows, layer, block) = (self.positions.len(), self.layer, self.block);
        f.debug_struct("Walk")
            .field("rows", &rows)
            .field("layer", &layer)
            .field("block", &block)
            .finish_non_exhaustive()
    }
}

impl<D: Device> Walk<D> {
    /// The layer whose turn it is: its KV of all other rows must be in the pages.
    pub fn layer(&self) -> usize {
        self.layer
    }

    /// Whether the next step is the first of its layer.
    pub fn at_layer_start(&self) -> bool {
        self.block == 0
    }

    /// Whether all rows went through all layers.
    pub fn done(&self) -> bool {
        self.layer == self.layers
    }

    /// Rows that the next step computes.
    pub fn next_rows(&self) -> usize {
        self.rows(self.block).len()
    }

    fn rows(&self, block: usize) -> Range<usize> {
        block * self.block_rows..((block + 1) * self.block_rows).min(self.positions.len())
    }

    /// Whether anything but the block's K/V comes of its last layer: `None` for nothing, else the rows.
    fn needed(&self, block: usize) -> Option<Range<usize>> {
        let rows = self.rows(block).len();
        match self.wanted {
            Logits::None => None,
            Logits::All => Some(0..rows),
            Logits::Last => (block + 1 == self.blocks.len()).then(|| rows - 1..rows),
        }
    }
}

/// What a pass leaves besides logits.
#[derive(Debug, Default)]
pub struct Collect<'a> {
    /// Collects the rows' position-free KV.
    pub export: Option<&'a mut Export>,
    /// Collects attention.
    pub probe: Option<&'a mut Probe>,
}

/// One row of each of several sequences: a decoding step.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// Token of each row.
    pub ids: &'a [u32],
    /// Its position.
    pub positions: &'a [u32],
    /// Its sequence's pages.
    pub tables: &'a [&'a [u32]],
}

impl<D: Device> Decoder<D> {
    /// Sets out with `ids` at `positions` (ascending, unique), in blocks of `block_rows`: that bounds the activations
    /// in use at a time, and how long a step takes.
    ///
    /// # Errors
    /// The device is out of memory.
    pub fn walk(
        &self,
        ids: &[u32],
        positions: Vec<u32>,
        wanted: Logits,
        block_rows: usize,
    ) -> Result<Walk<D>, Error> {
        debug_assert_eq!(ids.len(), positions.len());
        let embed = |ids| self.device.embed(&self.weights.embedding, ids);
        let blocks = ids.chunks(block_rows).map(embed).collect::<Result<_, Error>>()?;
        let layers = if ids.is_empty() { 0 } else { self.weights.layers.len() };
        // Without rows there is nothing to walk.
        Ok(Walk { blocks, positions, wanted, block_rows, layers, layer: 0, block: 0 })
    }

    /// Takes one block of rows through one layer.
    ///
    /// # Errors
    /// A device fault.
    pub fn step(
        &self,
        pages: &mut D::Pages,
        walk: &mut Walk<D>,
        table: &[u32],
        collect: Collect<'_>,
    ) -> Result<(), Error> {
        self.device.enter(|| self.through_layer(pages, walk, table, collect))
    }

    fn through_layer(
        &self,
        pages: &mut D::Pages,
        walk: &mut Walk<D>,
        table: &[u32],
        collect: Collect<'_>,
    ) -> Result<(), Error> {
        let (device, geometry) = (&*self.device, self.geometry());
        let (block, last) = (walk.block, walk.layer + 1 == walk.layers);
        let (rows, needed) = (walk.rows(block), walk.needed(block));
        let layer = &self.weights.layers[walk.layer];
        let at = At { layer: walk.layer, table };
        let positions = &walk.positions[rows];
        let x = &mut walk.blocks[block];
        let mut qkv = self.heads(x, layer)?;
        // What is exported is position-free: all that happens to a key but its rotation.
        if let Some(export) = collect.export {
            export.push(walk.layer, device.export(&qkv, &geometry)?, geometry.head_dim);
        }
        device.scatter(pages, at, &mut qkv, &geometry, positions, &self.rope)?;
        if last && walk.wanted != Logits::All {
            // Behind the last layer few rows are asked for, or none; what is looked at is looked at by itself.
            if let Some(probe) = collect.probe {
                self.look(pages, at, &qkv, positions, probe)?;
            }
            if let Some(needed) = needed {
                let at_rows: Vec<usize> = needed.clone().collect();
                let qkv = device.take(&qkv, &at_rows)?;
                *x = device.take(x, &at_rows)?;
                let attended = device.attend_rows(pages, at, &qkv, &geometry, &positions[needed])?;
                self.feed(x, &attended, layer)?;
            }
        } else {
            let attended = self.attend(pages, at, &qkv, positions, collect.probe)?;
            self.feed(x, &attended, layer)?;
        }
        walk.block += 1;
        if walk.block == walk.blocks.len() {
            (walk.block, walk.layer) = (0, walk.layer + 1);
        }
        Ok(())
    }

    /// Logits `[rows asked for, vocab]` of a walk that is done.
    ///
    /// # Errors
    /// The device is out of memory; a device fault.
    pub fn logits(&self, walk: Walk<D>) -> Result<Vec<f32>, Error> {
        debug_assert!(walk.done(), "a walk that is under way has no logits yet");
        let mut logits = Vec::new();
        for (block, x) in walk.blocks.iter().enumerate() {
            if walk.needed(block).is_some() {
                self.head(x, &mut logits)?;
            }
        }
        Ok(logits)
    }

    /// Computes one row of each sequence of `batch` and writes their logits `[sequences, vocab]`. In steady state
    /// nothing is allocated: activations and `logits` are used again.
    ///
    /// # Errors
    /// A device fault.
    pub fn decode(&self, pages: &mut D::Pages, batch: Batch<'_>, logits: &mut Vec<f32>) -> Result<(), Error> {
        self.device.enter(|| self.decode_batch(pages, batch, logits))
    }

    fn decode_batch(
        &self,
        pages: &mut D::Pages,
        batch: Batch<'_>,
        logits: &mut Vec<f32>,
    ) -> Result<(), Error> {
        let Batch { ids, positions, tables } = batch;
        debug_assert!(ids.len() == positions.len() && ids.len() == tables.len());
        let (device, geometry) = (&*self.device, self.geometry());
        let mut x = device.embed(&self.weights.embedding, ids)?;
        for (index, layer) in self.weights.layers.iter().enumerate() {
            let mut qkv = self.heads(&x, layer)?;
            device.scatter_each(pages, index, tables, &mut qkv, &geometry, positions, &self.rope)?;
            let attended = device.attend_each(pages, index, tables, &qkv, &geometry, positions)?;
            self.feed(&mut x, &attended, layer)?;
        }
        logits.clear();
        self.head(&x, logits)
    }

    /// Queries, keys and values of rows, not yet rotated.
    fn heads(&self, x: &D::Rows, layer: &Layer<D>) -> Result<D::Rows, Error> {
        let (device, eps) = (&*self.device, self.config.norm_eps);
        let mut qkv = device.project(&device.norm(x, &layer.attention_norm, eps)?, &layer.qkv)?;
        if let Some(bias) = &layer.qkv_bias {
            device.add_bias(&mut qkv, bias)?;
        }
        if let Some(norms) = &layer.head_norms {
            device.norm_heads(&mut qkv, &self.geometry(), &norms.query, &norms.key, eps)?;
        }
        Ok(qkv)
    }

    /// What a layer does behind its attention.
    fn feed(&self, x: &mut D::Rows, attended: &D::Rows, layer: &Layer<D>) -> Result<(), Error> {
        let device = &*self.device;
        device.project_add(x, attended, &layer.output)?;
        let normed = device.norm(x, &layer.mlp_norm, self.config.norm_eps)?;
        let gated = device.gate(&device.project(&normed, &layer.gate_up)?)?;
        device.project_add(x, &gated, &layer.down)
    }

    /// Appends the logits of every row of `x`.
    fn head(&self, x: &D::Rows, logits: &mut Vec<f32>) -> Result<(), Error> {
        let normed = self.device.norm(x, &self.weights.norm, self.config.norm_eps)?;
        self.device.logits(&normed, &self.weights.head, logits)
    }
}
