//! From text to what a worker takes: scopes, tokens, keys.

use crate::metrics;
use crate::request::Generation;
use crate::scorer::Asked;
use crate::worker::Described;
use cacheclip_chunk::{ChunkKey, DocumentId, Scope, ScopeId, ScopeSecret, text_digest};
use cacheclip_plan::Policy;
use cacheclip_prompt::{Composer, Section};
use cacheclip_rpc::convert::{flat_spans, id_bytes};
use cacheclip_rpc::status::invalid;
use cacheclip_rpc::v1;
use quick_cache::Weighter;
use quick_cache::sync::Cache;
use std::sync::Arc;
use tonic::Status;

type Digest = [u8; 32];

#[derive(Clone, Debug)]
struct ByBytes;

impl Weighter<Digest, Arc<Section>> for ByBytes {
    fn weight(&self, _: &Digest, section: &Arc<Section>) -> u64 {
        // Four bytes of id and eight of span per token; the rest is the entry itself.
        section.ids.len() as u64 * 12 + 160
    }
}

/// Makes sections. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Sections {
    composer: Composer,
    secret: ScopeSecret,
    /// Chunk tokenisations. Under the scope's digest and not the text's: how fast an answer is must not tell
    /// one tenant which texts another one sent.
    tokens: Arc<Cache<Digest, Arc<Section>, ByBytes>>,
}

/// A chunk with everything that is asked about it.
#[derive(Clone, Debug)]
pub(crate) struct Chunk {
    pub(crate) key: ChunkKey,
    pub(crate) section: Arc<Section>,
    pub(crate) asked: Asked,
}

/// A prompt in sections.
#[derive(Debug)]
pub(crate) struct Prompt {
    pub(crate) sections: v1::Sections,
    pub(crate) chunks: Vec<Asked>,
    /// Tokens that may be found in a cache.
    pub(crate) reusable: u32,
}

impl Sections {
    pub(crate) fn new(composer: Composer, secret: ScopeSecret, cache_bytes: u64) -> Self {
        // The number of entries is an estimate that sizes the table; the bound is the bytes.
        let entries = usize::try_from(cache_bytes >> 12).unwrap_or(usize::MAX).clamp(64, 1 << 20);
        Self { composer, secret, tokens: Arc::new(Cache::with_weighter(entries, cache_bytes, ByBytes)) }
    }

    /// Whose chunk it is: a shared corpus's where one is named, else the tenant's own.
    fn scope(&self, chunk: &v1::Chunk, tenant: &str, salt: &str) -> ScopeId {
        let scope =
            if chunk.corpus.is_empty() { Scope::Tenant(tenant) } else { Scope::Corpus(&chunk.corpus) };
        self.secret.scope(scope, salt)
    }

    /// What stores know a tenant's document by. A tenant's own, whosever its chunks are.
    pub(crate) fn document(&self, tenant: &str, salt: &str, name: &str) -> DocumentId {
        DocumentId::new(&self.secret.scope(Scope::Tenant(tenant), salt), name)
    }

    /// Tokens and names of one chunk. `field` is how an error calls it.
    pub(crate) fn chunk(
        &self,
        field: &str,
        chunk: v1::Chunk,
        tenant: &str,
        salt: &str,
        described: &Described,
    ) -> Result<Chunk, Status> {
        // The anchor stands before every chunk, so that much less of the model's length is left.
        let most = described.max_tokens.saturating_sub(described.anchor_tokens);
        self.refuse_long(field, &chunk.text, most)?;
        let scope = self.scope(&chunk, tenant, salt);
        let digest = text_digest(&scope, &chunk.text);
        let section = match self.tokens.get(&digest) {
            Some(section) => {
                metrics::tokenised("cached");
                section
            }
            None => {
                metrics::tokenised("computed");
                let section =
                    Arc::new(self.composer.chunk(&chunk.text).map_err(|error| invalid(field, error))?);
                self.tokens.insert(digest, Arc::clone(&section));
                section
            }
        };
        let alone = described.anchor_tokens + section.ids.len();
        if alone > described.max_tokens {
            let why = format!("{alone} tokens with its anchor; the model takes {}", described.max_tokens);
            return Err(invalid(field, why));
        }
        let key = ChunkKey::new(&described.layout_id, &described.anchor, &scope, &section.ids);
        Ok(Chunk { key, section, asked: Asked { digest, text: chunk.text.into() } })
    }

    /// Refuses what is too long by its bytes alone: tokenising it would cost seconds and gigabytes first.
    fn refuse_long(&self, field: &str, text: &str, most: usize) -> Result<(), Status> {
        let least = self.composer.tokenizer().at_least(text.len());
        if least <= most {
            return Ok(());
        }
        let why =
            format_args!("{} bytes are {least} tokens at the least; there is room for {most}", text.len());
        Err(invalid(field, why))
    }

