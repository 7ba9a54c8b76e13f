//! What has arrived of one chunk, and what may come next.

use bytes::{Bytes, BytesMut};
use cacheclip_chunk::{ChunkKey, Head, LayoutId, SegmentKind};
use cacheclip_rpc::v1::{MissReason, Segment};
use std::ops::Range;
use std::sync::Arc;

/// A shorter piece of a segment is copied behind the one before: it would hold on to more memory than it fills.
const SHORT: usize = 64 << 10;

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
    partial: Option<(usize, Pieces)>,
    /// Set when nothing more is wanted, whatever comes.
    pub(crate) over: bool,
}

/// A segment that is complete but not verified.
#[derive(Debug)]
pub(crate) struct Whole {
    pub(crate) head: Arc<Head>,
    pub(crate) index: usize,
    pub(crate) stored: Pieces,
}

/// Stored bytes as they came, in order.
#[derive(Debug, Default)]
pub(crate) struct Pieces {
    long: Vec<Bytes>,
    /// Short ones that came since the last long one.
    short: BytesMut,
    length: usize,
}

impl Pieces {
    fn push(&mut self, piece: Bytes) {
        self.length += piece.len();
        if piece.len() < SHORT {
            self.short.extend_from_slice(&piece);
            return;
        }
        if !self.short.is_empty() {
            self.long.push(self.short.split().freeze());
        }
        self.long.push(piece);
    }

    /// All of them as one; of a single piece without a copy.
    pub(crate) fn join(mut self) -> Bytes {
        match self.long.pop() {
            None => self.short.freeze(),
            Some(only) if self.long.is_empty() && self.short.is_empty() => only,
            Some(last) => {
                let mut joined = Vec::with_capacity(self.length);
                self.long.iter().chain([&last]).for_each(|piece| joined.extend_from_slice(piece));
                joined.extend_from_slice(&self.short);
                joined.into()
            }
        }
    }
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
            Some((at, pieces)) => (*at, pieces.length as u64),
            None => (index, 0),
        };
        // So far ≤ stored length, hence no overflow.
        if at != index || frame.offset != so_far || frame.data.len() as u64 > entry.stored_len - so_far {
            return Err(Corrupt);
        }
        let mut stored = self.partial.take().map_or_else(Pieces::default, |(_, pieces)| pieces);
        stored.push(frame.data);
        if (stored.length as u64) < entry.stored_len {
            self.partial = Some((index, stored));
            return Ok(None);
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_of_any_length_are_joined_in_order_and_a_single_one_is_not_copied() {
        let piece = |length: usize, value: u8| Bytes::from(vec![value; length]);
        for lengths in [&[][..], &[0], &[1], &[SHORT], &[1, SHORT, 2, 3, SHORT + 1, 4], &[SHORT; 3]] {
            let (mut pieces, mut expected) = (Pieces::default(), Vec::new());
            for (value, &length) in lengths.iter().enumerate() {
                pieces.push(piece(length, value as u8));
                expected.extend(piece(length, value as u8));
            }
            assert!(pieces.length == expected.len() && pieces.join() == expected, "{lengths:?}");
        }
        let (mut pieces, only) = (Pieces::default(), piece(SHORT, 7));
        pieces.push(only.clone());
        assert_eq!(pieces.join().as_ptr(), only.as_ptr());
    }
}
