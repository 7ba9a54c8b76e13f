//! Kernels timed on a machine, by its own clock: the launches of [`launch`] over buffers of their own.
//!
//! Buffers hold numbers and not zeros, which some devices multiply faster; what is timed is larger than the second-level
//! cache wherever its caller asks for that much.

use super::Heads;
use super::error::DeviceError;
use super::floor::{self, Floor};
use super::launch::{self, Address, Angles, Attended, Launch, Paged, Parts, Rows, Stored};
use super::machine::{Event, Machine, Stream};
use super::memory::{Buffer, Memory, allocated};
use super::pinned::{HostBytes, HostPool};
use super::rows;
use crate::page::pages_for;
use crate::probe::Reduce;
use std::sync::Arc;

/// Where everything is timed.
const STREAM: Stream = Stream::Compute;

/// A machine on which kernels are timed.
#[derive(Debug)]
pub struct Stand {
    machine: Arc<dyn Machine>,
    memory: Arc<Memory>,
    begin: Event,
    end: Event,
}

/// Work with the buffers that it is done on.
#[derive(Debug)]
pub struct Prepared<'a> {
    stand: &'a Stand,
    work: Work,
    /// Of one set of buffers.
    floor: Floor,
    /// Sets of buffers that take turns: one that fits into a cache is never met there.
    sets: u32,
    _buffers: Vec<Buffer>,
}

#[derive(Debug)]
enum Work {
    Launches(Vec<Launch>),
    Copy { from: Address, to: Address, bytes: usize },
    Upload { from: HostBytes, to: Address },
}

fn bytes(words: impl IntoIterator<Item = u32>) -> Vec<u8> {
    words.into_iter().flat_map(u32::to_le_bytes).collect()
}

/// Pages in an order that no stride describes, as a pool that has been in use has them: every page once.
fn scattered(pages: usize) -> Vec<u32> {
    // A step that shares no factor with the count visits all.
    let mut step = (pages * 5 / 8).max(1);
    while gcd(step, pages) != 1 {
        step += 1;
    }
    (0..pages).map(|i| (i * step % pages) as u32).collect()
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Buffers of work that is being prepared.
struct Buffers<'a> {
    stand: &'a Stand,
    held: Vec<Buffer>,
}

impl Buffers<'_> {
    fn upload(&mut self, bytes: &[u8]) -> Result<Address, DeviceError> {
        let to = self.empty(bytes.len())?;
        let machine = &self.stand.machine;
        // SAFETY: the buffer is as long, and the bytes are here until the stream is empty.
        unsafe { machine.upload(STREAM, to, bytes.as_ptr(), bytes.len()) }?;
        machine.finish(STREAM)?;
        Ok(to)
    }

    /// For results, which are written before they are read.
    fn empty(&mut self, bytes: usize) -> Result<Address, DeviceError> {
        let buffer = self.stand.memory.buffer(STREAM, bytes)?;
        let address = buffer.address();
        self.held.push(buffer);
        Ok(address)
    }

    /// Numbers between -1 and 1 in bf16, made on the device: gigabytes of them take the host longer than all that is
    /// timed, and the device's clocks fall meanwhile.
    fn numbers(&mut self, count: usize) -> Result<Address, DeviceError> {
        let base = self.held.len() as u64;
        let to = self.empty(2 * count)?;
        // SAFETY: the buffer is as long.
        unsafe { self.stand.machine.launch(STREAM, &rows::random_weights(to, count as u64, base, 1.0)) }?;
        Ok(to)
    }

    /// A pool of `sequences` sequences of `tokens` tokens each, full, with their tables.
    fn pool(&mut self, heads: Heads, sequences: usize, tokens: usize) -> Result<Paged, DeviceError> {
        let each = pages_for(tokens);
        let pool = self.numbers(sequences * each * heads.shape().page())?;
        let tables = self.upload(&bytes(scattered(sequences * each)))?;
        Ok(Paged { pool, tables, stride: if sequences > 1 { each as u32 } else { 0 } })
    }

    fn rows(&mut self, heads: Heads, positions: &[u32]) -> Result<Rows, DeviceError> {
        let data = self.numbers(positions.len() * heads.row() as usize)?;
        let at = self.upload(&bytes(positions.iter().copied()))?;
        Ok(Rows { data, stride: heads.row(), positions: at, count: positions.len() as u32 })
    }

    fn angles(&mut self, heads: Heads, positions: usize) -> Result<Angles, DeviceError> {
        // Any angle costs the same, and one number in both keeps a rotation from growing what it is repeated on.
        let half = bytes(std::iter::repeat_n(
            std::f32::consts::FRAC_1_SQRT_2.to_bits(),
            positions * heads.dim as usize / 2,
        ));
        Ok(Angles { cosines: self.upload(&half)?, sines: self.upload(&half)? })
    }

    fn attended(&mut self, heads: Heads, rows: usize) -> Result<Attended, DeviceError> {
        let vectors = rows * heads.queries as usize;
        Ok(Attended { out: self.empty(vectors * heads.dim as usize * 2)?, logs: self.empty(vectors * 4)? })
    }

    fn parts(&mut self, heads: Heads, rows: usize, splits: u32) -> Result<Parts, DeviceError> {
        let vectors = rows * heads.queries as usize * splits as usize;
        Ok(Parts {
            sums: self.empty(vectors * heads.dim as usize * 4)?,
            stats: self.empty(vectors * 8)?,
            splits,
        })
    }
}

