//! Ids, keys, spans, the KV container and its codecs: no I/O, no async, no tensors.
//!
//! Everything that two processes must agree on byte for byte is here, so that it can be tested without either:
//!
//! - [`keys`]: how a chunk's key is made from its layout, anchor, scope and token ids (with the exact byte
//!   layout, for implementations in other languages);
//! - [`container`]: the file and wire form of one chunk's KV, verified segment by segment;
//! - [`ids`]: the 32-byte names that result, as types that cannot be mixed up.

pub mod container;
pub mod ids;
pub mod keys;
pub mod layout;
pub mod scope;

pub use container::codec::Codec;
pub use container::encode::{Parts, Rank, encode, encode_with_ids};
pub use container::head::{Head, SegmentEntry, SegmentKind};
pub use container::{Container, FormatError};
pub use ids::{AnchorId, ChunkKey, ContainerHash, DocumentId, IdError, LayoutId, ScopeId};
pub use keys::{KEY_SPEC, text_digest};
pub use layout::{Dtype, KvShape, LayoutSpec, Llama3Scaling, RopeSpec, UnknownDtype};
pub use scope::{Scope, ScopeSecret};

/// Half-open range of bytes inside one chunk's text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSpan {
    /// First byte.
    pub start: u32,
    /// One past the last byte.
    pub end: u32,
}
