//! How a segment's bytes are stored.

use super::planes::{join, split};
use std::cell::RefCell;

/// How a writer stores segments. A segment that this would shrink by less than 5 % is stored raw: reading it
/// then costs a copy instead of a decompression.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Codec {
    /// As they are: the fastest to load over links of more than some 2 Gbit/s for each core that decodes.
    #[default]
    Raw,
    /// Split into byte planes (all first bytes, all second bytes, …), then zstd: exponents compress, mantissas
    /// hardly do, and mixed they hide each other.
    BytePlaneZstd {
        /// zstd's level, 1 to 19. Above 1 little is gained on KV.
        level: i32,
    },
}

impl Codec {
    /// What compresses KV at the least cost: for slow links and small disks.
    pub const COMPRESSED: Self = Self::BytePlaneZstd { level: 1 };
}

/// How one segment is stored: the table's codec field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum StoredAs {
    /// As it is.
    Raw = 0,
    /// Byte planes, then zstd.
    BytePlaneZstd = 1,
}

impl StoredAs {
    pub(crate) fn from_code(code: u16) -> Option<Self> {
        [Self::Raw, Self::BytePlaneZstd].into_iter().find(|codec| *codec as u16 == code)
    }
}

/// Compresses segments of one container, reusing its working memory.
pub(super) struct Compressor {
    zstd: Option<zstd::bulk::Compressor<'static>>,
}

impl Compressor {
    pub(super) fn new(codec: Codec) -> Option<Self> {
        let zstd = match codec {
            Codec::Raw => None,
            Codec::BytePlaneZstd { level } if (1..=19).contains(&level) => {
                Some(zstd::bulk::Compressor::new(level).ok()?)
            }
            Codec::BytePlaneZstd { .. } => return None,
        };
        Some(Self { zstd })
    }

    /// The compressed form of `raw`, elements of `size` bytes, where it is worth it.
    pub(super) fn shrink(&mut self, raw: &[u8], size: usize) -> Option<Vec<u8>> {
        let packed = self.zstd.as_mut()?.compress(&split(raw, size)).ok()?;
        // packed ≤ 0.95 raw, in integers.
        (packed.len() as u64 * 20 <= raw.len() as u64 * 19).then_some(packed)
    }
}

/// Undoes `codec`; `raw_len` comes from a checked table and bounds what is allocated. None where the bytes do
/// not decode to exactly that length.
pub(super) fn expand(codec: StoredAs, stored: &[u8], raw_len: usize, size: usize) -> Option<Vec<u8>> {
    thread_local! {
        // A decompressor's context is some 100 KiB: one per thread, not one per segment.
        static ZSTD: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
    }
    match codec {
        StoredAs::Raw => (stored.len() == raw_len).then(|| stored.to_vec()),
        StoredAs::BytePlaneZstd => {
            let planes = ZSTD.with_borrow_mut(|slot| {
                if slot.is_none() {
                    *slot = zstd::bulk::Decompressor::new().ok();
                }
                let mut planes = Vec::with_capacity(raw_len);
                slot.as_mut()?.decompress_to_buffer(stored, &mut planes).ok()?;
                Some(planes)
            })?;
            if planes.len() != raw_len {
                return None;
            }
            Some(if size == 1 { planes } else { join(&planes, size) })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_that_do_not_shrink_are_left_raw() {
        let mut state = 1u32;
        let noise: Vec<u8> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        })
        .take(4096)
        .collect();
        let mut compressor = Compressor::new(Codec::COMPRESSED).unwrap();
        assert_eq!(compressor.shrink(&noise, 4), None);
        assert!(compressor.shrink(&[0; 4096], 4).is_some());
        assert!(Compressor::new(Codec::Raw).unwrap().shrink(&[0; 4096], 4).is_none());
    }

    #[test]
    fn a_longer_content_than_announced_is_refused() {
        let packed = Compressor::new(Codec::COMPRESSED).unwrap().shrink(&[0; 4096], 1).unwrap();
        assert_eq!(expand(StoredAs::BytePlaneZstd, &packed, 4096, 1).unwrap(), [0; 4096]);
        assert_eq!(expand(StoredAs::BytePlaneZstd, &packed, 4095, 1), None);
        assert_eq!(expand(StoredAs::BytePlaneZstd, &packed, 4097, 1), None);
        assert_eq!(expand(StoredAs::Raw, &packed, 4096, 1), None);
    }
}
