//! The CUDA device: weights, activations and pages in bf16, sums in f32, kernels and their launches from
//! `cacheclip_kernels::cuda`.
//!
//! All it does is to say in operations of the seam what its executor does, so it is the same on the driver's machine (the
//! feature `cuda`, `Cuda::open`) and on the emulated one, on which tests run it without a GPU. **It has not run on a GPU
//! yet.**
//!
//! The driver and cuBLAS are opened when a device is. Nothing of CUDA is linked: building needs no toolkit, and a machine
//! without a driver gets an error and not a loader's message.

pub mod footprint;

pub use cacheclip_kernels::cuda::executor::Noted;
pub use footprint::{Footprint, TooLarge};

use crate::config::Config;
use crate::device::{At, Device, Geometry, Look, Precision};
use crate::error::Error;
use crate::kv::{ChunkKv, Elements, HostPool, LayerKv};
use crate::weights::Values;
use cacheclip_chunk::Dtype;
use cacheclip_kernels::cuda::executor::{
    self, Angles, Executor, Floats, Pages, Rows, Section, Sequences, Weights,
};
use cacheclip_kernels::cuda::launch::Stored;
use cacheclip_kernels::cuda::machine::Machine;
use cacheclip_kernels::cuda::{DeviceError, Heads, Unsupported};
use cacheclip_kernels::rope::{RopeTable, Rotation};
use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

/// Tables of angles that are kept: a model's own, and that of a negative control.
const TABLES: usize = 2;

/// How a device is opened.
#[derive(Clone, Debug)]
pub struct Options {
    /// Which device, from 0.
    pub ordinal: usize,
    /// Most bytes of device memory; `None` for nine tenths of what is free.
    pub memory_bytes: Option<u64>,
    /// Pages of KV for running sequences, all pools together.
    pub pages: usize,
    /// Most rows of a block that goes through a layer.
    pub block_rows: usize,
    /// Most bytes of page-locked host memory; what does not fit lies in ordinary memory and is copied slower.
    pub pinned_bytes: u64,
    /// Copies and placement beside computation; off: in one stream with it.
    pub overlap: bool,
    /// Folder with NVRTC's and cuBLAS's libraries; none where the loader finds them.
    pub libraries: Option<PathBuf>,
    /// Folder in which compiled kernels are kept.
    pub kept: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            ordinal: 0,
            memory_bytes: None,
            pages: 1024,
            block_rows: BLOCK_ROWS,
            pinned_bytes: 1 << 30,
            overlap: true,
            libraries: None,
            kept: None,
        }
    }
}

/// Rows of a block by default: weights are read once for them, and activations stay small beside the weights.
pub const BLOCK_ROWS: usize = 2048;

/// A CUDA device. One thread uses it.
#[derive(Debug)]
pub struct Cuda {
    executor: Executor,
    block_rows: usize,
    angles: Mutex<VecDeque<(Rotation, Arc<Angles>)>>,
}

/// Heads that kernels are compiled for.
fn heads(config: &Config) -> Heads {
    let [queries, kv, dim] = [config.heads, config.kv_heads, config.head_dim].map(|n| n as u32);
    Heads { queries, kv, dim }
}

impl Cuda {
    /// Opens a device for a model, after checking that it fits.
    ///
    /// # Errors
    /// No driver, a device or a model that kernels are not for, no cuBLAS, too little memory: one line each.
    #[cfg(feature = "cuda")]
    pub fn open(config: &Config, options: &Options) -> Result<Self, Error> {
        use cacheclip_kernels::cuda::device::{Gpu, Toolkit};
        check(config)?;
        let (libraries, kept) = (options.libraries.clone(), options.kept.clone());
        let gpu = Gpu::open(options.ordinal, heads(config), &Toolkit { libraries, kept })?;
        Self::on(Arc::new(gpu), config, options)
    }

