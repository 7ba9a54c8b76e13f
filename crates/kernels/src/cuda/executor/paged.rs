//! Operations on paged KV, and the order in which two streams come to it.
//!
//! A layer's placement waits for the last computation on that layer, and the next computation on it for the placement: so
//! layer i + 1 is placed while layer i computes, and pages may change hands without anybody waiting on the host.

use super::events::Ticket;
use super::{Executor, Rows, floats_of, small};
use crate::cuda::error::DeviceError;
use crate::cuda::launch::{self, Address, Attended, Paged, Parts, Stored};
use crate::cuda::machine::{Machine, Stream};
use crate::cuda::memory::Buffer;
use crate::cuda::pinned::HostBytes;
use crate::page::PAGE_TOKENS;
use crate::probe::Look;
use crate::rope::RopeTable;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Bytes of sections that are copied to the device at a time; a larger section comes alone.
pub const STAGED: usize = 80 << 20;
/// What a section's bytes begin on.
const ALIGNED: usize = 256;

/// Paged KV, bf16: a pool per layer.
#[derive(Debug)]
pub struct Pages {
    // Dropped before the pools are.
    _flush: Flush,
    layers: Vec<Layer>,
    count: u32,
}

#[derive(Debug)]
struct Layer {
    pool: Buffer,
    /// The last computation on it.
    used: Ticket,
    /// The last placement in it.
    placed: Ticket,
    /// Whether a computation has to wait for that.
    awaited: AtomicBool,
}

/// Waits for placements before pools are used for something else.
#[derive(Debug)]
struct Flush(Arc<dyn Machine>);

impl Drop for Flush {
    fn drop(&mut self) {
        // A device that is lost places nothing any more.
        _ = self.0.finish(Stream::Copy);
    }
}

/// Cosines and sines of positions on the device.
#[derive(Debug)]
pub struct Angles {
    cosines: Buffer,
    sines: Buffer,
    positions: u32,
}

impl Angles {
    fn launched(&self) -> launch::Angles {
        launch::Angles { cosines: self.cosines.address(), sines: self.sines.address() }
    }
}

/// A layer of pages.
#[derive(Clone, Copy, Debug)]
pub struct At<'a> {
    /// The pages.
    pub pages: &'a Pages,
    /// Layer, from 0.
    pub layer: usize,
}

/// Whose rows they are.
#[derive(Clone, Copy, Debug)]
pub enum Sequences<'a> {
    /// All of the sequence with this table; positions ascend.
    One(&'a [u32]),
    /// Row `i` of the sequence with table `i`.
    Each(&'a [&'a [u32]]),
}

/// A layer of a section, to be placed: K `[kv, tokens, dim]`, then V.
#[derive(Clone, Debug)]
pub struct Section {
    /// The elements.
    pub bytes: Arc<HostBytes>,
    /// Their type.
    pub stored: Stored,
    /// Tokens.
    pub tokens: usize,
    /// Position of the first.
    pub start: usize,
}

impl Executor {
    /// Reserves `count` pages in each of `layers` layers, of any content.
    ///
    /// # Errors
    /// Out of memory, a fault.
    pub fn pages(&self, layers: usize, count: usize) -> Result<Pages, DeviceError> {
        let bytes = count * self.heads.shape().page() * 2;
        let layer = |_| {
            let pool = self.buffer(bytes)?;
            // What used this memory before is done before anything is placed in it.
            let (used, placed) = (self.events.record(Stream::Compute)?, self.events.record(Stream::Copy)?);
            Ok(Layer { pool, used, placed, awaited: AtomicBool::new(false) })
        };
        let layers = (0..layers).map(layer).collect::<Result<_, DeviceError>>()?;
        Ok(Pages { _flush: Flush(Arc::clone(&self.machine)), layers, count: small(count) })
    }

    /// Angles of a table.
    ///
    /// # Errors
    /// Out of memory, a fault.
    pub fn angles(&self, rope: &RopeTable) -> Result<Angles, DeviceError> {
        let rows = || (0..rope.positions()).map(|position| rope.at(position));
        let upload = |values: Vec<u8>| {
            let buffer = self.buffer(values.len())?;
            self.upload(&buffer, 0, &values)?;
            Ok::<_, DeviceError>(buffer)
        };
        let bytes = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>();
        Ok(Angles {
            cosines: upload(rows().flat_map(|(cosines, _)| bytes(cosines)).collect())?,
            sines: upload(rows().flat_map(|(_, sines)| bytes(sines)).collect())?,
            positions: small(rope.positions()),
        })
    }