    /// Sections of a whole prompt, within the model's length.
    pub(crate) fn prompt(&self, request: &mut Generation, described: &Described) -> Result<Prompt, Status> {
        let most = described.max_tokens;
        for (field, text) in
            [("prefix", request.prefix.as_deref().unwrap_or_default()), ("question", &request.question)]
        {
            self.refuse_long(field, text, most)?;
        }
        // Every chunk has a token at least.
        if request.chunks.len() > most {
            let why = format_args!("{} of them; the model takes {most} tokens", request.chunks.len());
            return Err(invalid("chunks", why));
        }
        let head = request.prefix.as_deref().unwrap_or(&self.composer.format().anchor);
        let prefix = self.composer.prefix(head).map_err(|error| invalid("prefix", error))?;
        let question =
            self.composer.question(&request.question).map_err(|error| invalid("question", error))?;
        let scope = self.secret.scope(Scope::Tenant(&request.tenant), &request.salt);
        let prefix_key = ChunkKey::new(&described.layout_id, &described.no_anchor, &scope, &prefix.ids);
        let mut chunks = Vec::with_capacity(request.chunks.len());
        for (index, chunk) in std::mem::take(&mut request.chunks).into_iter().enumerate() {
            let field = format!("chunks[{index}].text");
            chunks.push(self.chunk(&field, chunk, &request.tenant, &request.salt, described)?);
        }
        let reusable = prefix.ids.len() + chunks.iter().map(|chunk| chunk.section.ids.len()).sum::<usize>();
        let lengths = Lengths {
            prefix: prefix.ids.len(),
            chunks: reusable - prefix.ids.len(),
            question: question.ids.len(),
            answer: request.sampling.max_tokens as usize,
        };
        lengths.check(most)?;
        let sections = v1::Sections {
            layout: id_bytes(described.layout_id.as_bytes()),
            anchor: id_bytes(described.anchor.as_bytes()),
            prefix: Some(keyed(&prefix_key, &prefix)),
            chunks: chunks.iter().map(|chunk| keyed(&chunk.key, &chunk.section)).collect(),
            question: Some(v1::TokenSection {
                spans: flat_spans(&question.spans),
                ids: question.ids,
                ..Default::default()
            }),
            policy: request.policy.name().into(),
            ratio: request.ratio,
            strict: request.strict,
            sampling: Some(request.sampling.clone()),
            // Without the caller's salt: who salts does not get more turns.
            tenant: id_bytes(self.secret.scope(Scope::Tenant(&request.tenant), "").as_bytes()),
        };
        // Without reuse nothing is looked up.
        let reusable =
            if request.policy == Policy::Full { 0 } else { u32::try_from(reusable).unwrap_or(u32::MAX) };
        Ok(Prompt { sections, chunks: chunks.into_iter().map(|chunk| chunk.asked).collect(), reusable })
    }
}

/// A section as the worker takes it.
pub(crate) fn keyed(key: &ChunkKey, section: &Section) -> v1::TokenSection {
    v1::TokenSection {
        key: id_bytes(key.as_bytes()),
        ids: section.ids.clone(),
        spans: flat_spans(&section.spans),
    }
}

/// Tokens of a prompt's parts, and of the longest answer.
struct Lengths {
    prefix: usize,
    chunks: usize,
    question: usize,
    answer: usize,
}

impl Lengths {
    /// Names the field to make shorter: the longest of those that leave no room, or the answer's limit where only
    /// that does not fit.
    fn check(&self, most: usize) -> Result<(), Status> {
        let prompt = self.prefix + self.chunks + self.question;
        let answer = self.answer;
        if prompt.saturating_add(answer) <= most {
            return Ok(());
        }
        let parts = [(self.chunks, "chunks"), (self.question, "question"), (self.prefix, "prefix")];
        // Of equally long parts the first: chunks are what a caller can leave out.
        let longest =
            parts.iter().rev().max_by_key(|(tokens, _)| *tokens).map_or("chunks", |(_, field)| field);
        let field = if prompt < most { "sampling.max_tokens" } else { longest };
        Err(invalid(
            field,
            format_args!("prompt of {prompt} tokens and answer of up to {answer} exceed the model's {most}"),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_that_is_too_long_is_blamed_on_its_longest_part() {
        let check = |prefix, chunks, question, answer| {
            let refused = Lengths { prefix, chunks, question, answer }.check(100);
            refused.err().map(|status| status.message().split(':').next().unwrap_or_default().to_owned())
        };
        assert_eq!(check(10, 50, 20, 20), None);
        assert_eq!(check(10, 50, 20, 21).as_deref(), Some("sampling.max_tokens"));
        assert_eq!(check(10, 90, 20, 1).as_deref(), Some("chunks"));
        assert_eq!(check(90, 10, 20, 1).as_deref(), Some("prefix"));
        assert_eq!(check(1, 10, 100, 1).as_deref(), Some("question"));
        assert_eq!(check(1, 0, 100, 1).as_deref(), Some("question"));
    }
}
