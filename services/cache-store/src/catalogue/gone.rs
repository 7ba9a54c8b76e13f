//! Why keys that have no record have none.

use super::REMEMBERED;
use cacheclip_chunk::ChunkKey;
use cacheclip_rpc::v1::MissReason;
use std::collections::{HashMap, VecDeque};

/// Why recent keys are gone; bounded, first in, first out.
#[derive(Debug, Default)]
pub(super) struct Gone {
    pub(super) reasons: HashMap<ChunkKey, (MissReason, u64)>,
    order: VecDeque<(ChunkKey, u64)>,
    clock: u64,
}

impl Gone {
    pub(super) fn reason(&self, key: &ChunkKey) -> MissReason {
        self.reasons.get(key).map_or(MissReason::NeverSeen, |(reason, _)| *reason)
    }

    pub(super) fn forget(&mut self, key: &ChunkKey) {
        self.reasons.remove(key);
    }

    pub(super) fn remember(&mut self, key: ChunkKey, reason: MissReason) {
        self.clock += 1;
        self.reasons.insert(key, (reason, self.clock));
        self.order.push_back((key, self.clock));
        while self.order.len() > REMEMBERED {
            if let Some((key, at)) = self.order.pop_front()
                && self.reasons.get(&key).is_some_and(|(_, latest)| *latest == at)
            {
                self.reasons.remove(&key);
            }
        }
    }
}
