//! The auxiliary model: cached chunk KV, and the question run once over all of it.

use crate::metrics;
use cacheclip_chunk::ByteSpan;
use cacheclip_model::closure::{self, Chunks};
use cacheclip_model::kv::{ChunkKv, Export};
use cacheclip_model::pages::{Allocator, Sequence};
use cacheclip_model::{Cpu, Decoder, Device, Logits, Pass, Probe, Reduce};
use cacheclip_plan::Scored;
use cacheclip_prompt::Composer;
use parking_lot::Mutex;
use quick_cache::sync::Cache;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Prompt heads whose KV is kept.
const PREFIXES: usize = 64;

/// A chunk as the auxiliary model knows it.
#[derive(Clone, Debug)]
pub struct Chunk {
    /// Its canonical KV.
    pub kv: ChunkKv,
    /// Which bytes of its text each token is.
    pub spans: std::sync::Arc<[ByteSpan]>,
    /// Its tokens.
    pub ids: std::sync::Arc<[u32]>,
}

/// How a question is run over the chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Once over all chunks, every layer; mean over layers of the largest over heads and question tokens.
    Joint,
    /// As published: per chunk alone, last layer, mean over heads and question tokens.
    Paper,
}

/// Why something could not be scored.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The caller's texts cannot be scored as they are.
    #[error("{field}: {why}")]
    Invalid {
        /// Field of the request.
        field: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// The tokenizer refused a text.
    #[error(transparent)]
    Prompt(#[from] cacheclip_prompt::Error),
    /// The device or the model failed.
    #[error(transparent)]
    Model(#[from] cacheclip_model::Error),
}

/// The model with its workspaces; shared by all requests.
pub struct Auxiliary {
    decoder: Decoder<Cpu>,
    composer: Composer,
    anchor: Vec<u32>,
    /// KV of prompt heads; requests share a few.
    prefixes: Cache<Vec<u32>, ChunkKv>,
    max_question: usize,
    /// One per concurrent request: pages for a whole context.
    workspaces: Mutex<Vec<Workspace>>,
    /// Positions that were written to so far, of all workspaces.
    positions: AtomicUsize,
}

struct Workspace {
    pages: <Cpu as Device>::Pages,
    sequence: Sequence,
    /// Most positions that a request wrote to.
    positions: usize,
}

impl std::fmt::Debug for Auxiliary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Auxiliary").field("config", self.decoder.config()).finish_non_exhaustive()
    }
}

impl Auxiliary {
    /// Pages for `concurrency` requests at once, each as long as the model's context.
    ///
    /// # Errors
    /// No anchor in the prompt's layout, or no memory.
    pub fn new(
        decoder: Decoder<Cpu>,
        composer: Composer,
        max_question: usize,
        concurrency: usize,
    ) -> Result<Self, Error> {
        metrics::weights(decoder.weight_bytes());
        metrics::pages_peak(0);
        let anchor = composer.anchor()?;
        let context = decoder.config().max_positions;
        let workspaces = (0..concurrency)
            .map(|_| {
                let allocator = Allocator::new(cacheclip_kernels::page::pages_for(context));
                Ok(Workspace {
                    pages: decoder.pages(allocator.total())?,
                    sequence: allocator.sequence(context)?,
                    positions: 0,
                })
            })
            .collect::<Result<_, Error>>()?;
        Ok(Self {
            decoder,
            composer,
            anchor,
            prefixes: Cache::new(PREFIXES),
            max_question,
            workspaces: Mutex::new(workspaces),
            positions: AtomicUsize::new(0),
        })
    }

    /// Longest sequence of the auxiliary model.
    fn context(&self) -> usize {
        self.decoder.config().max_positions
    }

    /// Canonical auxiliary KV of one chunk: behind the anchor, anchor stripped.
    ///
    /// # Errors
    /// A text that the tokenizer refuses or that is longer than the context; a device fault.
    pub fn chunk(&self, text: &str) -> Result<Chunk, Error> {
        let section = self.composer.chunk(text)?;
        let kv = self.section(&self.anchor, &section.ids)?;
        Ok(Chunk { kv, spans: section.spans.into(), ids: section.ids.into() })
    }

