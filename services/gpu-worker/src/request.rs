//! From the protocol's sections to what the worker works on: parsed once, checked by field.

use crate::engine::Tenant;
use crate::layout::{Anchor, Layout};
use crate::loader::Wanted;
use crate::options::Options;
use cacheclip_chunk::{AnchorId, ByteSpan, LayoutId};
use cacheclip_model::sample;
use cacheclip_plan::{Assembly, Policy, Scored};
use cacheclip_rpc::convert;
use cacheclip_rpc::status::{invalid, mismatch};
use cacheclip_rpc::v1;
use tonic::Status;

/// Longest name of a tenant, in bytes.
const MOST_TENANT: usize = 64;

/// A checked request.
#[derive(Debug)]
pub(crate) struct Request {
    /// Whose request it is.
    pub tenant: Tenant,
    /// Prefix and chunks, in order.
    pub wanted: Vec<Wanted>,
    /// The question's token ids.
    pub question: Vec<u32>,
    /// Rows of the prompt.
    pub assembly: Assembly,
    /// How rows are chosen.
    pub policy: Policy,
    /// Share of reused rows to recompute.
    pub ratio: Option<f32>,
    /// Fail instead of degrading.
    pub strict: bool,
    /// How tokens are drawn.
    pub sampling: sample::Options,
    /// Most tokens to generate.
    pub max_tokens: usize,
    /// Texts that end the answer.
    pub stop: Vec<String>,
}

/// What a request is checked against.
#[derive(Clone, Debug)]
pub(crate) struct Limits {
    /// Rows of the embedding table.
    pub vocab: usize,
    /// Longest prompt plus answer.
    pub max_tokens: usize,
    /// Tokens of the anchor that chunks are computed behind.
    pub anchor: usize,
    /// Tokens generated when the request names no limit.
    pub default_answer: usize,
}

impl Limits {
    /// Limits of a model under `options`.
    pub(crate) fn new(vocab: usize, positions: usize, anchor: usize, options: &Options) -> Self {
        let max_tokens = if options.max_tokens == 0 { positions } else { options.max_tokens.min(positions) };
        Self { vocab, max_tokens, anchor, default_answer: options.default_answer_tokens.max(1) }
    }
}

impl Request {
    /// Checks everything about a request that can be wrong.
    pub(crate) fn parse(
        sections: v1::Sections,
        layout: &Layout,
        anchor: &Anchor,
        limits: &Limits,
    ) -> Result<Self, Status> {
        check_identity(&sections.layout, &sections.anchor, layout, anchor)?;
        let prefix = section("prefix", sections.prefix.unwrap_or_default(), limits, false)?;
        let mut wanted = vec![prefix];
        for (index, chunk) in sections.chunks.into_iter().enumerate() {
            wanted.push(section(&format!("chunks[{index}]"), chunk, limits, true)?);
        }
        let question = sections.question.unwrap_or_default().ids;
        check_ids("question", &question, limits)?;
        let policy: Policy = sections.policy.parse().map_err(|error| invalid("policy", error))?;
        if let Some(ratio) = sections.ratio.filter(|ratio| !(0.0..=1.0).contains(ratio)) {
            return Err(invalid("ratio", format!("{ratio} is not within 0..1")));
        }
        let sampling = sections.sampling.unwrap_or_default();
        let max_tokens = match sampling.max_tokens {
            0 => limits.default_answer,
            asked => asked as usize,
        };
        let lengths: Vec<usize> = wanted[1..].iter().map(|want| want.ids.len()).collect();
        let anchored = wanted[0].ids[..] == anchor.ids[..];
        let assembly = Assembly::new(wanted[0].ids.len(), &lengths, question.len(), anchored);
        if assembly.total() + max_tokens > limits.max_tokens {
            let why = format!(
                "prompt of {} tokens and answer of {max_tokens} exceed the model's {}",
                assembly.total(),
                limits.max_tokens
            );
            return Err(invalid("chunks", why));
        }
        if sections.tenant.len() > MOST_TENANT {
            return Err(invalid("tenant", format!("{} bytes; at most {MOST_TENANT}", sections.tenant.len())));
        }
        Ok(Self {
            tenant: sections.tenant[..].into(),
            wanted,
            question,
            assembly,
            policy,
            ratio: sections.ratio,
            strict: sections.strict,
            sampling: sampling_options(&sampling)?,
            max_tokens,
            stop: sampling.stop,
        })
    }

    /// Rows that will have to be computed, about, if all KV is found.
    pub(crate) fn rows(&self) -> usize {
        if self.policy == Policy::Full {
            return self.assembly.total();
        }
        let ratio = self.ratio.unwrap_or_else(|| self.policy.default_ratio());
        (self.assembly.candidate_rows() as f32 * ratio) as usize + self.question.len()
    }

