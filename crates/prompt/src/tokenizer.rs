//! Text to token ids with byte spans, and back.

use crate::{Error, spans};
use cacheclip_chunk::ByteSpan;
use serde::Deserialize;
use std::collections::HashMap;
use std::fmt;
use std::path::Path;
use std::sync::Arc;
use tokenizers::{DecoderWrapper, ModelWrapper};

/// What a normaliser may shrink a text by, generously.
const NORMALISED: usize = 4;

/// Token ids of a text and the bytes each of them stands for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Encoded {
    /// Token ids.
    pub ids: Vec<u32>,
    /// One span per id; together a partition of the text.
    pub spans: Vec<ByteSpan>,
}

/// A tokenizer from a Hugging Face model directory. Cheap to clone.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<Inner>,
}

struct Inner {
    /// Recognises special tokens by their names, for texts of the prompt's author.
    template: tokenizers::Tokenizer,
    /// Takes those names as plain text, for retrieved passages: a passage must not be able to end a turn.
    plain: tokenizers::Tokenizer,
    /// Byte lengths of added tokens, which are not written in the byte-level alphabet.
    added: HashMap<u32, usize>,
    /// The vocabulary is written in the byte-level alphabet: one character for one byte.
    byte_level: bool,
    /// Most bytes of text that one token can stand for; `None` where an unknown word of any length is one token.
    most_bytes: Option<usize>,
    bos: u32,
    eos: Vec<u32>,
    digest: [u8; 32],
}

/// The part of `config.json` that concerns tokens.
#[derive(Deserialize)]
struct Config {
    bos_token_id: Option<u32>,
    eos_token_id: Option<OneOrMany>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

impl Tokenizer {
    /// Reads `tokenizer.json`, and the BOS and EOS ids from `config.json`.
    ///
    /// # Errors
    /// Files that are missing or malformed; a configuration without BOS or EOS.
    pub fn from_dir(dir: &Path) -> Result<Self, Error> {
        let path = dir.join("tokenizer.json");
        let bytes = read(&path)?;
        let malformed = |reason: String| Error::Malformed { path: path.clone(), reason };
        let mut template =
            tokenizers::Tokenizer::from_bytes(&bytes).map_err(|error| malformed(error.to_string()))?;
        // A file may ask for either; both would change a chunk's ids by its length.
        template.with_padding(None);
        template.with_truncation(None).map_err(|error| malformed(error.to_string()))?;
        let mut plain = template.clone();
        plain.set_encode_special_tokens(true);
        let added = template.get_added_tokens_decoder();
        let added = added.iter().map(|(id, token)| (*id, token.content.len())).collect();
        let byte_level = matches!(template.get_decoder(), Some(DecoderWrapper::ByteLevel(_)));
        let most_bytes = most_bytes(&template, byte_level);
        let (bos, eos) = special_ids(&dir.join("config.json"), &template)?;
        template.decode(&[bos], false).map_err(|error| malformed(format!("it cannot decode: {error}")))?;
        let digest = *blake3::hash(&bytes).as_bytes();
        Ok(Self {
            inner: Arc::new(Inner { template, plain, added, byte_level, most_bytes, bos, eos, digest }),
        })
    }

    /// How many tokens a text of so many bytes has at the least: tells that it is too long before anything is spent
    /// on it.
    pub fn at_least(&self, bytes: usize) -> usize {
        self.inner.most_bytes.map_or(0, |most| bytes / most)
    }

    /// Tokenises untrusted text: names of special tokens in it are plain text. No BOS is added.
    ///
    /// # Errors
    /// A text that is too long or that the tokenizer refuses.
    pub fn encode(&self, text: &str) -> Result<Encoded, Error> {
        self.encode_with(&self.inner.plain, text)
    }

    /// Tokenises text of the prompt's author, where `<|im_end|>` and its like mean what they say.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_template(&self, text: &str) -> Result<Encoded, Error> {
        self.encode_with(&self.inner.template, text)
    }

