//! How keys are made: the specification, in bytes, and the one implementation.
//!
//! `KEY_SPEC` is 1. Any change of what follows raises it, and with it every layout id: keys of two versions
//! never meet. Golden vectors for other implementations are in `tests/golden/keys.json`.
//!
//! **Framing.** `frame(x) = u64le(length of x in bytes) ‖ x`. An id is a 32-byte blake3 digest over the frames
//! of its fields in the order given. `u32`, `u64` and `f64` (IEEE 754 bits) are little-endian; token ids are a
//! sequence of `u32` without a count (the frame has the length); text is UTF-8; absent = the empty field.
//!
//! | id | blake3 mode | fields |
//! | --- | --- | --- |
//! | layout | derive-key, context `cacheclip.v1 layout id` | key spec `u32`; weights digest (32); adapter digest (32 or absent); tokenizer digest (32); RoPE theta `f64`; RoPE scaling (absent, or `llama3` ‖ factor `f64` ‖ low-frequency factor `f64` ‖ high-frequency factor `f64` ‖ original maximal position `u32`); layers `u32`; KV heads `u32`; head dimension `u32`; dtype name |
//! | anchor | derive-key, context `cacheclip.v1 anchor id` | layout (32); token ids |
//! | chunk key | derive-key, context `cacheclip.v1 chunk key` | layout (32); anchor (32); scope (32); token ids |
//! | auxiliary chunk key | derive-key, context `cacheclip.v1 auxiliary chunk key` | auxiliary layout (32); auxiliary anchor (32); text digest (32) |
//! | scope | keyed, by the secret (32) | `cacheclip.v1 scope id`; key id `u32`; `tenant` or `corpus`; name; salt |
//! | document | derive-key, context `cacheclip.v1 document id` | scope of the tenant that brought it (32); name |
//! | text digest | derive-key, context `cacheclip.v1 text digest` | scope (32); text |

use crate::ids::{AnchorId, ChunkKey, DocumentId, LayoutId, ScopeId};

/// Version of the specification above; part of every layout id.
pub const KEY_SPEC: u32 = 1;

/// blake3 over length-framed fields.
pub(crate) struct Framed(blake3::Hasher);

impl Framed {
    pub(crate) fn derive(context: &'static str) -> Self {
        Self(blake3::Hasher::new_derive_key(context))
    }

    pub(crate) fn keyed(key: &[u8; 32]) -> Self {
        Self(blake3::Hasher::new_keyed(key))
    }

