//! Why bytes are not a container.

/// Bytes that are not a (whole, undamaged) container, or parts that cannot become one.
///
/// Whoever reads such bytes should treat the chunk as missing and make its KV anew; only [`FormatError::Version`]
/// may mean that another release could read them.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The bytes end before the head does.
    #[error("container is cut off: its head needs {need} bytes, there are {have}")]
    Truncated {
        /// Bytes the head needs.
        need: u64,
        /// Bytes there are.
        have: u64,
    },
    /// The bytes do not start as a container does.
    #[error("not a KV container: it does not start with the magic")]
    Magic,
    /// Written by another release.
    #[error(
        "container has format version {found}, this release reads 1: leave it to the release that wrote it"
    )]
    Version {
        /// The version in the header.
        found: u16,
    },
    /// A field of the header or of the table is beyond its limit or contradicts the others.
    #[error("container's {field} is {value}, expected {expected}")]
    Field {
        /// Name of the field.
        field: &'static str,
        /// What it holds.
        value: u64,
        /// What it may hold.
        expected: &'static str,
    },
    /// The head does not match its own check.
    #[error("container's head is damaged: its check does not match")]
    Head,
    /// More or fewer bytes than the head says.
    #[error("container should have {expected} bytes, there are {found}")]
    Length {
        /// What the head says.
        expected: u64,
        /// Bytes there are.
        found: u64,
    },
    /// A segment's stored bytes are not those the table names.
    #[error("segment {index} is damaged: it has another length or digest than its table entry")]
    Segment {
        /// Index into the segment table.
        index: usize,
    },
    /// A segment is what its writer wrote, but it does not decode.
    #[error("segment {index} does not decode: {what}")]
    Content {
        /// Index into the segment table.
        index: usize,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The container has no such segment.
    #[error("container has no segment {index}")]
    NoSegment {
        /// What was asked for.
        index: usize,
    },
    /// The container has no such layer.
    #[error("container has {layers} layers, layer {layer} was asked for")]
    NoLayer {
        /// What was asked for.
        layer: u32,
        /// What there is.
        layers: u32,
    },
    /// Bytes between segments that are not zero.
    #[error("container's padding is damaged at byte {offset}")]
    Padding {
        /// Where.
        offset: u64,
    },
    /// Parts that contradict each other.
    #[error("cannot encode: {field} has length {found}, expected {expected}")]
    Parts {
        /// Which part.
        field: &'static str,
        /// Its length.
        found: u64,
        /// What the other parts ask for.
        expected: u64,
    },
    /// The compressor failed, or was given a level it does not have.
    #[error("cannot encode: zstd failed at level {level}; use a level from 1 to 19")]
    Compressor {
        /// The level asked for.
        level: i32,
    },
}
