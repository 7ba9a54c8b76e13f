//! Checks a container while it comes.
//!
//! What is stored as it is needs no more than its digest, which is made of the frames themselves. Of what is compressed
//! one segment is held at a time, to see that it decodes.

use crate::upload::{Announced, Failed};
use bytes::BytesMut;
use cacheclip_chunk::container::codec::StoredAs;
use cacheclip_chunk::container::head::{HEADER_LEN, SegmentDigest};
use cacheclip_chunk::container::parse_spans;
use cacheclip_chunk::{FormatError, Head, SegmentEntry, SegmentKind};

/// Checks one container.
pub(crate) struct Verifier {
    announced: Announced,
    head: Option<Head>,
    /// The segment that comes next.
    index: usize,
    digest: SegmentDigest,
    /// What came of a head, or of a segment that is to be decoded.
    held: BytesMut,
    /// Bytes that came.
    at: u64,
}

/// Whether a segment is good when its digest is.
fn is_plain(entry: &SegmentEntry) -> bool {
    entry.codec == StoredAs::Raw && entry.kind != SegmentKind::Spans
}

impl Verifier {
    pub(crate) fn new(announced: Announced) -> Self {
        let (digest, held) = (SegmentDigest::default(), BytesMut::new());
        Self { announced, head: None, index: 0, digest, held, at: 0 }
    }

    /// Whether so many bytes may come next.
    pub(crate) fn expects(&self, more: usize) -> Result<(), Failed> {
        let received = self.at + more as u64;
        if received > self.announced.bytes {
            let why = format!("{received} bytes came, {} were announced", self.announced.bytes);
            return Err(Failed::Invalid("data", why));
        }
        Ok(())
    }

    /// Checks what comes next.
    pub(crate) fn push(&mut self, frame: &[u8]) -> Result<(), Failed> {
        self.expects(frame.len())?;
        let mut left = frame;
        while !left.is_empty() {
            let step = match self.head {
                Some(_) => self.take_segment(left)?,
                None => self.take_head(left)?,
            };
            left = &left[step..];
            self.at += step as u64;
        }
        Ok(())
    }

    /// Takes from the front what belongs to the head; how much.
    fn take_head(&mut self, bytes: &[u8]) -> Result<usize, Failed> {
        let whole = match self.held.len() < HEADER_LEN {
            true => HEADER_LEN,
            false => Head::len_from_prefix(&self.held).map_err(Failed::Damaged)?,
        };
        let step = bytes.len().min(whole - self.held.len());
        self.held.extend_from_slice(&bytes[..step]);
        if self.held.len() >= HEADER_LEN
            && self.held.len() == Head::len_from_prefix(&self.held).map_err(Failed::Damaged)?
        {
            self.head = Some(self.checked_head()?);
            self.held.clear();
        }
        Ok(step)
    }

    fn checked_head(&self) -> Result<Head, Failed> {
        let head = Head::parse(&self.held).map_err(Failed::Damaged)?;
        let Announced { layout, key, bytes } = self.announced;
        if head.key() != key {
            return Err(Failed::Invalid("head.key", format!("the container holds {}", head.key())));
        }
        if head.layout() != layout {
            return Err(Failed::Invalid("head.layout", format!("the container holds {}", head.layout())));
        }
        if head.container_len() != bytes {
            let why = format!("the container has {} bytes", head.container_len());
            return Err(Failed::Invalid("head.bytes", why));
        }
        Ok(head)
    }