    fn encode_with(&self, tokenizer: &tokenizers::Tokenizer, text: &str) -> Result<Encoded, Error> {
        if u32::try_from(text.len()).is_err() {
            return Err(Error::TooLong { bytes: text.len() });
        }
        // `encode` reports byte offsets; `encode_char_offsets` and the Python bindings report characters.
        let encoding = tokenizer.encode(text, false).map_err(|error| Error::Encode(error.to_string()))?;
        let spans = self
            .exact_spans(&encoding, text)
            .unwrap_or_else(|| spans::from_offsets(encoding.get_offsets(), text.len()));
        Ok(Encoded { ids: encoding.get_ids().to_vec(), spans })
    }

    /// Spans to the byte, where tokens are written in bytes and the text was not normalised before.
    fn exact_spans(&self, encoding: &tokenizers::Encoding, text: &str) -> Option<Vec<ByteSpan>> {
        let normalised = self.inner.template.get_normalizer().is_some() && !text.is_ascii();
        if !self.inner.byte_level || normalised {
            return None;
        }
        let tokens = encoding.get_ids().iter().zip(encoding.get_tokens());
        let lengths: Vec<_> = tokens
            .map(|(id, token)| self.inner.added.get(id).copied().unwrap_or_else(|| token.chars().count()))
            .collect();
        spans::exact(&lengths, text.len())
    }

    /// The text of some tokens. Special tokens and ids outside the vocabulary are left out.
    pub fn decode(&self, ids: &[u32]) -> String {
        // Decoding was tried at loading; a decoder fails on its own settings and not on ids.
        self.inner.template.decode(ids, true).unwrap_or_default()
    }

    /// The id every prompt and every anchor begins with.
    pub fn bos(&self) -> u32 {
        self.inner.bos
    }

    /// The ids that end an answer; at least one.
    pub fn eos(&self) -> &[u32] {
        &self.inner.eos
    }

    /// Number of ids, added tokens included.
    pub fn vocabulary(&self) -> usize {
        self.inner.template.get_vocab_size(true)
    }

    /// blake3 of `tokenizer.json`: part of the identity of a KV layout.
    pub fn digest(&self) -> [u8; 32] {
        self.inner.digest
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocabulary", &self.vocabulary())
            .field("bos", &self.inner.bos)
            .field("eos", &self.inner.eos)
            .finish_non_exhaustive()
    }
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    std::fs::read(path).map_err(|source| Error::Read { path: path.to_owned(), source })
}

/// Most bytes of text one token can stand for. In the vocabulary's own writing a token is never shorter than its
/// text, as long as every byte has a token to fall back on; a normaliser may also drop or compose some.
fn most_bytes(tokenizer: &tokenizers::Tokenizer, byte_level: bool) -> Option<usize> {
    let falls_back = matches!(tokenizer.get_model(), ModelWrapper::BPE(model) if model.byte_fallback);
    if !byte_level && !falls_back {
        return None;
    }
    let longest = tokenizer.get_vocab(true).keys().map(String::len).max()?.max(1);
    Some(if tokenizer.get_normalizer().is_some() { longest * NORMALISED } else { longest })
}

fn special_ids(path: &Path, tokenizer: &tokenizers::Tokenizer) -> Result<(u32, Vec<u32>), Error> {
    let malformed = |reason: String| Error::Malformed { path: path.to_owned(), reason };
    let config: Config =
        serde_json::from_slice(&read(path)?).map_err(|error| malformed(error.to_string()))?;
    let bos = config.bos_token_id.ok_or_else(|| malformed("bos_token_id is missing".into()))?;
    let eos = match config.eos_token_id {
        Some(OneOrMany::One(id)) => vec![id],
        Some(OneOrMany::Many(ids)) if !ids.is_empty() => ids,
        _ => return Err(malformed("eos_token_id is missing".into())),
    };
    for id in eos.iter().chain([&bos]) {
        if tokenizer.id_to_token(*id).is_none() {
            return Err(malformed(format!("token id {id} is not in tokenizer.json")));
        }
    }
    Ok((bos, eos))
}
