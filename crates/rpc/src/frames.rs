//! Frames of KV as bytes on the wire, without copies of the KV.
//!
//! A gRPC message is five bytes (a flag, and a length as `u32` big-endian), then a protobuf message. Generated code
//! copies what it sends into one buffer and what it receives into another; at KV's size each of these copies costs a
//! good part of what the network costs. Here the one large field of a frame stays where it is: it is sent behind the
//! message's other bytes, and received as a slice of what the connection read. What goes over the wire is the same
//! protobuf, and either end may be generated code.

use crate::v1::{KvFrame, PutFrame, PutResponse, Segment, kv_frame, put_frame};
use bytes::{Buf, BufMut as _, Bytes, BytesMut};
use prost::Message;
use std::collections::VecDeque;
use std::marker::PhantomData;
use tonic::Status;

/// gRPC's bytes before every message.
const HEADER: usize = 5;
/// Field numbers of what is large, in `KvFrame`, in `Segment` and in `PutFrame`.
const SEGMENT: u8 = 3;
const DATA: u8 = 6;
const SEGMENT_DATA: u8 = 3;
const PUT_DATA: u8 = 2;
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

/// A message that is sent in two pieces.
pub(crate) trait Cut: Message + Default {
    /// Everything before its KV, gRPC's own bytes included, and its KV, which ends it.
    fn cut(self) -> (Bytes, Bytes);
}

impl Cut for KvFrame {
    fn cut(self) -> (Bytes, Bytes) {
        let Self { frame: kind, .. } = self;
        let rest = Self { frame: None, ..self };
        match kind {
            Some(kv_frame::Frame::Segment(Segment { index, offset, data })) if !data.is_empty() => {
                let mut inner = Segment { index, offset, data: Bytes::new() }.encode_to_vec();
                begin(&mut inner, SEGMENT_DATA, data.len());
                let mut before = rest.encode_to_vec();
                begin(&mut before, SEGMENT, inner.len() + data.len());
                before.extend(inner);
                behind(before, data)
            }
            Some(kv_frame::Frame::Data(data)) if !data.is_empty() => {
                let mut before = rest.encode_to_vec();
                begin(&mut before, DATA, data.len());
                behind(before, data)
            }
            kind => (framed(&Self { frame: kind, ..rest }), Bytes::new()),
        }
    }
}

impl Cut for PutFrame {
    fn cut(self) -> (Bytes, Bytes) {
        match self.frame {
            Some(put_frame::Frame::Data(data)) if !data.is_empty() => {
                let mut before = Vec::new();
                begin(&mut before, PUT_DATA, data.len());
                behind(before, data)
            }
            frame => (framed(&Self { frame }), Bytes::new()),
        }
    }
}

impl Cut for PutResponse {
    fn cut(self) -> (Bytes, Bytes) {
        (framed(&self), Bytes::new())
    }
}

/// KV behind what stands before it in its message.
fn behind(mut before: Vec<u8>, kv: Bytes) -> (Bytes, Bytes) {
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

/// Makes messages of a stream's bytes, in whatever pieces these come.
#[derive(Debug)]
pub(crate) struct Reader<M> {
    pieces: Pieces,
    /// Length of the message that is coming, once its header has come.
    coming: Option<usize>,
    most: usize,
    of: PhantomData<fn() -> M>,
}

impl<M: Message + Default> Reader<M> {
    /// Refuses messages of more than `most` bytes.
    pub(crate) fn new(most: usize) -> Self {
        Self { pieces: Pieces::default(), coming: None, most, of: PhantomData }
    }

    /// More of the stream.
    pub(crate) fn push(&mut self, piece: Bytes) {
        self.pieces.push(piece);
    }

    /// Whether nothing is left of a message that has not come in full.
    pub(crate) fn is_empty(&self) -> bool {
        self.coming.is_none() && !self.pieces.has_remaining()
    }

    /// The next message, if all of it has come.
    pub(crate) fn next(&mut self) -> Result<Option<M>, Status> {
        let length = match self.coming {
            Some(length) => length,
            None if self.pieces.remaining() < HEADER => return Ok(None),
            None => {
                if self.pieces.get_u8() != 0 {
                    return Err(Status::internal("a message came compressed; none was asked for"));
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
        let message = M::decode((&mut self.pieces).take(length));
        message.map(Some).map_err(|error| Status::internal(format!("what came is no message: {error}")))
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
    use crate::v1::{MissReason, PutHead, Tier};

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
            assert_eq!(read_back(frame.clone()), frame);
        }
        let head = PutHead { bytes: 300, ..PutHead::default() };
        let puts = [put_frame::Frame::Head(head)]
            .into_iter()
            .chain([0, 1, 127, 128, 70_000].map(|length| put_frame::Frame::Data(vec![7; length].into())));
        for frame in puts.map(|frame| PutFrame { frame: Some(frame) }) {
            assert_eq!(read_back(frame.clone()), frame);
        }
    }

    fn read_back<M: Cut>(message: M) -> M {
        let (before, kv) = message.cut();
        let mut whole = BytesMut::from(&before[..]);
        whole.extend_from_slice(&kv);
        assert_eq!(whole[0], 0);
        assert_eq!(whole.get_u32_at(1) as usize, whole.len() - HEADER);
        M::decode(&whole[HEADER..]).expect("protobuf")
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
            let (mut reader, mut came) = (Reader::<KvFrame>::new(1 << 20), Vec::new());
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
        let (before, kv) = frame.cut();
        let mut reader = Reader::<KvFrame>::new(1 << 20);
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
            let mut reader = Reader::<KvFrame>::new(100);
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