    /// Takes from the front what belongs to the next segment or stands before it; how much.
    fn take_segment(&mut self, bytes: &[u8]) -> Result<usize, Failed> {
        let Some(head) = &self.head else { return Ok(0) };
        // No more comes than was announced, and with the last segment all of that has come.
        let Some(entry) = head.segments().get(self.index) else { return Ok(bytes.len()) };
        if self.at < entry.offset {
            let step = (entry.offset - self.at).min(bytes.len() as u64) as usize;
            return match bytes[..step].iter().position(|&byte| byte != 0) {
                Some(at) => Err(Failed::Damaged(FormatError::Padding { offset: self.at + at as u64 })),
                None => Ok(step),
            };
        }
        let end = entry.offset + entry.stored_len;
        let step = (end - self.at).min(bytes.len() as u64) as usize;
        let (part, over) = (&bytes[..step], self.at + step as u64 == end);
        if is_plain(entry) {
            self.digest.update(part);
            if over {
                std::mem::take(&mut self.digest).check(head, self.index).map_err(Failed::Damaged)?;
            }
        } else {
            self.held.extend_from_slice(part);
            if over {
                let raw = head.decode_segment(self.index, &self.held).map_err(Failed::Damaged)?;
                if entry.kind == SegmentKind::Spans {
                    parse_spans(self.index, &raw).map_err(Failed::Damaged)?;
                }
                self.held.clear();
            }
        }
        self.index += usize::from(over);
        Ok(step)
    }

    /// The container's head, once all of it has come.
    pub(crate) fn finish(self) -> Result<Head, Failed> {
        let (expected, found) = (self.announced.bytes, self.at);
        match self.head {
            Some(head) if self.index == head.segments().len() => Ok(head),
            // A writer that went away is no damage.
            _ => Err(Failed::Invalid("data", FormatError::Length { expected, found }.to_string())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cacheclip_chunk::{
        ByteSpan, ChunkKey, Codec, Container, Dtype, KvShape, LayoutId, Parts, Rank, encode,
    };

    /// Two layers, one of which shrinks, with everything that may come behind them.
    fn container() -> (Announced, Vec<u8>) {
        let shape = KvShape { layers: 2, kv_heads: 2, head_dim: 32 };
        let (layout, key, tokens) = (LayoutId::from_bytes([1; 32]), ChunkKey::from_bytes([2; 32]), 40);
        let length = shape.layer_bytes(tokens, Dtype::F16) as usize;
        let mut state = 1u32;
        let noise = std::iter::repeat_with(|| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        });
        let layers: [Vec<u8>; 2] = [noise.take(length).collect(), vec![3; length]];
        let spans: Vec<_> = (0..tokens).map(|at| ByteSpan { start: at, end: at + 1 }).collect();
        let parts = Parts {
            layout,
            key,
            shape,
            tokens,
            dtype: Dtype::F16,
            layers: layers.iter().map(Vec::as_slice).collect(),
            spans: Some(&spans),
            rank: Some(Rank { version: 1, ranks: &[9; 40] }),
        };
        let bytes = encode(&parts, Codec::COMPRESSED).unwrap();
        (Announced { layout, key, bytes: bytes.len() as u64 }, bytes)
    }

    fn verify(announced: Announced, bytes: &[u8], step: usize) -> Result<Head, Failed> {
        let mut verifier = Verifier::new(announced);
        bytes.chunks(step).try_for_each(|frame| verifier.push(frame))?;
        verifier.finish()
    }

    #[test]
    fn a_container_is_taken_in_frames_of_any_length() {
        let (announced, bytes) = container();
        let expected = Container::parse(bytes.clone().into()).unwrap();
        let codecs: Vec<_> = expected.head().segments().iter().map(|entry| entry.codec).collect();
        assert_eq!(codecs[..2], [StoredAs::Raw, StoredAs::BytePlaneZstd]);
        for step in [1, 7, 127, 128, 129, 4096, 5000, bytes.len()] {
            assert_eq!(
                verify(announced, &bytes, step).unwrap().hash(),
                expected.hash(),
                "in steps of {step}"
            );
        }
    }

    #[test]
    fn whichever_byte_is_changed_or_lacks_it_is_refused() {
        let (announced, bytes) = container();
        for at in (0..bytes.len()).step_by(61).chain([bytes.len() - 1]) {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x10;
            assert!(verify(announced, &damaged, 1000).is_err(), "byte {at} was changed");
            assert!(verify(announced, &bytes[..at], 1000).is_err(), "only {at} bytes came");
        }
        assert!(verify(announced, &[&bytes[..], &[0]].concat(), 1000).is_err(), "one byte too many");
    }
}
