//! For fuzzing: decoders that cannot be reached from outside.

use crate::frames::Reader;
use crate::v1::KvFrame;
use bytes::Bytes;

/// The frames of an answer's bytes up to the first that is none, in pieces of this length; longer messages than `most`
/// bytes are refused.
pub fn frames(bytes: &[u8], piece: usize, most: usize) -> Vec<KvFrame> {
    let (mut reader, mut came) = (Reader::new(most), Vec::new());
    for piece in bytes.chunks(piece.max(1)) {
        reader.push(Bytes::copy_from_slice(piece));
        loop {
            match reader.next() {
                Ok(Some(frame)) => came.push(frame),
                Ok(None) => break,
                Err(_) => return came,
            }
        }
    }
    came
}
