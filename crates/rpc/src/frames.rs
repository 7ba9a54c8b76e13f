//! Frames of KV as bytes on the wire, without copies of the KV.
//!
//! A gRPC message is five bytes (a flag, and a length as `u32` big-endian), then a protobuf message. Generated code
//! copies what it sends into one buffer and what it receives into another; at KV's size each of these copies costs a
//! good part of what the network costs. Here the one large field of a frame stays where it is: it is sent behind the
//! message's other bytes, and received as a slice of what the connection read. What goes over the wire is the same
//! protobuf, and either end may be generated code.

use crate::v1::{KvFrame, Segment, kv_frame};
use bytes::{Buf, BufMut as _, Bytes, BytesMut};
use prost::Message as _;
use std::collections::VecDeque;
use tonic::Status;

/// gRPC's bytes before every message.
const HEADER: usize = 5;
/// Field numbers of what is large, in `KvFrame` and in `Segment`.
const SEGMENT: u8 = 3;
const DATA: u8 = 6;
const SEGMENT_DATA: u8 = 3;
/// The wire type of fields with a length.
const LENGTH_DELIMITED: u8 = 2;

/// A message with gRPC's bytes before it.
pub(crate) fn framed(message: &impl prost::Message) -> Bytes {
    let mut bytes = BytesMut::with_capacity(HEADER + message.encoded_len());
    bytes.put_slice(&header(message.encoded_len()));
    bytes.put(&message.encode_to_vec()[..]);
    bytes.freeze()
}

fn header(length: usize) -> [u8; HEADER] {
    let [a, b, c, d] = (length as u32).to_be_bytes();
    [0, a, b, c, d]
}

/// The message cut in two: everything before its KV, gRPC's own bytes included, and its KV, which ends it.
pub(crate) fn cut(frame: KvFrame) -> (Bytes, Bytes) {
    let KvFrame { frame: kind, .. } = frame;
    let rest = KvFrame { frame: None, ..frame };
    let (mut before, kv) = match kind {
        Some(kv_frame::Frame::Segment(Segment { index, offset, data })) if !data.is_empty() => {
            let mut inner = Segment { index, offset, data: Bytes::new() }.encode_to_vec();
            begin(&mut inner, SEGMENT_DATA, data.len());
            let mut before = rest.encode_to_vec();
            begin(&mut before, SEGMENT, inner.len() + data.len());
            before.extend(inner);
            (before, data)
        }
        Some(kv_frame::Frame::Data(data)) if !data.is_empty() => {
            let mut before = rest.encode_to_vec();
            begin(&mut before, DATA, data.len());
            (before, data)
        }
        kind => (KvFrame { frame: kind, ..rest }.encode_to_vec(), Bytes::new()),
    };
    before.splice(..0, header(before.len() + kv.len()));
    (before.into(), kv)
}

/// Begins a field of so many bytes.
fn begin(message: &mut Vec<u8>, field: u8, length: usize) {
    message.push(field << 3 | LENGTH_DELIMITED);
    let mut left = length;
    while left >= 0x80 {
        message.push(left as u8 | 0x80);
        left >>= 7;
    }
    message.push(left as u8);
}

/// Makes frames of an answer's bytes, in whatever pieces these come.
#[derive(Debug)]
pub(crate) struct Reader {
    pieces: Pieces,
    /// Length of the message that is coming, once its header has come.
    coming: Option<usize>,
    most: usize,
}

impl Reader {
    /// Refuses messages of more than `most` bytes.
    pub(crate) fn new(most: usize) -> Self {
        Self { pieces: Pieces::default(), coming: None, most }
    }

    /// More of the answer.
    pub(crate) fn push(&mut self, piece: Bytes) {
        self.pieces.push(piece);
    }

    /// Whether nothing is left of a message that has not come in full.
    pub(crate) fn is_empty(&self) -> bool {
        self.coming.is_none() && !self.pieces.has_remaining()
    }

    /// The next frame, if all of it has come.
    pub(crate) fn next(&mut self) -> Result<Option<KvFrame>, Status> {
        let length = match self.coming {
            Some(length) => length,
            None if self.pieces.remaining() < HEADER => return Ok(None),
            None => {
                if self.pieces.get_u8() != 0 {
                    return Err(Status::internal("the store sent a compressed message; none was asked for"));
                }
                let length = self.pieces.get_u32() as usize;
                if length > self.most {
                    let most = self.most;
                    return Err(Status::out_of_range(format!(
                        "a message has {length} bytes, at most {most}"
                    )));
                }
                self.coming = Some(length);
                length
            }
        };
        if self.pieces.remaining() < length {
            return Ok(None);
        }
        self.coming = None;
        let frame = KvFrame::decode((&mut self.pieces).take(length));
        frame.map(Some).map_err(|error| Status::internal(format!("the store sent no frame: {error}")))
    }
}

/// Bytes that came in pieces, none of them empty.
#[derive(Debug, Default)]
struct Pieces {
    queue: VecDeque<Bytes>,
    length: usize,
}

