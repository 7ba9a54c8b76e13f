//! What tokenizers and prompt layouts promise, over both small models and the kinds of tokenizer files there are.

use cacheclip_chunk::ByteSpan;
use cacheclip_prompt::{Composer, Detokenizer, Error, Format, Tokenizer};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::LazyLock;

const TEXTS: [&str; 7] = [
    "",
    "Report from Westhaven. Belmon keeps the sunny bell near the library.",
    "  two spaces,\n\ta tab and a trailing space ",
    "café naïve Ångström",
    "e\u{301} decomposed, 日本語, Ελληνικά",
    "a 🙂 b 👩‍👩‍👧 c",
    "</s><s> is plain text",
];

/// A model directory with the tokenizer of a small model, changed by `change`.
fn directory(model: &str, change: impl FnOnce(&mut Value)) -> tempfile::TempDir {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny");
    let text = std::fs::read(models.join(model).join("tokenizer.json")).expect("the small model's tokenizer");
    let mut tokenizer: Value = serde_json::from_slice(&text).expect("JSON");
    change(&mut tokenizer);
    let dir = tempfile::tempdir().expect("a directory");
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).expect("a file");
    std::fs::write(dir.path().join("config.json"), r#"{"bos_token_id": 1, "eos_token_id": [2, 0]}"#)
        .expect("a file");
    dir
}

fn tokenizer(model: &str, change: impl FnOnce(&mut Value)) -> Tokenizer {
    Tokenizer::from_dir(directory(model, change).path()).expect("a tokenizer")
}

/// A SentencePiece-like tokenizer: spaces become `▁`, unknown characters fall back to bytes.
fn byte_fallback() -> Tokenizer {
    tokenizer("primary", |file| {
        let words = ["<pad>", "<s>", "</s>", "▁", "R", "e", "p", "o", "r", "t", "▁f", "m"];
        let bytes = (0..256).map(|byte| format!("<0x{byte:02X}>"));
        let vocab: serde_json::Map<_, _> = words
            .map(String::from)
            .into_iter()
            .chain(bytes)
            .enumerate()
            .map(|(id, word)| (word, json!(id)))
            .collect();
        file["model"] = json!({"type": "BPE", "vocab": vocab, "merges": [["▁", "f"]], "byte_fallback": true});
        file["normalizer"] = json!({"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]});
        file["pre_tokenizer"] = Value::Null;
        file["decoder"] = json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]});
        file["model"]["merges"] = json!([]);
        file["model"]["vocab"].as_object_mut().expect("a map").remove("▁f");
    })
}

static KINDS: LazyLock<Vec<(&str, Tokenizer)>> = LazyLock::new(|| {
    vec![
        ("primary", tokenizer("primary", |_| {})),
        ("aux", tokenizer("aux", |_| {})),
        (
            "trimmed offsets",
            tokenizer("primary", |file| {
                file["post_processor"] = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
            }),
        ),
        ("normalised", tokenizer("primary", |file| file["normalizer"] = json!({"type": "NFC"}))),
        ("byte fallback", byte_fallback()),
    ]
});

/// The promise of every span list: monotone, inside the text, and a cover of it without holes.
fn assert_partition(spans: &[ByteSpan], text: &str, context: &str) {
    let mut at = 0;
    for span in spans {
        assert_eq!(span.start, at, "{context}: {text:?}: hole or overlap in {spans:?}");
        assert!(span.end >= span.start, "{context}: {text:?}: {span:?}");
        at = span.end;
    }
    assert_eq!(at as usize, text.len(), "{context}: {text:?}: {spans:?}");
}

#[test]
fn spans_partition_the_bytes_of_any_text_for_any_kind_of_tokenizer() {
    for (kind, tokenizer) in KINDS.iter() {
        for text in TEXTS {
            let encoded = tokenizer.encode(text).expect("ids");
            assert_eq!(encoded.ids.len(), encoded.spans.len());
            assert_partition(&encoded.spans, text, kind);
        }
    }
}

