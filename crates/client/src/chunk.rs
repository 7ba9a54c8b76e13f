//! What has arrived of one chunk, and what may come next.

use bytes::{Bytes, BytesMut};
use cacheclip_chunk::{ChunkKey, Head, LayoutId, SegmentKind};
use cacheclip_rpc::v1::{MissReason, Segment};
use std::ops::Range;
use std::sync::Arc;

/// Room made ahead for a segment; the rest grows as bytes come, so that a head alone allocates little.
const AHEAD: u64 = 4 << 20;

/// Frames that are not what was asked for: the chunk is computed instead.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Corrupt;

/// The read of one chunk, across retries.
#[derive(Debug)]
pub(crate) struct Arrival {
    key: ChunkKey,
    range: Range<u32>,
    head: Option<Arc<Head>>,
    /// The next layer to hand on; earlier ones have been.
    pub(crate) next_layer: u32,
    /// Which optional segments have been handed on.
    extras: Vec<usize>,
    partial: Option<(usize, BytesMut)>,
    /// Set when nothing more is wanted, whatever comes.
    pub(crate) over: bool,
}

/// A segment that is complete but not verified.
#[derive(Debug)]
pub(crate) struct Whole {
    pub(crate) head: Arc<Head>,
    pub(crate) index: usize,
    pub(crate) stored: Bytes,
}

impl Arrival {
    pub(crate) fn new(key: ChunkKey, range: Range<u32>) -> Self {
        let next_layer = range.start;
        Self { key, range, head: None, next_layer, extras: Vec::new(), partial: None, over: false }
    }

    /// Bytes of its container, once the store has shown its head.
    pub(crate) fn container_len(&self) -> Option<u64> {
        self.head.as_ref().map(|head| head.container_len())
    }

    /// Whether all that was asked for has come.
    pub(crate) fn complete(&self) -> bool {
        self.next_layer == self.range.end
    }

    /// A new attempt begins: what was cut off in the middle comes again.
    pub(crate) fn restart(&mut self) {
        self.partial = None;
    }

    /// Takes a head frame; the head where it is new to this chunk. The one error that is not damage: the store
    /// has this key under another layout, or fewer layers than were asked for.
    pub(crate) fn head(&mut self, layout: LayoutId, bytes: &[u8]) -> Result<Option<Arc<Head>>, MissReason> {
        let head = Head::parse(bytes).map_err(|_| MissReason::Corrupt)?;
        if head.bytes().len() != bytes.len() || head.key() != self.key {
            return Err(MissReason::Corrupt);
        }
        if head.layout() != layout || head.shape().layers < self.range.end {
            return Err(MissReason::Layout);
        }
        match &self.head {
            // Another writer's container took the place of the one whose layers were handed on: two honest
            // writers may differ in the last bits, and layers of both must not be mixed.
            Some(known) if known.hash() != head.hash() => Err(MissReason::Unavailable),
            Some(_) => Ok(None),
            None => {
                let head = Arc::new(head);
                self.head = Some(Arc::clone(&head));
                Ok(Some(head))
            }
        }
    }

    /// Takes a segment frame; the segment where this completes it and it has not been handed on before.
    pub(crate) fn segment(&mut self, frame: Segment) -> Result<Option<Whole>, Corrupt> {
        let head = self.head.as_ref().ok_or(Corrupt)?;
        let index = frame.index as usize;
        let entry = head.segments().get(index).ok_or(Corrupt)?;
        let (at, so_far) = match &self.partial {
            Some((at, bytes)) => (*at, bytes.len() as u64),
            None => (index, 0),
        };
        // So far ≤ stored length, hence no overflow.
        if at != index || frame.offset != so_far || frame.data.len() as u64 > entry.stored_len - so_far {
            return Err(Corrupt);
        }
        let complete = so_far + frame.data.len() as u64 == entry.stored_len;
        let stored = match self.partial.take() {
            None if complete => frame.data,
            partial => {
                let room = || BytesMut::with_capacity(entry.stored_len.min(AHEAD) as usize);
                let mut bytes = partial.map_or_else(room, |(_, bytes)| bytes);
                bytes.extend_from_slice(&frame.data);
                if !complete {
                    self.partial = Some((index, bytes));
                    return Ok(None);
                }
                bytes.freeze()
            }
        };
        let whole = Whole { head: Arc::clone(head), index, stored };
        match entry.kind {
            SegmentKind::Layer if entry.layer < self.next_layer => Ok(None),
            SegmentKind::Layer if entry.layer == self.next_layer && entry.layer < self.range.end => {
                self.next_layer += 1;
                self.over = self.next_layer == self.range.end;
                Ok(Some(whole))
            }
            SegmentKind::Layer => Err(Corrupt),
            SegmentKind::Spans | SegmentKind::Rank | SegmentKind::Ids if self.extras.contains(&index) => {
                Ok(None)
            }
            SegmentKind::Spans | SegmentKind::Rank | SegmentKind::Ids => {
                self.extras.push(index);
                Ok(Some(whole))
            }
        }
    }
}