    fn paged(&self, at: At<'_>, tables: Address, stride: u32) -> Paged {
        Paged { pool: at.pages.layers[at.layer].pool.address(), tables, stride }
    }

    /// The pages of a sequence that hold positions up to `last`, checked.
    fn covers<'a>(&self, pages: &Pages, table: &'a [u32], last: u32) -> &'a [u32] {
        let count = last as usize / PAGE_TOKENS + 1;
        assert!(count <= table.len(), "position {last} has no page");
        assert!(table[..count].iter().all(|&page| page < pages.count), "a page that is not there");
        &table[..count]
    }

    /// The tables of the rows at `positions`, checked, as one list, and the distance from one to the next. No longer than
    /// the rows need: every layer of a decoding step compares them with what is on the device.
    fn tables(
        &self,
        pages: &Pages,
        sequences: Sequences<'_>,
        positions: &[u32],
    ) -> Result<(Arc<Buffer>, u32), DeviceError> {
        match sequences {
            Sequences::One(table) => {
                let last = positions.iter().copied().max().unwrap_or_default();
                Ok((self.list(Stream::Compute, self.covers(pages, table, last))?, 0))
            }
            Sequences::Each(tables) => {
                assert_eq!(tables.len(), positions.len(), "a table for each row");
                let tables =
                    tables.iter().zip(positions).map(|(table, &last)| self.covers(pages, table, last));
                let tables: Vec<&[u32]> = tables.collect();
                let stride = tables.iter().map(|table| table.len()).max().unwrap_or_default();
                let mut all = vec![0; tables.len() * stride];
                for (to, table) in all.chunks_exact_mut(stride.max(1)).zip(tables) {
                    to[..table.len()].copy_from_slice(table);
                }
                Ok((self.list(Stream::Compute, &all)?, small(stride)))
            }
        }
    }

    /// Computes on a layer: behind its placement, and before the next.
    fn on_layer<T>(
        &self,
        what: &'static str,
        at: At<'_>,
        work: impl FnOnce() -> Result<T, DeviceError>,
    ) -> Result<T, DeviceError> {
        let layer = &at.pages.layers[at.layer];
        if layer.awaited.swap(false, Ordering::Relaxed) {
            layer.placed.hold(Stream::Compute)?;
        }
        let done = self.noting((what, at.layer, Stream::Compute), work);
        if self.overlap {
            layer.used.again(Stream::Compute)?;
        }
        done
    }

    /// Places sections of one sequence. Returns before that has happened; the next computation on the layer waits for it.
    ///
    /// # Errors
    /// Out of memory, a fault.
    pub fn place(
        &self,
        at: At<'_>,
        table: &[u32],
        sections: &[Section],
        angles: &Angles,
    ) -> Result<(), DeviceError> {
        let layer = &at.pages.layers[at.layer];
        if !self.overlap {
            return self.place_in_turn(at, table, sections, angles, Stream::Compute);
        }
        layer.used.hold(Stream::Copy)?;
        let placed = self.place_in_turn(at, table, sections, angles, Stream::Copy);
        // Also where only a part could be asked for: pages may be another sequence's before that part is there.
        layer.placed.again(Stream::Copy)?;
        layer.awaited.store(true, Ordering::Relaxed);
        placed
    }

    /// Places sections, as many at a time as are staged together.
    fn place_in_turn(
        &self,
        at: At<'_>,
        table: &[u32],
        mut sections: &[Section],
        angles: &Angles,
        stream: Stream,
    ) -> Result<(), DeviceError> {
        while let Some(first) = sections.first() {
            let mut bytes = 0;
            let fits = |section: &&Section| {
                bytes += section.bytes.len().next_multiple_of(ALIGNED);
                section.stored == first.stored && bytes <= STAGED
            };
            let count = sections.iter().take_while(fits).count().max(1);
            let (now, later) = sections.split_at(count);
            self.noting(("place", at.layer, stream), || self.place_some(at, table, now, angles, stream))?;
            sections = later;
        }
        Ok(())
    }

    fn place_some(
        &self,
        at: At<'_>,
        table: &[u32],
        sections: &[Section],
        angles: &Angles,
        stream: Stream,
    ) -> Result<(), DeviceError> {
        let (mut offset, mut longest, mut spans) = (0, 0, Vec::new());
        for section in sections {
            let (tokens, last) = (small(section.tokens), section.start + section.tokens.max(1) - 1);
            let elements = 2 * self.heads.kv as usize * section.tokens * self.heads.dim as usize;
            let size = if section.stored == Stored::F32 { 4 } else { 2 };
            assert_eq!(section.bytes.len(), elements * size, "a section's bytes");
            assert!(last < angles.positions as usize, "position {last} has no angles");
            self.covers(at.pages, table, small(last));
            // `launch::Span`, in the words of a little-endian machine.
            let at = offset as u64;
            spans.extend([at as u32, (at >> 32) as u32, tokens, small(section.start)]);
            longest = longest.max(tokens);
            offset += section.bytes.len().next_multiple_of(ALIGNED);
        }
        let staging = self.memory.buffer(stream, offset)?;
        let (table, listed) = (self.list(stream, table)?, self.list(stream, &spans)?);
        offset = 0;
        for section in sections {
            let (bytes, to) = (&*section.bytes, staging.address() + offset as u64);
            // SAFETY: the staging buffer has room for all; it is the stream's, and `bytes` are kept below.
            unsafe { self.machine.upload(stream, to, bytes.as_ptr(), bytes.len()) }?;
            offset += bytes.len().next_multiple_of(ALIGNED);
        }
        let held: Vec<Arc<HostBytes>> = sections.iter().map(|section| Arc::clone(&section.bytes)).collect();
        self.state().in_use[stream as usize].keep(&self.events, stream, Box::new(held))?;
        let stored = sections.first().map_or(Stored::Bf16, |section| section.stored);
        let spans = (listed.address(), small(sections.len()), longest);
        let pages = self.paged(at, table.address(), 0);
        let launch =
            launch::place(self.heads, pages, staging.address(), (stored, false), spans, angles.launched());
        // SAFETY: spans lie in the staging buffer, and positions have pages and angles, as checked; pages are not used by
        // the compute stream before it has waited.
        unsafe { self.machine.launch(stream, &launch) }
    }

    /// Rotates the queries of whole projected rows, and writes their rotated keys and their values to their positions.
    ///
    /// # Errors
    /// Out of memory, a fault.
    pub fn scatter(
        &self,
        at: At<'_>,
        sequences: Sequences<'_>,
        qkv: &mut Rows,
        positions: &[u32],
        angles: &Angles,
    ) -> Result<(), DeviceError> {
        self.whole(qkv);
        assert_eq!(positions.len(), qkv.rows(), "a position for each row");
        assert!(positions.iter().all(|&p| p < angles.positions), "a position without angles");
        if positions.is_empty() {
            return Ok(());
        }
        let (tables, stride) = self.tables(at.pages, sequences, positions)?;
        let list = self.list(Stream::Compute, positions)?;
        let rows = from(qkv, 0, &list, qkv.rows);
        let pages = self.paged(at, tables.address(), stride);
        let launch = launch::scatter(self.heads, pages, rows, angles.launched());
        // SAFETY: positions have pages and angles, as checked.
        self.on_layer("scatter", at, || unsafe { self.launch(&launch) })
    }

    /// Attention of the rotated queries of whole projected rows over everything at or before their positions.
    ///
    /// # Errors
    /// Out of memory, a fault.
    pub fn attend(
        &self,
        at: At<'_>,
        sequences: Sequences<'_>,
        qkv: &Rows,
        positions: &[u32],
    ) -> Result<Rows, DeviceError> {
        let out = self.rows(qkv.rows, self.heads.queries * self.heads.dim)?;
        self.attend_to(at, sequences, (qkv, 0), positions, (&out, None))?;
        Ok(out)
    }

    /// Attends the rows of `qkv` from `first` on, one for each position.
    fn attend_to(
        &self,
        at: At<'_>,
        sequences: Sequences<'_>,
        (qkv, first): (&Rows, u32),
        positions: &[u32],
        (out, logs): (&Rows, Option<&Buffer>),
    ) -> Result<(), DeviceError> {
        self.whole(qkv);
        assert_eq!(first as usize + positions.len(), qkv.rows(), "a position for each row");
        let (count, heads) = (small(positions.len()), self.heads);
        let Some(columns) = positions.iter().max().map(|last| last + 1) else { return Ok(()) };
        let (tables, stride) = self.tables(at.pages, sequences, positions)?;
        let list = self.list(Stream::Compute, positions)?;
        let rows = from(qkv, first, &list, count);
        let pages = self.paged(at, tables.address(), stride);
        let to = Attended { out: out.buffer.address(), logs: logs.map_or(0, |logs| logs.address()) };
        let machine = self.machine.multiprocessors();
        let (splits, each) = match sequences {
            Sequences::One(_) => (launch::attend_splits(heads, count, columns, machine), false),
            Sequences::Each(_) => (launch::decode_splits(heads, count, columns, machine), true),
        };
        self.on_layer("attend", at, || {
            if splits == 1 && !each {
                // SAFETY: positions have pages, as checked; results are as long as rows.
                return unsafe { self.launch(&launch::attend_rows(heads, pages, rows, to, None)) };
            }
            let vectors = (count * heads.queries * splits) as usize;
            let sums = self.buffer(vectors * heads.dim as usize * 4)?;
            let stats = self.buffer(vectors * 2 * 4)?;
            let parts = Parts { sums: sums.address(), stats: stats.address(), splits };
            let launch = if each {
                launch::decode(heads, pages, rows, parts)
            } else {
                launch::attend_rows(heads, pages, rows, to, Some(parts))
            };
            // SAFETY: as above; parts are as long as ranges times rows.
            unsafe {
                self.launch(&launch)?;
                self.launch(&launch::merge(heads, count, parts, to))
            }
        })
    }

    /// Attention probabilities of the rows from `first` on over columns `0..columns`, reduced over heads, then (if asked
    /// for) over rows; on the host. Waits.
    ///
    /// # Errors
    /// Out of memory, a fault.
    pub fn probe(
        &self,
        at: At<'_>,
        table: &[u32],
        qkv: &Rows,
        positions: &[u32],
        look: Look,
    ) -> Result<Vec<f32>, DeviceError> {
        let (first, positions) = (small(look.first), &positions[look.first..]);
        let (count, heads) = (small(positions.len()), self.heads);
        let logs = self.buffer((count * heads.queries) as usize * 4)?;
        // For its logarithms alone.
        let out = self.rows(count, heads.queries * heads.dim)?;
        self.attend_to(at, Sequences::One(table), (qkv, first), positions, (&out, Some(&logs)))?;
        self.look(at, table, (qkv, first), positions, (logs.address(), look))
    }

    /// [`attend`](Self::attend) of all rows and [`probe`](Self::probe) of some, attended once.
    ///
    /// # Errors
    /// Out of memory, a fault.
    pub fn attend_and_probe(
        &self,
        at: At<'_>,
        table: &[u32],
        qkv: &Rows,
        positions: &[u32],
        look: Look,
    ) -> Result<(Rows, Vec<f32>), DeviceError> {
        let out = self.rows(qkv.rows, self.heads.queries * self.heads.dim)?;
        let logs = self.buffer((qkv.rows * self.heads.queries) as usize * 4)?;
        self.attend_to(at, Sequences::One(table), (qkv, 0), positions, (&out, Some(&logs)))?;
        let first = small(look.first);
        let of_first = logs.address() + u64::from(first) * u64::from(self.heads.queries) * 4;
        let values = self.look(at, table, (qkv, first), &positions[look.first..], (of_first, look))?;
        Ok((out, values))
    }

    /// What rows that were attended look at; `logs` are theirs.
    fn look(
        &self,
        at: At<'_>,
        table: &[u32],
        (qkv, first): (&Rows, u32),
        positions: &[u32],
        (logs, look): (Address, Look),
    ) -> Result<Vec<f32>, DeviceError> {
        let (count, columns, heads) = (small(positions.len()), small(look.columns), self.heads);
        let mut values = Vec::new();
        if count == 0 || columns == 0 {
            return Ok(values);
        }
        let all = self.buffer(count as usize * look.columns * 4)?;
        let (tables, list) = (self.list(Stream::Compute, table)?, self.list(Stream::Compute, positions)?);
        let (pages, rows) = (self.paged(at, tables.address(), 0), from(qkv, first, &list, count));
        self.on_layer("probe", at, || {
            let launch = launch::probe(heads, pages, rows, columns, logs, look.heads, all.address());
            // SAFETY: results are as long as rows and columns; rows have pages, and columns behind them are not read.
            unsafe { self.launch(&launch) }
        })?;
        let values_of = match look.rows {
            None => all,
            Some(reduce) => {
                let reduced = self.buffer(look.columns * 4)?;
                let launch = launch::probe_reduce(all.address(), count, columns, reduce, reduced.address());
                // SAFETY: as long as columns.
                unsafe { self.launch(&launch) }?;
                reduced
            }
        };
        floats_of(&self.download(&values_of)?, &mut values);
        Ok(values)
    }
}

/// Rows from `first` on, as launches have them; their positions are `list`.
fn from(qkv: &Rows, first: u32, list: &Buffer, count: u32) -> launch::Rows {
    launch::Rows {
        data: qkv.buffer.address() + u64::from(first) * u64::from(qkv.width) * 2,
        stride: qkv.width,
        positions: list.address(),
        count,
    }
}
