//! Which store has a chunk: the one that keeps it, else one that the index names and that says so itself.

use crate::Options;
use crate::calls::may_be_elsewhere;
use crate::fleet::{Fleet, View, grouped};
use crate::node::Node;
use crate::since::Since;
use cacheclip_chunk::{ChunkKey, ContainerHash, LayoutId};
use cacheclip_rpc::v1::{self, MissReason, Tier};
use futures::future::join_all;
use std::sync::Arc;

/// A chunk at a store that says that it has it.
#[derive(Clone, Debug)]
pub(crate) struct At {
    pub(crate) node: Arc<Node>,
    pub(crate) container: ContainerHash,
    pub(crate) bytes: u64,
    pub(crate) tier: Tier,
}

/// One search for several chunks, among the stores that are live as it begins.
pub(crate) struct Finder<'a> {
    fleet: &'a Fleet,
    options: &'a Options,
    layout: LayoutId,
    keys: &'a [ChunkKey],
    since: &'a Since,
    pub(crate) view: View,
}

impl<'a> Finder<'a> {
    pub(crate) fn new(
        fleet: &'a Fleet,
        options: &'a Options,
        layout: LayoutId,
        keys: &'a [ChunkKey],
        since: &'a Since,
    ) -> Self {
        Self { fleet, options, layout, keys, since, view: fleet.view() }
    }

    /// The chunks by the store that keeps them, as indices; empty when no store is live.
    pub(crate) fn groups(&self) -> Vec<(Arc<Node>, Vec<usize>)> {
        let owned = self.keys.iter().enumerate();
        grouped(owned.filter_map(|(index, key)| Some((index, Arc::clone(self.view.owner(key)?)))))
    }

    /// Where the chunks with these indices are, all of which `owner` keeps.
    pub(crate) async fn locate(
        &self,
        owner: &Arc<Node>,
        indices: &[usize],
    ) -> Vec<(usize, Result<At, MissReason>)> {
        let entries = match self.ask(owner, indices, self.view.len() > 1).await {
            Ok(entries) => entries,
            Err(reason) => return indices.iter().map(|&index| (index, Err(reason))).collect(),
        };
        let mut located: Vec<_> =
            indices.iter().zip(&entries).map(|(&index, entry)| (index, at(owner, entry))).collect();
        let others =
            located.iter().zip(&entries).enumerate().filter_map(|(place, ((index, found), entry))| {
                let reason = found.as_ref().err()?;
                let other = self.view.elsewhere(owner, &self.keys[*index], entry)?;
                may_be_elsewhere(*reason).then(|| (place, Arc::clone(other)))
            });
        let others = grouped(others);
        let calls = others.iter().map(|(node, places)| {
            let asked: Vec<usize> = places.iter().map(|&place| located[place].0).collect();
            async move { self.ask(node, &asked, false).await.unwrap_or_default() }
        });
        let answers = join_all(calls).await;
        for ((node, places), entries) in others.iter().zip(answers) {
            for (&place, entry) in places.iter().zip(&entries) {
                if let Ok(found) = at(node, entry) {
                    located[place].1 = Ok(found);
                }
            }
        }
        located
    }

    async fn ask(
        &self,
        node: &Node,
        indices: &[usize],
        elsewhere: bool,
    ) -> Result<Vec<v1::Entry>, MissReason> {
        let keys: Vec<ChunkKey> = indices.iter().map(|&index| self.keys[index]).collect();
        self.fleet.lookup(node, self.layout, &keys, elsewhere, (self.options, self.since)).await
    }
}

/// An entry of an answer as the place of a chunk, or why it counts as missing.
fn at(node: &Arc<Node>, entry: &v1::Entry) -> Result<At, MissReason> {
    if !entry.found {
        return Err(entry.reason());
    }
    match ContainerHash::try_from(&entry.container_hash[..]) {
        Ok(container) => Ok(At { node: Arc::clone(node), container, bytes: entry.bytes, tier: entry.tier() }),
        Err(_) => Err(MissReason::Corrupt),
    }
}