    /// Scores of every auxiliary token of every chunk for `question`.
    ///
    /// # Errors
    /// As [`chunk`](Self::chunk), for the question and the chunks together.
    pub fn score(
        &self,
        prefix: Option<&str>,
        chunks: &[Chunk],
        question: &str,
        mode: Mode,
    ) -> Result<Vec<Vec<Scored>>, Error> {
        let question = self.composer.question(question)?.ids;
        if question.is_empty() || question.len() > self.max_question {
            let why = format!("{} auxiliary tokens; between 1 and {}", question.len(), self.max_question);
            return Err(Error::Invalid { field: "question", why });
        }
        let prefix = match prefix {
            Some(text) => self.composer.prefix(text)?.ids,
            None => self.anchor.clone(),
        };
        let prefix = self.prefix(prefix)?;
        let layers = self.decoder.config().layers;
        let (groups, looked_at) = match mode {
            Mode::Joint => (self.groups(chunks, prefix.tokens() + question.len())?, 0..layers),
            Mode::Paper => ((0..chunks.len()).map(|i| i..i + 1).collect(), layers - 1..layers),
        };
        let mut scored = Vec::with_capacity(chunks.len());
        for group in groups {
            scored.extend(self.joint(&prefix, &chunks[group], &question, looked_at.clone())?);
        }
        Ok(scored)
    }

    fn prefix(&self, ids: Vec<u32>) -> Result<ChunkKv, Error> {
        if let Some(known) = self.prefixes.get(&ids) {
            return Ok(known);
        }
        let kv = self.section(&[], &ids)?;
        self.prefixes.insert(ids, kv.clone());
        Ok(kv)
    }

    /// Runs of chunks that fit the auxiliary context together; usually one.
    fn groups(&self, chunks: &[Chunk], fixed: usize) -> Result<Vec<Range<usize>>, Error> {
        let room = self.context().saturating_sub(fixed);
        let mut groups = Vec::new();
        let (mut start, mut used) = (0, 0);
        for (index, chunk) in chunks.iter().enumerate() {
            let tokens = chunk.kv.tokens();
            if tokens > room {
                let why = format!("chunk {index} has {tokens} auxiliary tokens, there is room for {room}");
                return Err(Error::Invalid { field: "chunks", why });
            }
            if used + tokens > room {
                groups.push(start..index);
                (start, used) = (index, 0);
            }
            used += tokens;
        }
        groups.push(start..chunks.len());
        Ok(groups)
    }

    /// The question attends to prefix and chunks jointly, at every layer, on their canonical (stale) KV.
    fn joint(
        &self,
        prefix: &ChunkKv,
        chunks: &[Chunk],
        question: &[u32],
        layers: Range<usize>,
    ) -> Result<Vec<Vec<Scored>>, Error> {
        let mut starts = vec![prefix.tokens()];
        for chunk in chunks {
            starts.push(starts[starts.len() - 1] + chunk.kv.tokens());
        }
        let end = starts[starts.len() - 1];
        if end + question.len() > self.context() {
            let why =
                format!("{} auxiliary tokens, the context holds {}", end + question.len(), self.context());
            return Err(Error::Invalid { field: "chunks", why });
        }
        let positions: Vec<u32> = (end as u32..(end + question.len()) as u32).collect();
        let follows = layers.len() > 1;
        let reduce = if layers.len() == 1 { Reduce::Mean } else { Reduce::Max };
        let mut probe = Probe::new(positions[0], end, layers, reduce, reduce);
        let scores = self.with_workspace(end + question.len(), |workspace| {
            self.assemble(workspace, prefix, chunks, &starts)?;
            let table = workspace.sequence.table();
            let pass = Pass {
                logits: Logits::None,
                probe: Some(&mut probe),
                ..Pass::new(question, &positions, table)
            };
            self.decoder.forward(&mut workspace.pages, pass)?;
            let mut scores = probe.scores();
            if follows {
                let mut followed = Vec::new();
                for _ in 0..closure::ROUNDS {
                    // A round leaves the rows it followed recomputed.
                    self.restore(workspace, chunks, &starts, &followed)?;
                    let places = Chunks { table: workspace.sequence.table(), starts: &starts };
                    let id = |position| {
                        let chunk = places.of(position);
                        chunks[chunk].ids[position - starts[chunk]]
                    };
                    followed = closure::follow(&self.decoder, &mut workspace.pages, places, id, &mut scores)?;
                }
            }
            Ok(scores)
        })?;
        let of_chunk = |(chunk, &start): (&Chunk, &usize)| {
            let spans = chunk.spans.iter().zip(&scores[start..]);
            spans
                .filter(|(span, _)| span.start < span.end)
                .map(|(&span, &score)| Scored { span, score })
                .collect()
        };
        Ok(chunks.iter().zip(&starts).map(of_chunk).collect())
    }

