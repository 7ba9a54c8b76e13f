//! Between protocol messages and the types of `cacheclip-chunk`; what does not fit names its field.

use crate::status::invalid;
use crate::v1::{self, MissReason, Tier};
use bytes::Bytes;
use cacheclip_chunk::{ByteSpan, IdError};
use tonic::Status;

/// An id from the bytes of a field: `id::<ChunkKey>("keys[3]", &bytes)`.
///
/// # Errors
/// INVALID_ARGUMENT naming the field when the length is wrong.
pub fn id<'a, T: TryFrom<&'a [u8], Error = IdError>>(field: &str, bytes: &'a [u8]) -> Result<T, Status> {
    T::try_from(bytes).map_err(|error| invalid(field, error))
}

/// An id's bytes as a message carries them.
pub fn id_bytes(id: &[u8; 32]) -> Bytes {
    Bytes::copy_from_slice(id)
}

/// Spans as a [`v1::TokenSection`] carries them: start and end in turn.
pub fn flat_spans(spans: &[ByteSpan]) -> Vec<u32> {
    spans.iter().flat_map(|span| [span.start, span.end]).collect()
}

/// The spans of a [`v1::TokenSection`], one per token and none running backwards.
///
/// # Errors
/// INVALID_ARGUMENT naming the field.
pub fn spans(field: &str, flat: &[u32], tokens: usize) -> Result<Vec<ByteSpan>, Status> {
    if flat.len() != tokens.saturating_mul(2) {
        return Err(invalid(field, format_args!("has {} numbers for {tokens} tokens; two each", flat.len())));
    }
    let spans: Vec<_> = flat.chunks_exact(2).map(|pair| ByteSpan { start: pair[0], end: pair[1] }).collect();
    match spans.iter().position(|span| span.start > span.end) {
        Some(at) => Err(invalid(field, format_args!("span {at} runs backwards"))),
        None => Ok(spans),
    }
}

impl From<ByteSpan> for v1::ByteSpan {
    fn from(span: ByteSpan) -> Self {
        Self { start: span.start, end: span.end }
    }
}

impl From<v1::ByteSpan> for ByteSpan {
    fn from(span: v1::ByteSpan) -> Self {
        Self { start: span.start, end: span.end }
    }
}

impl Tier {
    /// The name in metrics and logs.
    pub fn label(self) -> &'static str {
        match self {
            Self::Unspecified => "unspecified",
            Self::WorkerRam => "worker_ram",
            Self::StoreRam => "store_ram",
            Self::StoreDisk => "store_disk",
            Self::StoreBucket => "store_bucket",
            Self::ScorerRam => "scorer_ram",
            Self::Computed => "computed",
        }
    }
}

impl MissReason {
    /// The name in metrics and logs.
    pub fn label(self) -> &'static str {
        match self {
            Self::Unspecified => "unspecified",
            Self::NeverSeen => "never_seen",
            Self::Evicted => "evicted",
            Self::Layout => "layout",
            Self::Corrupt => "corrupt",
            Self::Timeout => "timeout",
            Self::Unavailable => "unavailable",
            Self::Deleted => "deleted",
            Self::Cost => "cost",
            Self::Expired => "expired",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cacheclip_chunk::ChunkKey;

    #[test]
    fn a_short_id_is_refused_by_the_name_of_its_field() {
        let key: ChunkKey = id("keys[3]", &[7; 32]).expect("a key");
        assert_eq!(id_bytes(key.as_bytes())[..], [7; 32]);
        let status = id::<ChunkKey>("keys[3]", &[7; 31]).expect_err("too short");
        assert!(status.message().starts_with("keys[3]: "), "{status}");
    }

    #[test]
    fn spans_survive_the_wire_and_bad_ones_do_not() {
        let list = [ByteSpan { start: 0, end: 0 }, ByteSpan { start: 0, end: 4 }];
        assert_eq!(spans("spans", &flat_spans(&list), 2).expect("spans"), list);
        for (flat, tokens) in [(&[0, 1][..], 2), (&[0, 1, 2][..], 1), (&[4, 1][..], 1)] {
            assert!(spans("chunks[0].spans", flat, tokens).is_err(), "{flat:?} for {tokens}");
        }
    }

    #[test]
    fn labels_are_the_protocols_names() {
        for value in 0..=6 {
            let tier = Tier::try_from(value).expect("a tier");
            assert_eq!(tier.as_str_name(), format!("TIER_{}", tier.label().to_uppercase()));
        }
        for value in 0..=9 {
            let reason = MissReason::try_from(value).expect("a reason");
            assert_eq!(reason.as_str_name(), format!("MISS_REASON_{}", reason.label().to_uppercase()));
        }
    }
}