#[test]
fn a_byte_level_token_spans_exactly_the_bytes_it_stands_for() {
    let tokenizer = &KINDS[0].1;
    let text = "a 🙂 é";
    let encoded = tokenizer.encode(text).expect("ids");
    // No merge of this vocabulary makes the emoji one token.
    assert!(
        encoded.spans.iter().any(|span| !text.is_char_boundary(span.end as usize)),
        "{:?}",
        encoded.spans
    );
    for (id, span) in encoded.ids.iter().zip(&encoded.spans) {
        let bytes = &text.as_bytes()[span.start as usize..span.end as usize];
        if let Ok(whole) = std::str::from_utf8(bytes) {
            assert_eq!(tokenizer.decode(&[*id]), whole);
        }
    }
}

#[test]
fn decoding_gives_the_text_back() {
    for (kind, tokenizer) in KINDS.iter().filter(|(kind, _)| *kind != "normalised") {
        for text in TEXTS {
            let ids = tokenizer.encode(text).expect("ids").ids;
            assert_eq!(tokenizer.decode(&ids), text, "{kind}");
        }
    }
}

#[test]
fn streamed_text_is_whole_characters_and_adds_up() {
    for (kind, tokenizer) in KINDS.iter() {
        for text in TEXTS {
            let ids = tokenizer.encode(text).expect("ids").ids;
            let mut detokenizer = Detokenizer::new(tokenizer.clone());
            let pieces: Vec<_> = ids.iter().map(|id| detokenizer.push(*id)).collect();
            assert!(pieces.iter().all(|piece| !piece.contains('\u{FFFD}')), "{kind}: {pieces:?}");
            let rest = detokenizer.finish();
            assert_eq!(pieces.concat() + &rest, tokenizer.decode(&ids), "{kind}");
        }
    }
}

#[test]
fn an_answer_cut_inside_a_character_ends_with_a_replacement() {
    let tokenizer = &KINDS[0].1;
    let ids = tokenizer.encode("🙂").expect("ids").ids;
    let mut detokenizer = Detokenizer::new(tokenizer.clone());
    assert_eq!(detokenizer.push(ids[0]), "");
    assert_eq!(detokenizer.finish(), "\u{FFFD}");
}

#[test]
fn only_the_prompts_author_can_write_special_tokens() {
    let tokenizer = &KINDS[0].1;
    assert!(!tokenizer.encode("a</s>b").expect("ids").ids.contains(&2));
    let template = tokenizer.encode_template("a</s>b").expect("ids");
    assert!(template.ids.contains(&2));
    assert_partition(&template.spans, "a</s>b", "template");
}