    /// The prompt's token ids.
    pub(crate) fn ids(&self) -> Vec<u32> {
        self.wanted.iter().flat_map(|want| &want.ids).chain(&self.question).copied().collect()
    }

    /// Byte spans of each chunk's rows.
    pub(crate) fn spans(&self) -> Vec<Vec<ByteSpan>> {
        self.wanted[1..].iter().map(|want| want.spans.clone()).collect()
    }

    /// What an importance set for this request can be kept under: chunks, question, policy.
    pub(crate) fn set_key(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_derive_key("cacheclip v1 importance set");
        hasher.update(self.policy.name().as_bytes());
        for want in &self.wanted {
            hasher.update(want.key.as_bytes());
        }
        for id in &self.question {
            hasher.update(&id.to_le_bytes());
        }
        *hasher.finalize().as_bytes()
    }
}

/// Chunks of a precompute request.
pub(crate) fn chunks(
    request: v1::PrecomputeRequest,
    layout: &Layout,
    anchor: &Anchor,
    limits: &Limits,
) -> Result<Vec<Wanted>, Status> {
    check_identity(&request.layout, &request.anchor, layout, anchor)?;
    let check = |(index, chunk)| section(&format!("chunks[{index}]"), chunk, limits, true);
    request.chunks.into_iter().enumerate().map(check).collect()
}

/// The scorer's sets in the order of the chunks, ascending spans within each.
pub(crate) fn scored(sets: Vec<v1::ImportanceSet>, chunks: usize) -> Vec<Vec<Scored>> {
    let mut scored = vec![Vec::new(); chunks];
    for set in sets {
        // A set for a chunk that is not there helps nobody and harms nobody.
        let Some(into) = scored.get_mut(set.chunk as usize) else { continue };
        let spans = set.spans.into_iter().filter(|s| s.start < s.end && s.score.is_finite());
        into.extend(spans.map(|s| Scored { span: ByteSpan { start: s.start, end: s.end }, score: s.score }));
        into.sort_by_key(|s| (s.span.start, s.span.end));
    }
    scored
}

/// Keys of another layout or anchor name KV that this worker neither has nor can make.
fn check_identity(
    layout: &[u8],
    anchor: &[u8],
    our_layout: &Layout,
    our_anchor: &Anchor,
) -> Result<(), Status> {
    let layout: LayoutId = convert::id("layout", layout)?;
    if layout != our_layout.id {
        return Err(mismatch("layout", our_layout.id, layout));
    }
    let anchor: AnchorId = convert::id("anchor", anchor)?;
    if anchor != our_anchor.id {
        return Err(mismatch("anchor (prompt.json)", our_anchor.id, anchor));
    }
    Ok(())
}

fn section(
    field: &str,
    section: v1::TokenSection,
    limits: &Limits,
    anchored: bool,
) -> Result<Wanted, Status> {
    check_ids(field, &section.ids, limits)?;
    let behind = if anchored { limits.anchor } else { 0 };
    if behind + section.ids.len() > limits.max_tokens {
        let why =
            format!("{} tokens behind an anchor of {behind} exceed {}", section.ids.len(), limits.max_tokens);
        return Err(invalid(field, why));
    }
    let spans = convert::spans(&format!("{field}.spans"), &section.spans, section.ids.len())?;
    let key = convert::id(&format!("{field}.key"), &section.key)?;
    Ok(Wanted { key, ids: section.ids, spans, anchored })
}

fn check_ids(field: &str, ids: &[u32], limits: &Limits) -> Result<(), Status> {
    if ids.is_empty() {
        return Err(invalid(field, "must not be empty"));
    }
    match ids.iter().find(|&&id| id as usize >= limits.vocab) {
        Some(id) => {
            Err(invalid(field, format!("token id {id} is outside the vocabulary of {}", limits.vocab)))
        }
        None => Ok(()),
    }
}

fn sampling_options(sampling: &v1::Sampling) -> Result<sample::Options, Status> {
    if !(0.0..=100.0).contains(&sampling.temperature) {
        return Err(invalid(
            "sampling.temperature",
            format!("{} is not within 0..100", sampling.temperature),
        ));
    }
    if !(0.0..=1.0).contains(&sampling.top_p) {
        return Err(invalid("sampling.top_p", format!("{} is not within 0..1", sampling.top_p)));
    }
    let top_p = if sampling.top_p == 0.0 { 1.0 } else { sampling.top_p };
    Ok(sample::Options { temperature: sampling.temperature, top_p, seed: sampling.seed })
}
