//! Ours: `cacheclip` of `cacheclip-plan`, as gateway and worker run it, and the same with terms exchanged.

use super::{Error, OURS, Policy, View};
use crate::eval::prepare::Anchor;
use crate::eval::scene::{Layers, Reading};
use crate::eval::signals::Signal;
use cacheclip_model::Reduce;
use cacheclip_plan::{Policy as Plan, Settings, Signals as PlanSignals, select};

/// Rounds of closure, as the scorer does them.
pub(super) const ROUNDS: usize = 2;
/// The scorer's own signal.
pub(super) const SCORER: Signal = Signal::Aux(Reading::MAX, ROUNDS);

/// Terms of the composition.
#[derive(Clone, Debug)]
pub(super) struct CacheClip {
    name: String,
    about: &'static str,
    scorer: Option<Signal>,
    probe: Option<Signal>,
    rank: bool,
    settings: Settings,
    anchor: Anchor,
}

impl CacheClip {
    fn needs_of(&self) -> impl Iterator<Item = Signal> {
        self.scorer.into_iter().chain(self.probe).chain(self.rank.then_some(Signal::StaticRank))
    }
}

impl Policy for CacheClip {
    fn name(&self) -> &str {
        &self.name
    }
    fn about(&self) -> &str {
        self.about
    }
    fn needs(&self) -> Vec<Signal> {
        self.needs_of().collect()
    }
    fn anchor(&self) -> Anchor {
        self.anchor
    }
    fn ours(&self) -> bool {
        true
    }
    fn ablation(&self) -> bool {
        self.name.contains('/')
    }
    fn select(&self, view: &View<'_>, ratio: f32) -> Result<Vec<u32>, Error> {
        let signals = PlanSignals {
            scored: self.scorer.map(|it| view.signals.scored(it)).transpose()?,
            spans: view.spans(),
            probe: self.probe.map(|it| view.signals.rows(it)).transpose()?,
            rank: if self.rank { Some(view.signals.rows(Signal::StaticRank)?) } else { None },
        };
        Ok(select(view.assembly, &Plan::CacheClip(self.settings), Some(ratio), &signals)?.rows)
    }
}

/// The composition, with the probe beside it, and the ablations.
pub(super) fn variants() -> Vec<CacheClip> {
    let ours = CacheClip {
        name: OURS.into(),
        about: "ours: joint auxiliary scores with closure, chunk heads, single tokens",
        scorer: Some(SCORER),
        probe: None,
        rank: false,
        settings: Settings::default(),
        anchor: Anchor::Layout,
    };
    let question = Signal::Question(Reading::MAX, 0);
    let closed = Signal::Question(Reading::MAX, ROUNDS);
    let aux = |reading, rounds| Some(Signal::Aux(reading, rounds));
    let window = |window| Settings { window, ..ours.settings };
    let named = |name: &str, about| CacheClip { name: format!("{OURS}{name}"), about, ..ours.clone() };
    let bare = Settings { window: 1, head_share: 0.0, adjacency: 1.0, ..ours.settings };
    let heads = Settings { head: usize::MAX, head_share: 1.0, ..ours.settings };
    let (last, mean_over) = (Reading { layers: Layers::Last, ..Reading::MAX }, Reading::MEAN);
    let last_row = Reading { last_row: true, ..Reading::MAX };
    let deep = Reading { layers: Layers::Deep, ..Reading::MAX };
    let mean_heads = Reading { heads: Reduce::Mean, ..Reading::MAX };
    vec![
        CacheClip {
            probe: Some(question),
            ..named("+probe", "ours, fused with the primary's question on the stale cache")
        },
        CacheClip {
            probe: Some(closed),
            ..named("+probe-closed", "ours, fused with the same, closed in two rounds")
        },
        CacheClip { scorer: aux(Reading::MAX, 0), ..named("/no-closure", "without closure") },
        CacheClip {
            settings: Settings { head_share: 0.0, ..ours.settings },
            ..named("/no-heads", "without chunk heads")
        },
        CacheClip {
            settings: Settings { fusion_offset: 1.0, ..ours.settings },
            ..named("/offset-1", "rank fusion with offset 1")
        },
        CacheClip { settings: window(4), ..named("/window-4", "windows of 4") },
        CacheClip { settings: window(8), ..named("/window-8", "windows of 8, as the design had it") },
        CacheClip {
            settings: Settings { fusion_offset: 1.0, ..window(8) },
            ..named("/window-8-offset-1", "the same with offset 1: the best rows weigh more in their windows")
        },
        CacheClip { settings: window(16), ..named("/window-16", "windows of 16") },
        CacheClip {
            settings: Settings { adjacency: 1.0, ..ours.settings },
            ..named("/no-adjacency", "without preferring neighbours")
        },
        CacheClip { rank: true, ..named("/with-static-rank", "fused with the static rank") },
        CacheClip {
            scorer: aux(mean_over, ROUNDS),
            ..named("/aux-mean", "auxiliary mean over heads and question tokens")
        },
        CacheClip {
            scorer: aux(mean_heads, ROUNDS),
            ..named("/aux-mean-heads", "auxiliary mean over heads")
        },
        CacheClip { scorer: aux(last, ROUNDS), ..named("/aux-last-layer", "auxiliary last layer alone") },
        CacheClip {
            scorer: aux(deep, ROUNDS),
            ..named("/aux-deep-half", "auxiliary upper half of the layers")
        },
        CacheClip {
            scorer: aux(last_row, ROUNDS),
            ..named("/aux-last-token", "auxiliary last question token alone")
        },
        CacheClip {
            scorer: aux(Reading::MAX, 0),
            settings: bare,
            ..named("/scores-alone", "auxiliary scores alone: no closure, heads or preference for neighbours")
        },
        CacheClip { settings: heads, ..named("/heads-alone", "chunk heads alone") },
        CacheClip {
            scorer: None,
            rank: true,
            ..named("/static-rank-alone", "static rank instead of scores")
        },
        CacheClip {
            scorer: None,
            probe: Some(question),
            ..named("/probe-alone", "the probe instead of the auxiliary model")
        },
        CacheClip {
            scorer: None,
            probe: Some(closed),
            ..named("/probe-closed-alone", "the closed probe instead of the auxiliary model")
        },
        CacheClip {
            anchor: Anchor::Bos,
            ..named("/anchor-bos", "chunks encoded behind BOS alone, not the prefix")
        },
        CacheClip { anchor: Anchor::Nothing, ..named("/anchor-none", "chunks encoded behind nothing") },
        ours,
    ]
}