impl Stand {
    /// A stand on nine tenths of the memory that is free.
    ///
    /// # Errors
    /// A device fault.
    pub fn new(machine: Arc<dyn Machine>) -> Result<Self, DeviceError> {
        let memory = Memory::new(Arc::clone(&machine), machine.free_memory()? / 10 * 9);
        let (begin, end) = (machine.event()?, machine.event()?);
        Ok(Self { machine, memory, begin, end })
    }

    /// The machine.
    pub fn machine(&self) -> &dyn Machine {
        &*self.machine
    }

    fn heads(&self) -> Heads {
        self.machine.heads()
    }

    fn buffers(&self) -> Buffers<'_> {
        Buffers { stand: self, held: Vec::new() }
    }

    fn prepared(&self, launches: Vec<Launch>, floor: Floor, buffers: Buffers<'_>) -> Prepared<'_> {
        Prepared { stand: self, work: Work::Launches(launches), floor, sets: 1, _buffers: buffers.held }
    }

    /// A copy of `bytes` bytes on the device; its floor counts reading and writing.
    ///
    /// # Errors
    /// Out of memory, or a device fault; so in all functions below.
    pub fn copy(&self, bytes: usize) -> Result<Prepared<'_>, DeviceError> {
        let mut buffers = self.buffers();
        let (from, to) = (buffers.numbers(bytes / 2)?, buffers.empty(bytes)?);
        let floor = Floor { bytes: 2 * bytes as u64, flops: 0 };
        let work = Work::Copy { from, to, bytes };
        Ok(Prepared { stand: self, work, floor, sets: 1, _buffers: buffers.held })
    }

    /// A copy of `bytes` page-locked bytes of the host: what stored KV comes over.
    ///
    /// # Errors
    /// As [`copy`](Self::copy); no such memory.
    pub fn upload(&self, bytes: usize) -> Result<Prepared<'_>, DeviceError> {
        let pool = HostPool::pinned(Arc::clone(&self.machine), allocated(bytes) as u64);
        let from = pool.bytes(bytes);
        if pool.used() == 0 {
            return Err(DeviceError::Fault("lock host memory", format!("{bytes} bytes")));
        }
        let mut buffers = self.buffers();
        let to = buffers.empty(bytes)?;
        let (work, floor) = (Work::Upload { from, to }, Floor { bytes: bytes as u64, flops: 0 });
        Ok(Prepared { stand: self, work, floor, sets: 1, _buffers: buffers.held })
    }

    /// *place* of `chunks` sections of `tokens` tokens each, one layer, from and to `sets` sets of buffers in turns.
    ///
    /// # Errors
    /// As [`copy`](Self::copy).
    pub fn place(
        &self,
        chunks: u32,
        tokens: u32,
        (stored, planes): (Stored, bool),
        sets: u32,
    ) -> Result<Prepared<'_>, DeviceError> {
        let (heads, all) = (self.heads(), chunks * tokens);
        let mut buffers = self.buffers();
        let elements = 2 * (all * heads.kv * heads.dim) as usize;
        let halves = elements * if stored == Stored::F32 { 2 } else { 1 };
        let each = (2 * halves) as u64 / u64::from(chunks);
        let spans = (0..chunks).flat_map(|i| {
            let offset = u64::from(i) * each;
            [offset as u32, (offset >> 32) as u32, tokens, i * tokens]
        });
        let spans = (buffers.upload(&bytes(spans))?, chunks, tokens);
        let angles = buffers.angles(heads, all as usize)?;
        let mut launches = Vec::new();
        for _ in 0..sets.max(1) {
            let (pages, staging) = (buffers.pool(heads, 1, all as usize)?, buffers.numbers(halves)?);
            launches.push(launch::place(heads, pages, staging, (stored, planes), spans, angles));
        }
        let floor = floor::place(heads, all, stored);
        let mut prepared = self.prepared(launches, floor, buffers);
        prepared.sets = sets.max(1);
        Ok(prepared)
    }

    /// *scatter* of `rows` rows of one sequence.
    ///
    /// # Errors
    /// As [`copy`](Self::copy).
    pub fn scatter(&self, rows: u32) -> Result<Prepared<'_>, DeviceError> {
        let heads = self.heads();
        let mut buffers = self.buffers();
        let pages = buffers.pool(heads, 1, rows as usize)?;
        let launched_rows = buffers.rows(heads, &(0..rows).collect::<Vec<_>>())?;
        let angles = buffers.angles(heads, rows as usize)?;
        let launched = launch::scatter(heads, pages, launched_rows, angles);
        Ok(self.prepared(vec![launched], floor::scatter(heads, rows), buffers))
    }

    /// *attend_rows* of rows at `positions` (ascending), over ranges of columns where rows are few, as a device does it.
    ///
    /// # Errors
    /// As [`copy`](Self::copy).
    pub fn attend_rows(&self, positions: &[u32]) -> Result<Prepared<'_>, DeviceError> {
        let (heads, count) = (self.heads(), positions.len());
        let columns = positions.last().map_or(0, |&last| last + 1);
        let mut buffers = self.buffers();
        let pages = buffers.pool(heads, 1, columns as usize)?;
        let rows = buffers.rows(heads, positions)?;
        let to = buffers.attended(heads, count)?;
        let splits = launch::attend_splits(heads, rows.count, columns, self.machine.multiprocessors());
        let parts = if splits > 1 { Some(buffers.parts(heads, count, splits)?) } else { None };
        let mut launches = vec![launch::attend_rows(heads, pages, rows, to, parts)];
        launches.extend(parts.map(|parts| launch::merge(heads, rows.count, parts, to)));
        Ok(self.prepared(launches, floor::attend_rows(heads, positions), buffers))
    }

    /// *decode* and *merge* of one row each of `batch` sequences of `columns` columns.
    ///
    /// # Errors
    /// As [`copy`](Self::copy).
    pub fn decode(&self, batch: u32, columns: u32) -> Result<Prepared<'_>, DeviceError> {
        let (heads, count) = (self.heads(), batch as usize);
        let mut buffers = self.buffers();
        let pages = buffers.pool(heads, count, columns as usize)?;
        let rows = buffers.rows(heads, &vec![columns - 1; count])?;
        let to = buffers.attended(heads, count)?;
        let splits = launch::decode_splits(heads, batch, columns, self.machine.multiprocessors());
        let parts = buffers.parts(heads, count, splits)?;
        let launches =
            vec![launch::decode(heads, pages, rows, parts), launch::merge(heads, batch, parts, to)];
        Ok(self.prepared(launches, floor::decode(heads, batch, columns), buffers))
    }

    /// *probe* and its reduction over the last `rows` rows of `columns` columns.
    ///
    /// # Errors
    /// As [`copy`](Self::copy).
    pub fn probe(&self, rows: u32, columns: u32) -> Result<Prepared<'_>, DeviceError> {
        let heads = self.heads();
        let mut buffers = self.buffers();
        let pages = buffers.pool(heads, 1, columns as usize)?;
        let looking = buffers.rows(heads, &(columns - rows..columns).collect::<Vec<_>>())?;
        // Of large totals: probabilities stay small, as they are.
        let logs =
            buffers.upload(&bytes(std::iter::repeat_n(8f32.to_bits(), (rows * heads.queries) as usize)))?;
        let out = buffers.empty((rows * columns * 4) as usize)?;
        let reduced = buffers.empty(columns as usize * 4)?;
        let launches = vec![
            launch::probe(heads, pages, looking, columns, logs, Reduce::Max, out),
            launch::probe_reduce(out, rows, columns, Reduce::Max, reduced),
        ];
        Ok(self.prepared(launches, floor::probe(heads, rows, columns), buffers))
    }
}

