//! The 32-byte names of things, one type per kind of thing.

use std::fmt;
use std::str::FromStr;

/// Bytes or text that are not an id; says which id was wanted and what came instead.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// Wrong number of bytes.
    #[error("{id} must be 32 bytes, got {len}")]
    Length {
        /// The type that was wanted.
        id: &'static str,
        /// How many bytes came.
        len: usize,
    },
    /// Text that is not 64 hexadecimal digits.
    #[error("{id} must be 64 hexadecimal digits, got {len} characters{}", if *len == 64 { ", some of them not hexadecimal" } else { "" })]
    Hex {
        /// The type that was wanted.
        id: &'static str,
        /// How many characters came.
        len: usize,
    },
}

fn hex_digit(byte: u8) -> Option<u8> {
    char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok())
}

fn from_hex(text: &str) -> Option<[u8; 32]> {
    let text = text.as_bytes();
    if text.len() != 64 {
        return None;
    }
    let mut out = [0; 32];
    for (byte, pair) in out.iter_mut().zip(text.chunks_exact(2)) {
        *byte = hex_digit(pair[0])? << 4 | hex_digit(pair[1])?;
    }
    Some(out)
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; 32]);

        impl $name {
            /// The id with exactly these bytes; to make a new one, see [`crate::keys`].
            pub const fn from_bytes(bytes: [u8; 32]) -> Self {
                Self(bytes)
            }

            /// The 32 bytes, as they go on the wire.
            pub const fn as_bytes(&self) -> &[u8; 32] {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let [a, b, c, d, ..] = self.0;
                write!(f, concat!(stringify!($name), "({:02x}{:02x}{:02x}{:02x})"), a, b, c, d)
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                let len = text.chars().count();
                from_hex(text).map(Self).ok_or(IdError::Hex { id: stringify!($name), len })
            }
        }

        impl TryFrom<&[u8]> for $name {
            type Error = IdError;

            fn try_from(bytes: &[u8]) -> Result<Self, IdError> {
                bytes
                    .try_into()
                    .map(Self)
                    .map_err(|_| IdError::Length { id: stringify!($name), len: bytes.len() })
            }
        }
    };
}

id! {
    /// Identity of a KV encoding: KV may only be exchanged between processes with one and the same layout.
    LayoutId
}
id! {
    /// Identity of the fixed text that chunks are encoded behind, under one layout.
    AnchorId
}
id! {
    /// Whose chunks may be shared with whom: a tenant's, or those of a named corpus.
    ScopeId
}
id! {
    /// Name of one chunk's canonical KV.
    ChunkKey
}
id! {
    /// Name of a document as stores know it; derived from who brought it, so that no two callers' are one.
    DocumentId
}
id! {
    /// blake3 of a container's header and segment table, and through its digests of the whole container.
    ContainerHash
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_back_gives_the_same_id() {
        let id = ChunkKey::from_bytes(std::array::from_fn(|i| i as u8 * 7));
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_eq!(id.to_string().to_uppercase().parse(), Ok(id));
        assert_eq!(ChunkKey::try_from(&id.as_bytes()[..]), Ok(id));
        assert_eq!(format!("{id:?}"), "ChunkKey(00070e15)");
    }

    #[test]
    fn errors_name_the_id_and_the_length() {
        let error = LayoutId::try_from(&[0u8; 31][..]).unwrap_err();
        assert_eq!(error.to_string(), "LayoutId must be 32 bytes, got 31");
        let error = "zz".parse::<ScopeId>().unwrap_err();
        assert_eq!(error.to_string(), "ScopeId must be 64 hexadecimal digits, got 2 characters");
        assert!("é".repeat(32).parse::<ScopeId>().is_err());
        assert!("+1".repeat(32).parse::<ScopeId>().is_err());
    }
}