    pub(crate) fn field(&mut self, bytes: &[u8]) {
        self.0.update(&(bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
    }

    fn tokens(&mut self, ids: &[u32]) {
        let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        self.field(&bytes);
    }

    pub(crate) fn finish(self) -> [u8; 32] {
        *self.0.finalize().as_bytes()
    }
}

impl AnchorId {
    /// The anchor of these token ids under a layout.
    pub fn new(layout: &LayoutId, ids: &[u32]) -> Self {
        let mut framed = Framed::derive("cacheclip.v1 anchor id");
        framed.field(layout.as_bytes());
        framed.tokens(ids);
        Self::from_bytes(framed.finish())
    }
}

impl ChunkKey {
    /// The key of a chunk's canonical KV: these token ids, encoded behind `anchor`, shared within `scope`.
    pub fn new(layout: &LayoutId, anchor: &AnchorId, scope: &ScopeId, ids: &[u32]) -> Self {
        let mut framed = Framed::derive("cacheclip.v1 chunk key");
        framed.field(layout.as_bytes());
        framed.field(anchor.as_bytes());
        framed.field(scope.as_bytes());
        framed.tokens(ids);
        Self::from_bytes(framed.finish())
    }

    /// The key of a chunk's auxiliary KV. The scorer knows a chunk by its text digest, which holds the scope, and
    /// must find the KV before it has the text, so the digest stands for scope and token ids.
    pub fn auxiliary(layout: &LayoutId, anchor: &AnchorId, digest: &[u8; 32]) -> Self {
        let mut framed = Framed::derive("cacheclip.v1 auxiliary chunk key");
        framed.field(layout.as_bytes());
        framed.field(anchor.as_bytes());
        framed.field(digest);
        Self::from_bytes(framed.finish())
    }
}

impl DocumentId {
    /// The document that a tenant calls so. `scope` is the tenant's, salt included, whosever its chunks are: who
    /// brought a document is who may delete it.
    pub fn new(scope: &ScopeId, name: &str) -> Self {
        let mut framed = Framed::derive("cacheclip.v1 document id");
        framed.field(scope.as_bytes());
        framed.field(name.as_bytes());
        Self::from_bytes(framed.finish())
    }
}

/// The scorer's name for a chunk's text. It depends on the scope, so that asking for a digest tells nobody
/// whether another scope holds the same text.
pub fn text_digest(scope: &ScopeId, text: &str) -> [u8; 32] {
    let mut framed = Framed::derive("cacheclip.v1 text digest");
    framed.field(scope.as_bytes());
    framed.field(text.as_bytes());
    framed.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_of_a_key_changes_it() {
        let layout = LayoutId::from_bytes([1; 32]);
        let anchor = AnchorId::new(&layout, &[1, 2]);
        let scope = ScopeId::from_bytes([3; 32]);
        let keys = [
            ChunkKey::new(&layout, &anchor, &scope, &[1, 2, 3]),
            ChunkKey::new(&LayoutId::from_bytes([2; 32]), &anchor, &scope, &[1, 2, 3]),
            ChunkKey::new(&layout, &AnchorId::new(&layout, &[1]), &scope, &[1, 2, 3]),
            ChunkKey::new(&layout, &anchor, &ScopeId::from_bytes([4; 32]), &[1, 2, 3]),
            ChunkKey::new(&layout, &anchor, &scope, &[1, 2]),
            ChunkKey::new(&layout, &anchor, &scope, &[2, 1, 3]),
            ChunkKey::new(&layout, &anchor, &scope, &[]),
        ];
        let distinct: std::collections::HashSet<_> = keys.iter().collect();
        assert_eq!(distinct.len(), keys.len());
    }

    #[test]
    fn kinds_of_id_never_meet() {
        let layout = LayoutId::from_bytes([1; 32]);
        let scope = ScopeId::from_bytes([1; 32]);
        // The same fields, framed alike: only the context differs.
        assert_ne!(*AnchorId::new(&layout, &[]).as_bytes(), text_digest(&scope, ""));
        assert_ne!(*DocumentId::new(&scope, "").as_bytes(), text_digest(&scope, ""));
        let anchor = AnchorId::new(&layout, &[]);
        let primary = ChunkKey::new(&layout, &anchor, &scope, &[]);
        assert_ne!(ChunkKey::auxiliary(&layout, &anchor, scope.as_bytes()), primary);
    }

    #[test]
    fn an_auxiliary_key_is_the_one_that_was_published() {
        let layout = LayoutId::from_bytes([0x11; 32]);
        let anchor = AnchorId::from_bytes([0x22; 32]);
        let key = ChunkKey::auxiliary(&layout, &anchor, &std::array::from_fn(|i| i as u8));
        // Made by another implementation of blake3 from the table above.
        assert_eq!(key.to_string(), "fc16a50c149251144ea6865759ea96e39104b40c49919132a83502be24befcbc");
        for other in [
            ChunkKey::auxiliary(
                &LayoutId::from_bytes([0x12; 32]),
                &anchor,
                &std::array::from_fn(|i| i as u8),
            ),
            ChunkKey::auxiliary(
                &layout,
                &AnchorId::from_bytes([0x23; 32]),
                &std::array::from_fn(|i| i as u8),
            ),
            ChunkKey::auxiliary(&layout, &anchor, &[0; 32]),
        ] {
            assert_ne!(other, key);
        }
    }
}