    /// Places prefix and chunks, all canonical.
    fn assemble(
        &self,
        workspace: &mut Workspace,
        prefix: &ChunkKv,
        chunks: &[Chunk],
        starts: &[usize],
    ) -> Result<(), cacheclip_model::Error> {
        let table = workspace.sequence.table();
        self.decoder.place(&mut workspace.pages, table, prefix, 0)?;
        for (chunk, &start) in chunks.iter().zip(starts) {
            self.decoder.place(&mut workspace.pages, table, &chunk.kv, start)?;
        }
        Ok(())
    }

    /// Places single tokens of chunks again, canonical.
    fn restore(
        &self,
        workspace: &mut Workspace,
        chunks: &[Chunk],
        starts: &[usize],
        positions: &[usize],
    ) -> Result<(), cacheclip_model::Error> {
        let dim = self.decoder.config().head_dim;
        let table = workspace.sequence.table();
        for &position in positions {
            let chunk = Chunks { table, starts }.of(position);
            let token = position - starts[chunk];
            let layers = chunks[chunk].kv.layers().map(|layer| layer.token(token, dim)).collect();
            self.decoder.place(&mut workspace.pages, table, &ChunkKv::new(layers), position)?;
        }
        Ok(())
    }

    /// Position-free KV of `ids` behind `behind`.
    fn section(&self, behind: &[u32], ids: &[u32]) -> Result<ChunkKv, Error> {
        let all = [behind, ids].concat();
        if all.len() > self.context() {
            let why = format!("{} auxiliary tokens, the context holds {}", all.len(), self.context());
            return Err(Error::Invalid { field: "chunks", why });
        }
        let positions: Vec<u32> = (0..all.len() as u32).collect();
        let mut export = Export::default();
        self.with_workspace(all.len(), |workspace| {
            let table = workspace.sequence.table();
            let pass = Pass {
                logits: Logits::None,
                export: Some(&mut export),
                ..Pass::new(&all, &positions, table)
            };
            self.decoder.forward(&mut workspace.pages, pass)
        })?;
        Ok(export.finish(behind.len(), self.decoder.config().head_dim))
    }

    /// Bytes of one position's KV in pages.
    fn position_bytes(&self) -> usize {
        let config = self.decoder.config();
        2 * config.layers * config.kv_heads * config.head_dim * size_of::<f32>()
    }

    /// Runs `work`, which writes to positions up to `positions`.
    fn with_workspace<T>(
        &self,
        positions: usize,
        work: impl FnOnce(&mut Workspace) -> Result<T, cacheclip_model::Error>,
    ) -> Result<T, Error> {
        // The service admits as many requests as there are workspaces; a missing one is made up for here, so
        // that a caller who does not count cannot break scoring.
        let taken = self.workspaces.lock().pop();
        let mut workspace = match taken {
            Some(workspace) => workspace,
            None => {
                let allocator = Allocator::new(cacheclip_kernels::page::pages_for(self.context()));
                Workspace {
                    pages: self.decoder.pages(allocator.total())?,
                    sequence: allocator.sequence(self.context())?,
                    positions: 0,
                }
            }
        };
        if positions > workspace.positions {
            let more = positions - std::mem::replace(&mut workspace.positions, positions);
            let all = self.positions.fetch_add(more, Ordering::Relaxed) + more;
            metrics::pages_peak(all * self.position_bytes());
        }
        let result = work(&mut workspace);
        self.workspaces.lock().push(workspace);
        Ok(result?)
    }
}
