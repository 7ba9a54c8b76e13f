//! Scopes: whose chunks may be shared with whom.

use crate::ids::ScopeId;
use crate::keys::Framed;
use std::fmt;

/// Who a scope belongs to. The two kinds never meet, whatever their names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope<'a> {
    /// One tenant alone, by the name its credentials prove.
    Tenant(&'a str),
    /// Everybody who may read this shared corpus.
    Corpus(&'a str),
}

/// The secret that scopes are derived with, so that knowing a tenant's name is not enough to name its chunks.
#[derive(Clone)]
pub struct ScopeSecret {
    key_id: u32,
    key: [u8; 32],
}

impl ScopeSecret {
    /// A secret of 32 random bytes; `key_id` tells it from its predecessor while keys are rotated.
    pub const fn new(key_id: u32, key: [u8; 32]) -> Self {
        Self { key_id, key }
    }

    /// Which of the secrets in rotation this is.
    pub const fn key_id(&self) -> u32 {
        self.key_id
    }

    /// The scope of a tenant or corpus. A salt (empty for none) comes from the caller and can only narrow: it
    /// splits a scope the caller has, it never leads into another.
    pub fn scope(&self, kind: Scope<'_>, salt: &str) -> ScopeId {
        let (kind, name) = match kind {
            Scope::Tenant(name) => ("tenant", name),
            Scope::Corpus(name) => ("corpus", name),
        };
        let mut framed = Framed::keyed(&self.key);
        framed.field(b"cacheclip.v1 scope id");
        framed.field(&self.key_id.to_le_bytes());
        framed.field(kind.as_bytes());
        framed.field(name.as_bytes());
        framed.field(salt.as_bytes());
        ScopeId::from_bytes(framed.finish())
    }
}

/// Says which secret it is, never what.
impl fmt::Debug for ScopeSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ScopeSecret").field("key_id", &self.key_id).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_kinds_salts_and_secrets_are_kept_apart() {
        let secret = ScopeSecret::new(1, [7; 32]);
        let ids = [
            secret.scope(Scope::Tenant("ab"), ""),
            secret.scope(Scope::Corpus("ab"), ""),
            secret.scope(Scope::Tenant("a"), "b"),
            secret.scope(Scope::Tenant(""), "ab"),
            secret.scope(Scope::Tenant("ab"), "x"),
            ScopeSecret::new(2, [7; 32]).scope(Scope::Tenant("ab"), ""),
            ScopeSecret::new(1, [8; 32]).scope(Scope::Tenant("ab"), ""),
        ];
        let distinct: std::collections::HashSet<_> = ids.iter().collect();
        assert_eq!(distinct.len(), ids.len());
        assert_eq!(ids[0], secret.scope(Scope::Tenant("ab"), ""));
    }

    #[test]
    fn a_secret_is_never_printed() {
        let printed = format!("{:?}", ScopeSecret::new(3, [0xab; 32]));
        assert_eq!(printed, "ScopeSecret { key_id: 3, .. }");
    }
}