impl Pieces {
    fn push(&mut self, piece: Bytes) {
        if !piece.is_empty() {
            self.length += piece.len();
            self.queue.push_back(piece);
        }
    }
}

impl Buf for Pieces {
    fn remaining(&self) -> usize {
        self.length
    }

    fn chunk(&self) -> &[u8] {
        self.queue.front().map_or(&[], |piece| piece)
    }

    fn advance(&mut self, count: usize) {
        assert!(count <= self.length, "no more than there is");
        self.length -= count;
        let mut left = count;
        while let Some(piece) = self.queue.front_mut().filter(|_| left > 0) {
            let step = left.min(piece.len());
            piece.advance(step);
            left -= step;
            if piece.is_empty() {
                self.queue.pop_front();
            }
        }
    }

    /// A slice where one piece has all of them.
    fn copy_to_bytes(&mut self, length: usize) -> Bytes {
        assert!(length <= self.length, "no more than there is");
        match self.queue.front_mut() {
            Some(piece) if piece.len() >= length => {
                self.length -= length;
                let bytes = piece.split_to(length);
                if piece.is_empty() {
                    self.queue.pop_front();
                }
                bytes
            }
            _ => {
                let mut bytes = BytesMut::with_capacity(length);
                bytes.put(self.take(length));
                bytes.freeze()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1::{MissReason, Tier};

    fn frames() -> Vec<KvFrame> {
        let data = |length: usize| Bytes::from((0..length).map(|at| at as u8).collect::<Vec<u8>>());
        let segment =
            |length| kv_frame::Frame::Segment(Segment { index: 300, offset: 1 << 33, data: data(length) });
        let kinds = [
            Some(kv_frame::Frame::Head(data(200))),
            Some(kv_frame::Frame::Missing(MissReason::Evicted.into())),
            Some(kv_frame::Frame::Data(data(0))),
            Some(kv_frame::Frame::Data(data(1))),
            Some(kv_frame::Frame::Data(data(20_000))),
            Some(segment(0)),
            Some(segment(127)),
            Some(segment(128)),
            Some(segment(70_000)),
            None,
        ];
        let frame = |frame| KvFrame { chunk: 3, frame, tier: Tier::StoreRam.into(), generation: 1 << 40 };
        kinds.into_iter().map(frame).collect()
    }

    #[test]
    fn what_is_cut_is_the_message_that_generated_code_reads() {
        for frame in frames() {
            let (before, kv) = cut(frame.clone());
            let mut whole = BytesMut::from(&before[..]);
            whole.extend_from_slice(&kv);
            assert_eq!(whole[0], 0);
            assert_eq!(whole.get_u32_at(1) as usize, whole.len() - HEADER);
            assert_eq!(KvFrame::decode(&whole[HEADER..]).expect("protobuf"), frame);
        }
    }

    trait At {
        fn get_u32_at(&self, at: usize) -> u32;
    }

    impl At for BytesMut {
        fn get_u32_at(&self, at: usize) -> u32 {
            (&self[at..]).get_u32()
        }
    }

    #[test]
    fn frames_come_back_from_pieces_of_any_length() {
        let sent: Vec<u8> = frames().iter().flat_map(|frame| framed(frame).to_vec()).collect();
        for step in [1, 2, 5, 6, 1000, sent.len()] {
            let (mut reader, mut came) = (Reader::new(1 << 20), Vec::new());
            for piece in sent.chunks(step) {
                reader.push(Bytes::copy_from_slice(piece));
                while let Some(frame) = reader.next().expect("sound bytes") {
                    came.push(frame);
                }
            }
            assert!(reader.is_empty() && came == frames(), "in steps of {step}");
        }
    }

    #[test]
    fn kv_that_came_in_one_piece_is_not_copied() {
        let frame = frames().swap_remove(8);
        let (before, kv) = cut(frame);
        let mut reader = Reader::new(1 << 20);
        reader.push(before);
        assert!(reader.next().expect("sound bytes").is_none() && !reader.is_empty());
        let place = kv.as_ptr();
        reader.push(kv);
        let came = reader.next().expect("sound bytes").and_then(|frame| frame.frame);
        let Some(kv_frame::Frame::Segment(segment)) = came else { panic!("not a segment") };
        assert_eq!(segment.data.as_ptr(), place);
    }

    #[test]
    fn what_is_too_long_compressed_or_no_protobuf_is_refused() {
        let refused = |bytes: &'static [u8]| {
            let mut reader = Reader::new(100);
            reader.push(Bytes::from_static(bytes));
            reader.next().expect_err("refused").code()
        };
        assert_eq!(refused(&[0, 0, 0, 0, 101]), tonic::Code::OutOfRange);
        assert_eq!(refused(&[1, 0, 0, 0, 0]), tonic::Code::Internal);
        assert_eq!(refused(&[0, 0, 0, 0, 1, 0xff]), tonic::Code::Internal);
        // A segment that says it is longer than its message.
        assert_eq!(refused(&[0, 0, 0, 0, 2, 0x1a, 50]), tonic::Code::Internal);
    }
}