impl Prepared<'_> {
    /// What this work cannot do without.
    pub fn floor(&self) -> Floor {
        self.floor
    }

    /// Sets of buffers that take turns.
    pub fn sets(&self) -> u32 {
        self.sets
    }

    /// Does it `times` times on end with every set of buffers; seconds of one, by the machine's clock.
    ///
    /// # Errors
    /// A device fault.
    pub fn seconds(&self, times: u32) -> Result<f64, DeviceError> {
        let Stand { machine, begin, end, .. } = self.stand;
        machine.record(*begin, STREAM)?;
        for _ in 0..times {
            match &self.work {
                Work::Launches(launches) => {
                    for launch in launches {
                        // SAFETY: the buffers were made for this launch, as long as the kernel's file says, and live
                        // as long as this value, which waits before it goes.
                        unsafe { machine.launch(STREAM, launch) }?;
                    }
                }
                &Work::Copy { from, to, bytes } => {
                    // SAFETY: as above; the two are buffers of their own.
                    unsafe { machine.copy(STREAM, to, from, bytes) }?;
                }
                Work::Upload { from, to } => {
                    // SAFETY: as above; nobody writes to the bytes.
                    unsafe { machine.upload(STREAM, *to, from.as_ptr(), from.len()) }?;
                }
            }
        }
        machine.record(*end, STREAM)?;
        machine.finish(STREAM)?;
        let milliseconds = machine.elapsed(*begin, *end)?;
        Ok(f64::from(milliseconds) / 1e3 / f64::from(times.max(1) * self.sets))
    }
}

impl Drop for Prepared<'_> {
    fn drop(&mut self) {
        // A launch that failed halfway may have left others under way, on buffers that go now.
        _ = self.stand.machine.finish(STREAM);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_scattered_and_each_is_there_once() {
        for pages in [1, 2, 7, 64, 1024] {
            let mut all = scattered(pages);
            let in_order = all.windows(2).filter(|pair| pair[1] == pair[0] + 1).count();
            assert!(pages < 8 || in_order < pages / 4, "{pages} pages, {in_order} of them in order");
            all.sort_unstable();
            assert_eq!(all, (0..pages as u32).collect::<Vec<_>>());
        }
    }
}