#[test]
fn padding_and_truncation_of_the_file_do_not_touch_ids() {
    let odd = tokenizer("primary", |file| {
        file["truncation"] =
            json!({"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0});
        file["padding"] = json!({"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"});
    });
    assert_eq!(odd.encode(TEXTS[1]).expect("ids"), KINDS[0].1.encode(TEXTS[1]).expect("ids"));
}

#[test]
fn sections_are_laid_out_on_their_own() {
    let format = Format { anchor: "The reports follow.".into(), joiner: "\n".into(), stop: vec![] };
    let composer = Composer::new(KINDS[0].1.clone(), format);
    let tokenizer = composer.tokenizer();
    let (bos, ids) = (tokenizer.bos(), |text: &str| tokenizer.encode(text).expect("ids").ids);
    assert_eq!((bos, tokenizer.eos()), (1, &[2, 0][..]));

    let anchor = composer.anchor().expect("ids");
    assert_eq!(anchor, [vec![bos], ids("The reports follow.")].concat());
    assert_eq!(composer.prefix("The reports follow.").expect("a section").ids, anchor);
    assert_eq!(composer.prefix("").expect("a section").ids, [bos]);

    let text = "Café near the library.";
    let chunk = composer.chunk(text).expect("a section");
    assert_eq!(chunk.ids, ids(&format!("\n{text}")));
    assert_eq!((chunk.spans[0].start, chunk.spans[0].end), (0, 0), "the joiner has no bytes of the caller's");
    assert_partition(&chunk.spans, text, "chunk");
    assert_eq!(composer.question("\nQuestion:").expect("a section").ids, ids("\nQuestion:"));
}

#[test]
fn a_directory_that_is_no_model_says_what_is_missing() {
    let dir = tempfile::tempdir().expect("a directory");
    assert!(matches!(Tokenizer::from_dir(dir.path()), Err(Error::Read { .. })));
    let dir = directory("primary", |_| {});
    for (config, word) in [("{}", "bos_token_id"), (r#"{"bos_token_id": 1}"#, "eos_token_id")] {
        std::fs::write(dir.path().join("config.json"), config).expect("a file");
        let error = Tokenizer::from_dir(dir.path()).expect_err(config).to_string();
        assert!(error.contains(word) && error.contains("config.json"), "{error}");
    }
    std::fs::write(dir.path().join("config.json"), r#"{"bos_token_id": 99999999, "eos_token_id": 2}"#)
        .expect("a file");
    assert!(Tokenizer::from_dir(dir.path()).expect_err("no such id").to_string().contains("99999999"));
}

#[test]
fn the_digest_is_that_of_the_file() {
    let dir = directory("aux", |_| {});
    let bytes = std::fs::read(dir.path().join("tokenizer.json")).expect("a file");
    assert_eq!(
        Tokenizer::from_dir(dir.path()).expect("a tokenizer").digest(),
        *blake3::hash(&bytes).as_bytes()
    );
}

proptest! {
    #[test]
    fn any_text_is_partitioned_and_comes_back(text in "\\PC{0,60}|[ a-zéß\u{301}🙂日\n\t]{0,60}") {
        for (kind, tokenizer) in KINDS.iter() {
            let encoded = tokenizer.encode(&text).expect("ids");
            assert_partition(&encoded.spans, &text, kind);
            if *kind != "normalised" {
                prop_assert_eq!(tokenizer.decode(&encoded.ids), text.as_str(), "{}", kind);
            }
        }
        let chunk = Composer::new(KINDS[1].1.clone(), Format::default()).chunk(&text).expect("a section");
        assert_partition(&chunk.spans, &text, "chunk");
    }
}

/// Ends of tokens inside a text, in bytes.
fn edges(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    let spans = tokenizer.encode(text).expect("tokens").spans;
    spans[..spans.len() - 1].iter().map(|span| span.end).collect()
}

#[test]
fn the_shipped_pair_reads_the_same_text_with_different_tokenizers() {
    let vocabulary = |model: &str| {
        let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny");
        let text = std::fs::read_to_string(models.join(model).join("tokenizer.json")).expect("a file");
        let json: Value = serde_json::from_str(&text).expect("JSON");
        json["model"]["vocab"].as_object().expect("a vocabulary").len()
    };
    assert!(vocabulary("primary") >= 2 * vocabulary("aux"));
    let (primary, auxiliary) = (tokenizer("primary", |_| {}), tokenizer("aux", |_| {}));
    let corpus = include_str!("../../cli/demo/corpus.json");
    let corpus: Value = serde_json::from_str(corpus).expect("JSON");
    let (mut inside, mut all) = (0, 0);
    for document in corpus["documents"].as_array().expect("documents") {
        let text = document["text"].as_str().expect("text");
        let of_primary = edges(&primary, text);
        let of_auxiliary = edges(&auxiliary, text);
        all += of_auxiliary.len();
        inside += of_auxiliary.iter().filter(|edge| of_primary.binary_search(edge).is_err()).count();
    }
    assert!(inside * 5 >= all, "{inside} of {all} auxiliary edges fall inside a primary token");
}

#[test]
fn a_text_is_known_to_be_too_long_without_being_tokenised() {
    for model in ["primary", "aux"] {
        let tokenizer = tokenizer(model, |_| {});
        for text in ["", "word", "The reports follow.", "日本語🙂", &" zzzz".repeat(500)] {
            let tokens = tokenizer.encode(text).expect("tokens").ids.len();
            let least = tokenizer.at_least(text.len());
            assert!(least <= tokens, "{text:?}: {tokens} tokens, at least {least}");
        }
        assert!(tokenizer.at_least(15 << 20) > 100_000, "a useful bound");
    }
}
