//! KV of sections on its way to the pages: layers come one by one or together, and leave when they are placed.

use crate::budget::Grant;
use cacheclip_model::kv::{ChunkKv, LayerKv};
use parking_lot::Mutex;
use std::sync::Arc;

/// A section's position-free KV.
#[derive(Clone, Debug)]
pub(crate) enum Kv {
    /// All of it, as the RAM tier has it, which keeps it for as long as it is in use.
    Here(ChunkKv),
    /// As far as it has come.
    Coming(Incoming),
}

impl Kv {
    /// Nobody will take it: it needs no room.
    pub(crate) fn discard(&self) {
        if let Self::Coming(kv) = self {
            kv.discard();
        }
    }
}

/// A layer, and the leave to hold it; others may have a share of both.
#[derive(Clone, Debug)]
pub(crate) struct Layer {
    /// Position-free KV.
    pub kv: Arc<LayerKv>,
    _grant: Arc<Grant>,
}

impl Layer {
    /// Holds on to `grant` until the last share of the layer is dropped.
    pub(crate) fn new(kv: Arc<LayerKv>, grant: Grant) -> Self {
        Self { kv, _grant: Arc::new(grant) }
    }
}

/// KV of one section, from which layers are taken as they come. Cheap to clone; a layer is taken once.
#[derive(Clone, Debug, Default)]
pub(crate) struct Incoming(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// Layers that came, those that were taken included.
    came: usize,
    /// Those that were not, in order.
    waiting: Vec<Layer>,
    unwanted: bool,
}

impl Incoming {
    /// The next layer has come.
    pub(crate) fn arrive(&self, layer: Layer) {
        let mut state = self.0.lock();
        state.came += 1;
        if !state.unwanted {
            state.waiting.push(layer);
        }
    }

    /// Layers that came.
    pub(crate) fn came(&self) -> usize {
        self.0.lock().came
    }

    /// Whether there are layers to take.
    pub(crate) fn waits(&self) -> bool {
        !self.0.lock().waiting.is_empty()
    }

    /// Takes the layers that came since they were last taken, in order.
    pub(crate) fn take(&self) -> Vec<Layer> {
        std::mem::take(&mut self.0.lock().waiting)
    }

    /// Nobody will take any more layers: they need no room.
    pub(crate) fn discard(&self) {
        let mut state = self.0.lock();
        state.unwanted = true;
        state.waiting.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::Budget;

    #[tokio::test]
    async fn layers_are_taken_in_order_and_once_and_leave_their_room() {
        let window = Budget::new(4096, 1).open(4096).await.expect("room");
        let layer = |value| {
            let grant = window.try_grant(1024).expect("room");
            Layer::new(Arc::new(LayerKv::new(vec![value; 4], 2)), grant)
        };
        let taken = |kv: &Incoming| kv.take().iter().map(|layer| layer.kv.values()[0]).collect::<Vec<_>>();
        let kv = Incoming::default();
        let seen = kv.clone();
        assert!(!seen.waits());
        (1..=2).for_each(|value| kv.arrive(layer(value as f32)));
        assert_eq!((seen.waits(), taken(&seen), seen.came()), (true, vec![1.0, 2.0], 2));
        kv.arrive(layer(3.0));
        assert_eq!((taken(&seen), taken(&kv), window.bytes()), (vec![3.0], vec![], 1024));
        seen.discard();
        kv.arrive(layer(4.0));
        assert_eq!((kv.waits(), kv.came(), window.bytes()), (false, 4, 0));
    }
}
