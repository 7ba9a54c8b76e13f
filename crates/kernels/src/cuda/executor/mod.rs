//! Operations of a decoder on a machine: safe, asynchronous, and without waiting but where something leaves the device.
//!
//! Operations check on the host what would be a stray read or write on the device: shapes, token ids, page numbers and
//! positions. All but placement goes to the compute stream, so that a buffer that was given back may be used for the next
//! result at once.

mod events;
mod paged;

pub use events::Noted;
pub use paged::{Angles, At, Pages, STAGED, Section, Sequences};

use super::Heads;
use super::error::DeviceError;
use super::launch::Launch;
use super::machine::{Machine, Product, Stream};
use super::memory::{Buffer, Memory};
use super::pinned::{HostBytes, HostPool};
use super::rows;
use events::{Events, InUse, Notes};
use half::bf16;
use half::slice::HalfFloatSliceExt as _;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Uploaded lists of numbers that are kept: those of one pass are used in every layer.
const LISTS: usize = 16;
/// Elements of weights that are converted and uploaded at a time.
const PIECE: usize = 4 << 20;
/// Rows up to which embeddings may use what is left for computing: a decoding step's, which nobody else must stop.
const FEW: usize = 64;

/// Runs operations on a machine. One thread at a time uses it.
#[derive(Debug)]
pub struct Executor {
    machine: Arc<dyn Machine>,
    heads: Heads,
    memory: Arc<Memory>,
    host: HostPool,
    events: Arc<Events>,
    /// Bytes that rows which wait between layers leave for computing.
    left: u64,
    overlap: bool,
    state: Mutex<State>,
}

/// How operations are run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Most bytes of device memory.
    pub memory: u64,
    /// Bytes of it that a step of any rows needs: embeddings of many rows, which stay through all layers, leave them.
    pub left: u64,
    /// Where bytes for the device are reserved on the host.
    pub host: HostPool,
    /// Copies and placement beside computation.
    pub overlap: bool,
}

#[derive(Debug, Default)]
struct State {
    /// What uploads read, by stream.
    in_use: [InUse; 2],
    /// Numbers that are on the device, the last used first.
    lists: VecDeque<(Stream, Vec<u32>, Arc<Buffer>)>,
    notes: Option<Notes>,
}

/// Activations, bf16 `[rows, width]`.
#[derive(Debug)]
pub struct Rows {
    buffer: Buffer,
    rows: u32,
    width: u32,
}

impl Rows {
    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows as usize
    }
}

/// A weight matrix, bf16 `[outputs, inputs]`.
#[derive(Debug)]
pub struct Weights {
    buffer: Buffer,
    outputs: u32,
    inputs: u32,
}

impl Weights {
    /// Bytes on the device.
    pub fn bytes(&self) -> usize {
        self.buffer.bytes()
    }
}

/// A weight vector, f32 `[length]`.
#[derive(Debug)]
pub struct Floats {
    buffer: Buffer,
    length: u32,
}

fn small(value: usize) -> u32 {
    u32::try_from(value).unwrap_or_else(|_| panic!("{value}: more than a kernel counts to"))
}

impl Executor {
    /// Runs on `machine`.
    pub fn new(machine: Arc<dyn Machine>, options: Options) -> Self {
        Self {
            heads: machine.heads(),
            memory: Memory::new(Arc::clone(&machine), options.memory),
            host: options.host,
            events: Events::new(Arc::clone(&machine)),
            left: options.left,
            overlap: options.overlap,
            state: Mutex::default(),
            machine,
        }
    }

    /// The machine.
    pub fn machine(&self) -> &Arc<dyn Machine> {
        &self.machine
    }