    /// The device that a machine is, for a model that it was opened for, after checking that it fits.
    ///
    /// # Errors
    /// A model that kernels are not for, too little memory.
    pub fn on(machine: Arc<dyn Machine>, config: &Config, options: &Options) -> Result<Self, Error> {
        check(config)?;
        assert_eq!(machine.heads(), heads(config), "a machine that was opened for another model");
        let free = machine.free_memory()?;
        // The rest is for the driver, and for what the estimate leaves out.
        let limit = options.memory_bytes.unwrap_or(free / 10 * 9).min(free);
        let needed = Footprint::of(config, options.pages, options.block_rows).fits(limit)?;
        let host = HostPool::pinned(Arc::clone(&machine), options.pinned_bytes);
        let (left, overlap) = (needed.step, options.overlap);
        Ok(Self {
            executor: Executor::new(machine, executor::Options { memory: limit, left, host, overlap }),
            block_rows: options.block_rows,
            angles: Mutex::default(),
        })
    }

    /// Waits until everything asked for is done.
    ///
    /// # Errors
    /// A device fault of anything before.
    pub fn finish(&self) -> Result<(), Error> {
        Ok(self.executor.finish()?)
    }

    /// What `work` gives, and the milliseconds by the device's clock that its compute stream took for it.
    ///
    /// # Errors
    /// Of `work`; a device fault.
    pub fn timed<T>(&self, work: impl FnOnce() -> Result<T, Error>) -> Result<(T, f32), Error> {
        self.executor.timed(work)
    }

    /// Bytes per second of copying on the device, read and written counted, over `bytes` bytes.
    ///
    /// # Errors
    /// Out of memory; a device fault.
    pub fn copy_bandwidth(&self, bytes: usize) -> Result<f64, Error> {
        Ok(self.executor.copy_bandwidth(bytes)?)
    }

    /// The device's name and kind.
    pub fn description(&self) -> String {
        self.executor.machine().description()
    }

    /// Bytes of device memory in use, and how many may be.
    pub fn memory(&self) -> (u64, u64) {
        (self.executor.memory().used(), self.executor.memory().limit())
    }

    /// From now on notes when layers are placed and attended, by the device's clock.
    ///
    /// # Errors
    /// A device fault.
    pub fn trace(&self) -> Result<(), Error> {
        Ok(self.executor.note()?)
    }

    /// What was noted since [`trace`](Self::trace), and ends noting.
    ///
    /// # Errors
    /// A device fault.
    pub fn timeline(&self) -> Result<Vec<Noted>, Error> {
        Ok(self.executor.noted()?)
    }

    /// Angles of a table, on the device.
    fn angles(&self, rope: &RopeTable) -> Result<Arc<Angles>, Error> {
        let mut tables = self.angles.lock().unwrap_or_else(PoisonError::into_inner);
        let known = tables.iter().position(|(of, _)| *of == rope.made_of());
        let entry = match known.and_then(|at| tables.remove(at)) {
            Some(entry) => entry,
            None => {
                if tables.len() >= TABLES {
                    // Placements may still read the one that goes.
                    self.executor.finish()?;
                    tables.truncate(TABLES - 1);
                }
                (rope.made_of(), Arc::new(self.executor.angles(rope)?))
            }
        };
        let angles = Arc::clone(&entry.1);
        tables.push_front(entry);
        Ok(angles)
    }

    /// A layer of a section, as the executor takes it.
    fn section(&self, kv: &LayerKv, start: usize) -> Section {
        let (bytes, stored) = match kv.elements() {
            Elements::Bf16(bytes) => (Arc::clone(bytes), Stored::Bf16),
            Elements::F32(values) => {
                let bytes = self.executor.host().words(values.iter().map(|value| value.to_le_bytes()));
                (Arc::new(bytes), Stored::F32)
            }
        };
        Section { bytes, stored, tokens: kv.tokens, start }
    }
}

