//! What measurements run on: a CUDA device, or in a rehearsal the CPU.

use cacheclip_model::config::Config;
use cacheclip_model::cuda::{Cuda, Noted, Options};
use cacheclip_model::pages::pages_for;
use cacheclip_model::{Cpu, Device, Error};
use serde::{Deserialize, Serialize};

/// Pages that a device has beside those of a model's sequences.
const SPARE: usize = 64;
/// Page-locked bytes that every step needs, whatever KV there is: lists that go to the device, logits that come from it.
const STEP_BYTES: u64 = 256 << 20;

/// A piece of work on a device's clock.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Piece {
    /// `place` (copies included), `scatter` or `attend`.
    pub what: String,
    /// Layer.
    pub layer: usize,
    /// Milliseconds since noting began.
    pub start: f32,
    /// As `start`.
    pub end: f32,
}

/// A device that can be waited for, and asked what it did when.
pub trait Timed: Device {
    /// Returns when everything asked for is done.
    ///
    /// # Errors
    /// A device fault.
    fn finish(&self) -> Result<(), Error> {
        Ok(())
    }

    /// Bytes per second that a copy of so many bytes reads and writes; none on a device that is the host.
    ///
    /// # Errors
    /// Out of memory; a device fault.
    fn copying(&self, _bytes: usize) -> Result<Option<f64>, Error> {
        Ok(None)
    }

    /// Begins to note.
    ///
    /// # Errors
    /// A device fault.
    fn trace(&self) -> Result<(), Error> {
        Ok(())
    }

    /// What was noted; nothing, on a device without a clock of its own.
    ///
    /// # Errors
    /// A device fault.
    fn timeline(&self) -> Result<Vec<Piece>, Error> {
        Ok(Vec::new())
    }
}

impl Timed for Cpu {}

/// What a device is opened for.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// Pages of KV.
    pub pages: usize,
    /// Rows of a block.
    pub block_rows: usize,
    /// Copies beside computation.
    pub overlap: bool,
    /// Bytes of KV that lie in the host's memory.
    pub host_bytes: u64,
}

impl Room {
    /// Room for sequences of so many tokens each, of which the KV of `chunks` tokens lies in the host's memory.
    pub fn of(shape: &Config, sequences: &[usize], chunks: usize, block_rows: usize) -> Self {
        let elements = 2 * shape.layers * shape.kv_heads * shape.head_dim * chunks;
        Self {
            pages: sequences.iter().map(|&tokens| pages_for(tokens)).sum(),
            block_rows,
            overlap: true,
            // Four bytes each, however few a device keeps them in: a limit, not a reservation.
            host_bytes: STEP_BYTES + (elements * size_of::<f32>()) as u64,
        }
    }
}

/// What opens devices.
pub trait Bed {
    /// The device.
    type Device: Timed;

    /// Opens the device for a model.
    ///
    /// # Errors
    /// No device, or no room for the model on it.
    fn open(&self, config: &Config, room: Room) -> anyhow::Result<Self::Device>;
}

/// The CPU.
#[derive(Clone, Copy, Debug)]
pub struct Rehearsal;

impl Bed for Rehearsal {
    type Device = Cpu;

    fn open(&self, _config: &Config, _room: Room) -> anyhow::Result<Cpu> {
        Ok(Cpu)
    }
}

impl Timed for Cuda {
    fn finish(&self) -> Result<(), Error> {
        Self::finish(self)
    }

    fn copying(&self, bytes: usize) -> Result<Option<f64>, Error> {
        self.copy_bandwidth(bytes).map(Some)
    }

    fn trace(&self) -> Result<(), Error> {
        Self::trace(self)
    }

    fn timeline(&self) -> Result<Vec<Piece>, Error> {
        let piece =
            |it: Noted| Piece { what: it.what.to_owned(), layer: it.layer, start: it.start, end: it.end };
        Ok(Self::timeline(self)?.into_iter().map(piece).collect())
    }
}

/// How a CUDA device is opened for this room.
pub fn options(room: Room) -> Options {
    Options {
        // A certificate has pages of its own.
        pages: room.pages + SPARE,
        block_rows: room.block_rows,
        pinned_bytes: room.host_bytes,
        overlap: room.overlap,
        ..Options::default()
    }
}

/// The first CUDA device.
#[cfg(feature = "cuda")]
#[derive(Clone, Debug, Default)]
pub struct Gpu(pub cacheclip_kernels::cuda::device::Toolkit);

#[cfg(feature = "cuda")]
impl Gpu {
    /// A stand for the kernels of `heads`.
    ///
    /// # Errors
    /// No device, or none that kernels are for.
    pub fn stand(
        &self,
        heads: cacheclip_kernels::cuda::Heads,
    ) -> anyhow::Result<cacheclip_kernels::cuda::timing::Stand> {
        use cacheclip_kernels::cuda::{device, timing::Stand};
        Ok(Stand::new(std::sync::Arc::new(device::Gpu::open(0, heads, &self.0)?))?)
    }
}

#[cfg(feature = "cuda")]
impl Bed for Gpu {
    type Device = Cuda;

    fn open(&self, config: &Config, room: Room) -> anyhow::Result<Cuda> {
        let (libraries, kept) = (self.0.libraries.clone(), self.0.kept.clone());
        Ok(Cuda::open(config, &Options { libraries, kept, ..options(room) })?)
    }
}