    /// Its memory.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Where bytes for the device are reserved.
    pub fn host(&self) -> &HostPool {
        &self.host
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn buffer(&self, bytes: usize) -> Result<Buffer, DeviceError> {
        self.memory.buffer(Stream::Compute, bytes)
    }

    fn rows(&self, rows: u32, width: u32) -> Result<Rows, DeviceError> {
        assert!(width.is_multiple_of(rows::CHUNK), "rows of {width} elements: kernels take multiples of 8");
        let buffer = self.buffer(rows as usize * width as usize * 2)?;
        Ok(Rows { buffer, rows, width })
    }

    /// Launches in the compute stream.
    ///
    /// # Safety
    /// As [`Machine::launch`].
    unsafe fn launch(&self, launch: &Launch) -> Result<(), DeviceError> {
        // SAFETY: of the caller.
        unsafe { self.machine.launch(Stream::Compute, launch) }
    }

    /// Numbers on the device; the same ones are uploaded once as long as they are remembered.
    fn list(&self, stream: Stream, numbers: &[u32]) -> Result<Arc<Buffer>, DeviceError> {
        let mut state = self.state();
        let known = state.lists.iter().position(|(of, known, _)| *of == stream && known == numbers);
        let entry = match known.and_then(|at| state.lists.remove(at)) {
            Some(entry) => entry,
            None => {
                let buffer = self.memory.buffer(stream, size_of_val(numbers))?;
                let bytes = self.host.words(numbers.iter().map(|number| number.to_le_bytes()));
                // SAFETY: the buffer is as long, and both live until the stream is past: `bytes` is kept, and the buffer
                // goes back to this stream's.
                unsafe { self.machine.upload(stream, buffer.address(), bytes.as_ptr(), bytes.len()) }?;
                state.in_use[stream as usize].keep(&self.events, stream, Box::new(bytes))?;
                (stream, numbers.to_vec(), Arc::new(buffer))
            }
        };
        let buffer = Arc::clone(&entry.2);
        state.lists.push_front(entry);
        state.lists.truncate(LISTS);
        Ok(buffer)
    }

    /// Uploads bytes to a place in a buffer of the compute stream, and waits.
    fn upload(&self, to: &Buffer, at: usize, bytes: &[u8]) -> Result<(), DeviceError> {
        assert!(at + bytes.len() <= to.bytes(), "an upload behind its buffer's end");
        // SAFETY: it fits, and both live until the stream is empty.
        unsafe {
            let to = to.address() + at as u64;
            self.machine.upload(Stream::Compute, to, bytes.as_ptr(), bytes.len())?;
        }
        self.machine.finish(Stream::Compute)
    }

    /// Downloads a buffer of the compute stream, and waits.
    fn download(&self, from: &Buffer) -> Result<HostBytes, DeviceError> {
        let mut bytes = self.host.bytes(from.bytes());
        // SAFETY: as long as the buffer, and both live until the stream is empty.
        unsafe {
            self.machine.download(Stream::Compute, bytes.as_mut_ptr(), from.address(), bytes.len())?;
        }
        self.machine.finish(Stream::Compute)?;
        Ok(bytes)
    }

    /// A weight matrix of any content, to be filled.
    ///
    /// # Errors
    /// Out of memory.
    pub fn weights(&self, outputs: usize, inputs: usize) -> Result<Weights, DeviceError> {
        let buffer = self.buffer(outputs * inputs * 2)?;
        Ok(Weights { buffer, outputs: small(outputs), inputs: small(inputs) })
    }

    /// Fills `weights` from row `row` on with `values`, rounded to bf16.
    ///
    /// # Errors
    /// A fault.
    pub fn fill(&self, weights: &mut Weights, row: usize, values: &[f32]) -> Result<(), DeviceError> {
        let first = row * weights.inputs as usize;
        let mut rounded = vec![bf16::ZERO; PIECE.min(values.len())];
        for (index, piece) in values.chunks(PIECE).enumerate() {
            let rounded = &mut rounded[..piece.len()];
            rounded.convert_from_f32_slice(piece);
            let bytes = self.host.words(rounded.iter().map(|value| value.to_le_bytes()));
            self.upload(&weights.buffer, 2 * (first + index * PIECE), &bytes)?;
        }
        Ok(())
    }

    /// Fills `rows` rows of `weights` from row `row` on with the pseudo-random sequence `base`, uniform within `bound`,
    /// made on the device.
    ///
    /// # Errors
    /// A fault.
    pub fn fill_random(
        &self,
        weights: &mut Weights,
        (row, rows): (usize, usize),
        base: u64,
        bound: f32,
    ) -> Result<(), DeviceError> {
        assert!(row + rows <= weights.outputs as usize, "rows behind a matrix's end");
        let (first, count) = (row * weights.inputs as usize, rows * weights.inputs as usize);
        let to = weights.buffer.address() + 2 * first as u64;
        // SAFETY: as checked, the matrix is as long.
        unsafe { self.launch(&rows::random_weights(to, count as u64, base, bound)) }
    }

    /// A weight vector.
    ///
    /// # Errors
    /// Out of memory, a fault.
    pub fn floats(&self, values: &[f32]) -> Result<Floats, DeviceError> {
        let buffer = self.buffer(size_of_val(values))?;
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.upload(&buffer, 0, &bytes)?;
        Ok(Floats { buffer, length: small(values.len()) })
    }

    /// Rows `ids` of a table.
    ///
    /// # Errors
    /// Out of memory, a fault.
    pub fn embed(&self, table: &Weights, ids: &[u32]) -> Result<Rows, DeviceError> {
        assert!(ids.iter().all(|&id| id < table.outputs), "a token id that the table has no row for");
        let left = if ids.len() > FEW { self.left } else { 0 };
        self.gather(&table.buffer, table.inputs, ids, left)
    }

    /// Rows `rows` of `x`.
    ///
    /// # Errors
    /// Out of memory, a fault.
    pub fn take(&self, x: &Rows, rows: &[u32]) -> Result<Rows, DeviceError> {
        assert!(rows.iter().all(|&row| row < x.rows), "a row that is not there");
        self.gather(&x.buffer, x.width, rows, 0)
    }

    fn gather(&self, from: &Buffer, width: u32, indices: &[u32], left: u64) -> Result<Rows, DeviceError> {
        let rows = small(indices.len());
        let buffer = self.memory.leaving(Stream::Compute, indices.len() * width as usize * 2, left)?;
        let out = Rows { buffer, rows, width };
        let list = self.list(Stream::Compute, indices)?;
        let shape = (out.rows, width);
        // SAFETY: callers have checked the indices; all are of the compute stream.
        unsafe { self.launch(&rows::gather(from.address(), list.address(), shape, out.buffer.address())) }?;
        Ok(out)
    }

    /// Root-mean-square norm of each row.
    ///
    /// # Errors
    /// Out of memory, a fault.
    pub fn norm(&self, x: &Rows, weight: &Floats, eps: f32) -> Result<Rows, DeviceError> {
        assert_eq!(x.width, weight.length, "a norm of another width");
        let out = self.rows(x.rows, x.width)?;
        let (from, shape) = (x.buffer.address(), (x.rows, x.width));
        let launch = rows::norm(from, weight.buffer.address(), shape, eps, out.buffer.address());
        // SAFETY: shapes agree.
        unsafe { self.launch(&launch) }?;
        Ok(out)
    }

    fn multiply(
        &self,
        x: &Rows,
        weight: &Weights,
        out: &Buffer,
        (add, wide): (bool, bool),
    ) -> Result<(), DeviceError> {
        assert_eq!(x.width, weight.inputs, "a product of other widths");
        let size = if wide { 4 } else { 2 };
        assert!(out.bytes() >= x.rows as usize * weight.outputs as usize * size, "a result without room");
        if x.rows == 0 {
            return Ok(());
        }
        let product = Product {
            x: x.buffer.address(),
            weight: weight.buffer.address(),
            out: out.address(),
            rows: x.rows,
            inputs: x.width,
            outputs: weight.outputs,
            add,
            wide,
        };
        // SAFETY: shapes agree, as checked.
        unsafe { self.machine.multiply(&product) }
    }

    /// `x · Wᵀ`.
    ///
    /// # Errors
    /// Out of memory, a fault.
    pub fn project(&self, x: &Rows, weight: &Weights) -> Result<Rows, DeviceError> {
        let out = self.rows(x.rows, weight.outputs)?;
        self.multiply(x, weight, &out.buffer, (false, false))?;
        Ok(out)
    }

    /// `out += x · Wᵀ`.
    ///
    /// # Errors
    /// A fault.
    pub fn project_add(&self, out: &mut Rows, x: &Rows, weight: &Weights) -> Result<(), DeviceError> {
        assert_eq!((out.rows, out.width), (x.rows, weight.outputs), "a sum of other shapes");
        self.multiply(x, weight, &out.buffer, (true, false))
    }

    /// Appends `x · Wᵀ` to `out`, on the host, in f32. Waits.
    ///
    /// # Errors
    /// Out of memory, a fault.
    pub fn logits(&self, x: &Rows, weight: &Weights, out: &mut Vec<f32>) -> Result<(), DeviceError> {
        let buffer = self.buffer(x.rows as usize * weight.outputs as usize * 4)?;
        self.multiply(x, weight, &buffer, (false, true))?;
        let bytes = self.download(&buffer)?;
        floats_of(&bytes, out);
        Ok(())
    }

    /// `x += bias` in every row.
    ///
    /// # Errors
    /// A fault.
    pub fn add_bias(&self, x: &mut Rows, bias: &Floats) -> Result<(), DeviceError> {
        assert_eq!(x.width, bias.length, "a bias of another width");
        let launch = rows::add_bias(x.buffer.address(), bias.buffer.address(), (x.rows, x.width));
        // SAFETY: shapes agree.
        unsafe { self.launch(&launch) }
    }

    /// `silu(gate) · up` of rows that hold both halves.
    ///
    /// # Errors
    /// Out of memory, a fault.
    pub fn gate(&self, gate_up: &Rows) -> Result<Rows, DeviceError> {
        let out = self.rows(gate_up.rows, gate_up.width / 2)?;
        let launch = rows::gate(gate_up.buffer.address(), (out.rows, out.width), out.buffer.address());
        // SAFETY: a row of one is half a row of the other.
        unsafe { self.launch(&launch) }?;
        Ok(out)
    }

    /// Root-mean-square norm of every query and key head of whole projected rows, in place.
    ///
    /// # Errors
    /// A fault.
    pub fn norm_heads(
        &self,
        qkv: &mut Rows,
        query: &Floats,
        key: &Floats,
        eps: f32,
    ) -> Result<(), DeviceError> {
        assert_eq!((query.length, key.length), (self.heads.dim, self.heads.dim), "a norm of another width");
        self.whole(qkv);
        let (query, key) = (query.buffer.address(), key.buffer.address());
        let launch = rows::norm_heads(self.heads, qkv.buffer.address(), qkv.rows, query, key, eps);
        // SAFETY: shapes agree.
        unsafe { self.launch(&launch) }
    }

    /// Keys and values of whole projected rows, bf16 `[2, kv, rows, dim]`, on the host. Waits.
    ///
    /// # Errors
    /// Out of memory, a fault.
    pub fn export(&self, qkv: &Rows) -> Result<HostBytes, DeviceError> {
        self.whole(qkv);
        let elements = 2 * self.heads.kv * self.heads.dim * qkv.rows;
        let out = self.buffer(elements as usize * 2)?;
        let launch = rows::export(self.heads, qkv.buffer.address(), qkv.rows, out.address());
        // SAFETY: shapes agree.
        unsafe { self.launch(&launch) }?;
        self.download(&out)
    }

    fn whole(&self, qkv: &Rows) {
        assert_eq!(qkv.width, self.heads.row(), "rows that are not queries, keys and values");
    }

    /// Waits until everything asked for is done.
    ///
    /// # Errors
    /// A fault of anything before.
    pub fn finish(&self) -> Result<(), DeviceError> {
        self.machine.finish(Stream::Copy)?;
        self.machine.finish(Stream::Compute)
    }

    /// Milliseconds of the device's clock that the compute stream takes for what `work` asks for. Waits.
    ///
    /// # Errors
    /// Of `work`; a fault.
    pub fn timed<T, E: From<DeviceError>>(&self, work: impl FnOnce() -> Result<T, E>) -> Result<(T, f32), E> {
        let start = self.events.record(Stream::Compute)?;
        let done = work()?;
        let end = self.events.record(Stream::Compute)?;
        self.finish()?;
        Ok((done, end.since(&start)?))
    }

    /// Bytes read and written per second by copies of `bytes` bytes on the device. Waits.
    ///
    /// # Errors
    /// Out of memory, a fault.
    pub fn copy_bandwidth(&self, bytes: usize) -> Result<f64, DeviceError> {
        const TIMES: usize = 10;
        let (from, to) = (self.buffer(bytes)?, self.buffer(bytes)?);
        // SAFETY: both are as long.
        let copy = || unsafe { self.machine.copy(Stream::Compute, to.address(), from.address(), bytes) };
        // The first touch of memory is not what is asked for.
        copy()?;
        let ((), took) = self.timed(|| (0..TIMES).try_for_each(|_| copy()))?;
        Ok((2 * bytes * TIMES) as f64 / (f64::from(took) / 1e3))
    }

    /// Notes from now on when layers are placed and attended.
    ///
    /// # Errors
    /// A fault.
    pub fn note(&self) -> Result<(), DeviceError> {
        let begin = self.events.record(Stream::Compute)?;
        self.state().notes = Some(Notes::new(begin));
        Ok(())
    }

    /// What was noted, and ends noting. Waits.
    ///
    /// # Errors
    /// A fault.
    pub fn noted(&self) -> Result<Vec<Noted>, DeviceError> {
        self.finish()?;
        let notes = self.state().notes.take();
        notes.map_or(Ok(Vec::new()), |notes| notes.read())
    }

    fn noting<T>(
        &self,
        (what, layer, stream): (&'static str, usize, Stream),
        work: impl FnOnce() -> Result<T, DeviceError>,
    ) -> Result<T, DeviceError> {
        if self.state().notes.is_none() {
            return work();
        }
        let start = self.events.record(stream)?;
        let done = work()?;
        let end = self.events.record(stream)?;
        if let Some(notes) = &mut self.state().notes {
            notes.add(what, layer, start, end);
        }
        Ok(done)
    }
}

impl Drop for Executor {
    fn drop(&mut self) {
        // What uploads read goes with this; after a fault nothing reads any more.
        _ = self.finish();
    }
}

fn floats_of(bytes: &[u8], out: &mut Vec<f32>) {
    let (words, _) = bytes.as_chunks::<4>();
    out.extend(words.iter().map(|word| f32::from_le_bytes(*word)));
}