/// Refuses what kernels are not for, before a device is opened.
fn check(config: &Config) -> Result<(), Error> {
    heads(config).checked().map_err(DeviceError::from)?;
    for width in [config.hidden, config.intermediate] {
        if !width.is_multiple_of(8) {
            return Err(DeviceError::from(Unsupported::Width(width as u32)).into());
        }
    }
    Ok(())
}

fn on<'a>(pages: &'a Pages, layer: usize) -> executor::At<'a> {
    executor::At { pages, layer }
}

impl Device for Cuda {
    type Matrix = Weights;
    type Vector = Floats;
    type Rows = Rows;
    type Pages = Pages;

    fn dtype(&self) -> Dtype {
        Dtype::Bf16
    }

    fn precision(&self) -> Precision {
        Precision::BF16
    }

    fn block_rows(&self) -> usize {
        self.block_rows
    }

    fn lost(&self) -> bool {
        !self.executor.machine().sound()
    }

    fn host(&self) -> HostPool {
        self.executor.host().clone()
    }

    fn matrix(&self, parts: Vec<Values>, outputs: usize, inputs: usize) -> Result<Weights, Error> {
        let mut weights = self.executor.weights(outputs, inputs)?;
        let mut row = 0;
        for part in parts {
            let rows = part.len() / inputs.max(1);
            match part {
                Values::Given(values) => self.executor.fill(&mut weights, row, &values)?,
                Values::Random { base, bound, .. } => {
                    self.executor.fill_random(&mut weights, (row, rows), base, bound)?;
                }
            }
            row += rows;
        }
        Ok(weights)
    }

    fn matrix_bytes(&self, matrix: &Weights) -> usize {
        matrix.bytes()
    }

    fn vector(&self, data: Vec<f32>) -> Result<Floats, Error> {
        Ok(self.executor.floats(&data)?)
    }

    fn pages(&self, geometry: &Geometry, count: usize) -> Result<Pages, Error> {
        Ok(self.executor.pages(geometry.layers, count)?)
    }

    fn embed(&self, table: &Weights, ids: &[u32]) -> Result<Rows, Error> {
        Ok(self.executor.embed(table, ids)?)
    }

    fn norm(&self, x: &Rows, weight: &Floats, eps: f32) -> Result<Rows, Error> {
        Ok(self.executor.norm(x, weight, eps)?)
    }

    fn project(&self, x: &Rows, weight: &Weights) -> Result<Rows, Error> {
        Ok(self.executor.project(x, weight)?)
    }

    fn project_add(&self, out: &mut Rows, x: &Rows, weight: &Weights) -> Result<(), Error> {
        Ok(self.executor.project_add(out, x, weight)?)
    }

    fn add_bias(&self, x: &mut Rows, bias: &Floats) -> Result<(), Error> {
        Ok(self.executor.add_bias(x, bias)?)
    }

    fn gate(&self, gate_up: &Rows) -> Result<Rows, Error> {
        Ok(self.executor.gate(gate_up)?)
    }

    fn take(&self, x: &Rows, rows: &[usize]) -> Result<Rows, Error> {
        let rows: Vec<u32> = rows.iter().map(|&row| row as u32).collect();
        Ok(self.executor.take(x, &rows)?)
    }

    fn logits(&self, x: &Rows, weight: &Weights, out: &mut Vec<f32>) -> Result<(), Error> {
        Ok(self.executor.logits(x, weight, out)?)
    }

    fn norm_heads(
        &self,
        qkv: &mut Rows,
        _geometry: &Geometry,
        query: &Floats,
        key: &Floats,
        eps: f32,
    ) -> Result<(), Error> {
        Ok(self.executor.norm_heads(qkv, query, key, eps)?)
    }

    fn export(&self, qkv: &Rows, _geometry: &Geometry) -> Result<LayerKv, Error> {
        Ok(LayerKv::bf16(self.executor.export(qkv)?, qkv.rows()))
    }

