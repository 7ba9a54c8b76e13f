//! The fence of what is written: what stores had deleted when a request learnt what they lack.
//!
//! A store counts its deletions and says its count with everything that it lacks. What a request computes from then on
//! is put with that count, and a store that has deleted the chunk since refuses it. Counts are kept per request: a
//! newer one, heard by another request, would let through what was computed before the deletion.

use crate::fleet::Fleet;
use crate::node::Node;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;

/// What stores had deleted as one request knows it. Cheap to clone, and one for all clones.
#[derive(Clone, Debug, Default)]
pub struct Since(Option<Arc<Mutex<HashMap<String, Count>>>>);

#[derive(Clone, Copy, Debug)]
struct Count {
    generation: u64,
    /// Told to this request; else what had been heard when it began.
    told: bool,
}

impl Since {
    /// A request begins now.
    pub(crate) fn now(fleet: &Fleet) -> Self {
        let heard = |node: &Arc<Node>| {
            let generation = node.generation();
            (generation > 0).then(|| (node.name().to_owned(), Count { generation, told: false }))
        };
        Self(Some(Arc::new(Mutex::new(fleet.known().iter().filter_map(heard).collect()))))
    }

    /// This, or a request of its own where there is none.
    pub(crate) fn or_now(&self, fleet: &Fleet) -> Self {
        if self.0.is_some() { self.clone() } else { Self::now(fleet) }
    }

    /// A store said its count, along with what it lacks.
    pub(crate) fn told(&self, node: &Node, generation: u64) {
        if generation == 0 {
            return;
        }
        node.counts(generation);
        let Some(counts) = &self.0 else { return };
        let mut counts = counts.lock();
        match counts.get_mut(node.name()) {
            Some(known) if known.told => known.generation = known.generation.min(generation),
            Some(known) => *known = Count { generation, told: true },
            None => {
                counts.insert(node.name().to_owned(), Count { generation, told: true });
            }
        }
    }

    /// What a put to this store says; 0 where nothing is known.
    pub(crate) fn at(&self, node: &Node) -> u64 {
        let known = self.0.as_ref().and_then(|counts| counts.lock().get(node.name()).copied());
        known.map_or(0, |known| known.generation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::dial;
    use cacheclip_service::{ConnectOptions, connect};

    fn node(name: &str) -> Arc<Node> {
        let (endpoint, options) = ("http://127.0.0.1:9", ConnectOptions::default());
        let control = dial(endpoint, &options).expect("a sound endpoint");
        let bulk = connect(endpoint, &options).expect("a sound endpoint");
        Arc::new(Node::new(name, endpoint, true, control, bulk))
    }

    fn begun() -> Since {
        Since(Some(Arc::default()))
    }

    #[tokio::test]
    async fn what_a_request_was_told_first_counts_for_all_that_it_writes() {
        let (a, b) = (node("a"), node("b"));
        let since = begun();
        since.told(&a, 5);
        since.told(&a, 7);
        since.told(&b, 9);
        assert_eq!((since.at(&a), since.at(&b)), (5, 9));
        let other = begun();
        other.told(&a, 8);
        assert_eq!((since.at(&a), other.at(&a), other.at(&b)), (5, 8, 0));
        assert_eq!(Since::default().at(&a), 0, "the put's own beginning counts");
    }

    #[tokio::test]
    async fn a_store_that_was_not_asked_counts_as_it_was_last_heard() {
        let a = node("a");
        Since::default().told(&a, 3);
        let heard = Count { generation: a.generation(), told: false };
        let since = Since(Some(Arc::new(Mutex::new([("a".to_owned(), heard)].into()))));
        assert_eq!(since.at(&a), 3);
        since.told(&a, 6);
        assert_eq!(since.at(&a), 6, "once it is asked, its own word counts");
    }
}
