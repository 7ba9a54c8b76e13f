//! Bytes of segments in memory, whoever holds them: the RAM tier, a request that reads, the transport that sends.

use bytes::Bytes;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// How many there are. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Held(Arc<AtomicU64>);

impl Held {
    /// The same bytes, counted until the last slice of them is gone.
    pub(crate) fn count(&self, bytes: Bytes) -> Bytes {
        self.0.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Bytes::from_owner(Counted { bytes, held: self.clone() })
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

struct Counted {
    bytes: Bytes,
    held: Held,
}

impl AsRef<[u8]> for Counted {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.held.0.fetch_sub(self.bytes.len() as u64, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_count_until_the_last_slice_of_them_is_gone() {
        let held = Held::default();
        let bytes = held.count(Bytes::from_static(b"some bytes"));
        assert_eq!(bytes, "some bytes");
        let slice = bytes.slice(2..3);
        drop(bytes);
        assert_eq!(held.bytes(), 10);
        drop(slice);
        assert_eq!(held.bytes(), 0);
    }
}
