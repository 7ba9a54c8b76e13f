//! The stream of layers as a caller sees it.

use crate::chunk::Whole;
use crate::metrics;
use bytes::Bytes;
use cacheclip_chunk::container::{parse_ids, parse_rank, parse_spans};
use cacheclip_chunk::{ByteSpan, FormatError, Head, SegmentKind};
use cacheclip_rpc::v1::{MissReason, Tier};
use futures::{Stream, ready};
use std::collections::HashSet;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// One verified, decoded layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerKv {
    /// Index of the chunk in the keys asked for.
    pub chunk: usize,
    /// Which layer.
    pub layer: u32,
    /// K `[kv_heads, tokens, head_dim]` before RoPE, then V of the same shape; little-endian elements of the
    /// head's dtype. Not aligned for them.
    pub data: Bytes,
}

/// What comes of one chunk, in this order: its head; its spans, rank and ids where it has them and the store sends
/// them; its layers, ascending. Or, at any point, that it is missing, and then nothing more of it.
#[derive(Clone, Debug)]
pub enum Item {
    /// The store has the chunk.
    Head {
        /// Index of the chunk in the keys asked for.
        chunk: usize,
        /// Its checked header and segment table.
        head: Arc<Head>,
        /// Where the store found it.
        tier: Tier,
    },
    /// Byte span of each token in the chunk's text.
    Spans {
        /// Index of the chunk in the keys asked for.
        chunk: usize,
        /// One per token.
        spans: Vec<ByteSpan>,
    },
    /// Static rank of each token.
    Rank {
        /// Index of the chunk in the keys asked for.
        chunk: usize,
        /// Version of the algorithm that made it.
        version: u16,
        /// One per token; higher matters more.
        ranks: Vec<u8>,
    },
    /// Token ids.
    Ids {
        /// Index of the chunk in the keys asked for.
        chunk: usize,
        /// One per token.
        ids: Vec<u32>,
    },
    /// One layer.
    Layer(LayerKv),
    /// The chunk, or the rest of it, does not come: compute it.
    Missing {
        /// Index of the chunk in the keys asked for.
        chunk: usize,
        /// Why.
        reason: MissReason,
    },
}

impl Item {
    /// Index of the chunk in the keys asked for.
    pub fn chunk(&self) -> usize {
        match self {
            Self::Layer(layer) => layer.chunk,
            Self::Head { chunk, .. }
            | Self::Spans { chunk, .. }
            | Self::Rank { chunk, .. }
            | Self::Ids { chunk, .. }
            | Self::Missing { chunk, .. } => *chunk,
        }
    }
}

/// What the fetching task hands over: done, or being decoded on the blocking pool.
#[derive(Debug)]
pub(crate) enum Pending {
    Ready(Item),
    Decoding { chunk: usize, work: JoinHandle<Result<Item, FormatError>> },
}

impl Pending {
    /// Starts the verification and decoding of a segment.
    pub(crate) fn decode(chunk: usize, whole: Whole) -> Self {
        Self::Decoding { chunk, work: tokio::task::spawn_blocking(move || decode(chunk, whole)) }
    }
}

pub(crate) fn decode(chunk: usize, whole: Whole) -> Result<Item, FormatError> {
    let Whole { head, index, stored } = whole;
    let data = head.decode_shared(index, stored.join())?;
    let entry = &head.segments()[index];
    Ok(match entry.kind {
        SegmentKind::Layer => Item::Layer(LayerKv { chunk, layer: entry.layer, data }),
        SegmentKind::Spans => Item::Spans { chunk, spans: parse_spans(index, &data)? },
        SegmentKind::Rank => {
            let (version, ranks) = parse_rank(index, data.into())?;
            Item::Rank { chunk, version, ranks }
        }
        SegmentKind::Ids => Item::Ids { chunk, ids: parse_ids(&data) },
    })
}

/// Items of several chunks; made by [`StoreClient::get_layers`](crate::StoreClient::get_layers).
#[derive(Debug)]
pub struct LayerStream {
    inbox: mpsc::Receiver<Pending>,
    current: Option<(usize, JoinHandle<Result<Item, FormatError>>)>,
    /// Chunks that are over: their later items are dropped.
    over: HashSet<usize>,
}

impl LayerStream {
    pub(crate) fn new(inbox: mpsc::Receiver<Pending>) -> Self {
        Self { inbox, current: None, over: HashSet::new() }
    }

    fn missing(&mut self, chunk: usize, reason: MissReason) -> Item {
        self.over.insert(chunk);
        metrics::missing(reason);
        Item::Missing { chunk, reason }
    }
}

impl Stream for LayerStream {
    type Item = Item;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Item>> {
        loop {
            if let Some((chunk, work)) = &mut self.current {
                let chunk = *chunk;
                let decoded = ready!(Pin::new(work).poll(context));
                self.current = None;
                if self.over.contains(&chunk) {
                    continue;
                }
                return Poll::Ready(Some(match decoded {
                    Ok(Ok(item)) => item,
                    Ok(Err(error)) => {
                        metrics::verify_failed();
                        tracing::warn!(chunk, %error, "a chunk's bytes were damaged on their way");
                        self.missing(chunk, MissReason::Corrupt)
                    }
                    // The runtime is shutting down, or the decoder panicked: either way no layer.
                    Err(error) => {
                        tracing::error!(chunk, %error, "decoding ended early");
                        self.missing(chunk, MissReason::Unavailable)
                    }
                }));
            }
            match ready!(self.inbox.poll_recv(context)) {
                None => return Poll::Ready(None),
                Some(Pending::Decoding { chunk, work }) => self.current = Some((chunk, work)),
                Some(Pending::Ready(item)) if self.over.contains(&item.chunk()) => {}
                Some(Pending::Ready(Item::Missing { chunk, reason })) => {
                    return Poll::Ready(Some(self.missing(chunk, reason)));
                }
                Some(Pending::Ready(item)) => return Poll::Ready(Some(item)),
            }
        }
    }
}