    fn place(
        &self,
        pages: &mut Pages,
        at: At<'_>,
        kv: &LayerKv,
        start: usize,
        rope: &RopeTable,
    ) -> Result<(), Error> {
        self.place_sections(pages, at, &[(kv, start)], rope)
    }

    fn place_sections(
        &self,
        pages: &mut Pages,
        at: At<'_>,
        sections: &[(&LayerKv, usize)],
        rope: &RopeTable,
    ) -> Result<(), Error> {
        let sections: Vec<Section> = sections
            .iter()
            .filter(|(kv, _)| kv.tokens > 0)
            .map(|(kv, start)| self.section(kv, *start))
            .collect();
        let angles = self.angles(rope)?;
        Ok(self.executor.place(on(pages, at.layer), at.table, &sections, &angles)?)
    }

    fn place_layers(
        &self,
        pages: &mut Pages,
        table: &[u32],
        kv: &ChunkKv,
        start: usize,
        rope: &RopeTable,
    ) -> Result<(), Error> {
        self.place_all(pages, table, &[(kv, start)], rope)
    }

    fn place_all(
        &self,
        pages: &mut Pages,
        table: &[u32],
        sections: &[(&ChunkKv, usize)],
        rope: &RopeTable,
    ) -> Result<(), Error> {
        let layers = sections.iter().map(|(kv, _)| kv.layers().count()).max().unwrap_or_default();
        for layer in 0..layers {
            let of_layer: Vec<(&LayerKv, usize)> =
                sections.iter().filter_map(|(kv, start)| Some((kv.layer(layer)?, *start))).collect();
            self.place_sections(pages, At { layer, table }, &of_layer, rope)?;
        }
        Ok(())
    }

    fn scatter(
        &self,
        pages: &mut Pages,
        at: At<'_>,
        qkv: &mut Rows,
        _geometry: &Geometry,
        positions: &[u32],
        rope: &RopeTable,
    ) -> Result<(), Error> {
        let angles = self.angles(rope)?;
        let of = Sequences::One(at.table);
        Ok(self.executor.scatter(on(pages, at.layer), of, qkv, positions, &angles)?)
    }

    fn attend_rows(
        &self,
        pages: &Pages,
        at: At<'_>,
        qkv: &Rows,
        _geometry: &Geometry,
        positions: &[u32],
    ) -> Result<Rows, Error> {
        Ok(self.executor.attend(on(pages, at.layer), Sequences::One(at.table), qkv, positions)?)
    }

    fn scatter_each(
        &self,
        pages: &mut Pages,
        layer: usize,
        tables: &[&[u32]],
        qkv: &mut Rows,
        _geometry: &Geometry,
        positions: &[u32],
        rope: &RopeTable,
    ) -> Result<(), Error> {
        let angles = self.angles(rope)?;
        Ok(self.executor.scatter(on(pages, layer), Sequences::Each(tables), qkv, positions, &angles)?)
    }

    fn attend_each(
        &self,
        pages: &Pages,
        layer: usize,
        tables: &[&[u32]],
        qkv: &Rows,
        _geometry: &Geometry,
        positions: &[u32],
    ) -> Result<Rows, Error> {
        Ok(self.executor.attend(on(pages, layer), Sequences::Each(tables), qkv, positions)?)
    }

    fn probe(
        &self,
        pages: &Pages,
        look: Look<'_>,
        qkv: &Rows,
        _geometry: &Geometry,
    ) -> Result<Vec<f32>, Error> {
        let At { layer, table } = look.at;
        Ok(self.executor.probe(on(pages, layer), table, qkv, look.positions, look.rows_alone())?)
    }

    fn attend_and_look(
        &self,
        pages: &Pages,
        look: Look<'_>,
        qkv: &Rows,
        _geometry: &Geometry,
    ) -> Result<(Rows, Vec<f32>), Error> {
        let At { layer, table } = look.at;
        Ok(self.executor.attend_and_probe(on(pages, layer), table, qkv, look.positions, look.rows_alone())?)
    }
}
