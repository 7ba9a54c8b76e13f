//! The arrows between crates, read from `cargo metadata` and from the sources: down only, never sideways, and some
//! things in one place only. docs/architecture.md, "Layers", says why.
//!
//! Normal and build dependencies count, optional ones included. What a crate's own tests use is not in the product.

use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Rows from the bottom: a crate may use what stands in a lower row.
const ROWS: [&[&str]; 7] = [
    &["cacheclip-chunk"],
    &["cacheclip-rpc", "cacheclip-plan", "cacheclip-prompt", "cacheclip-kernels"],
    &["cacheclip-client", "cacheclip-service", "cacheclip-model"],
    &["cacheclip-gateway", "cacheclip-gpu-worker", "cacheclip-aux-scorer", "cacheclip-cache-store"],
    &["cacheclip-bench"],
    &["cacheclip", "cacheclip-gpu-check"],
    &["cacheclip-tests"],
];

/// The one arrow that may point sideways: the client dials with the service's connector.
const SIDEWAYS: (&str, &str) = ("cacheclip-client", "cacheclip-service");

/// Packages (a name, and every name that starts with it and a dash) that only some crates may use.
const RESERVED: [(&[&str], &[&str]); 6] = [
    (&["candle"], &["cacheclip-model"]),
    (&["object_store", "redb"], &["cacheclip-cache-store"]),
    // The command line measures a store beside Redis.
    (&["redis"], &["cacheclip-cache-store", "cacheclip"]),
    (
        &["opentelemetry", "opentelemetry_sdk", "opentelemetry-otlp", "tracing-opentelemetry"],
        &["cacheclip-service", "cacheclip-tests"],
    ),
    (&["cudarc"], &["cacheclip-kernels", "cacheclip-model"]),
    (
        &["tonic"],
        &[
            "cacheclip-rpc",
            "cacheclip-client",
            "cacheclip-service",
            "cacheclip-gateway",
            "cacheclip-gpu-worker",
            "cacheclip-aux-scorer",
            "cacheclip-cache-store",
            "cacheclip-bench",
            "cacheclip",
            "cacheclip-tests",
        ],
    ),
];

/// All that a crate of pure functions may use.
const PURE: [(&str, &[&str]); 1] = [("cacheclip-plan", &["cacheclip-chunk", "serde", "thiserror"])];

/// What the lowest crates do without: runtimes, threads, sockets, clocks.
const NO_IO: [&str; 4] = ["cacheclip-chunk", "cacheclip-plan", "cacheclip-prompt", "cacheclip-kernels"];
const IO: [&str; 8] = ["tokio", "futures", "hyper", "axum", "tower", "reqwest", "async-std", "smol"];

/// Words of sources that touch the world outside of the process, or wait for it.
const OUTSIDE: [&str; 10] = [
    "std::fs",
    "std::io",
    "std::net",
    "std::env",
    "std::time",
    "std::thread",
    "std::process",
    "tokio",
    "async fn",
    ".await",
];
/// Words of sources whose functions keep something between calls.
const STATE: [&str; 5] = ["std::sync", "static mut", "thread_local!", "RefCell", "rand::"];

fn row(name: &str) -> Option<usize> {
    ROWS.iter().position(|row| row.contains(&name))
}

fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value[field].as_str().unwrap_or_default()
}

fn family(package: &str, name: &str) -> bool {
    package.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
}

/// Every arrow of the workspace that may not be there, as a sentence.
fn broken(metadata: &Value) -> Vec<String> {
    let mut broken = Vec::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let from = text(package, "name");
        let Some(high) = row(from) else {
            broken.push(format!("{from} has no place in the layers"));
            continue;
        };
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let to = text(dependency, "name");
            if text(dependency, "kind") == "dev" {
                continue;
            }
            match row(to) {
                Some(low) if low < high || (from, to) == SIDEWAYS => {}
                Some(low) if low == high => broken.push(format!("{from} uses {to}, which stands beside it")),
                Some(_) => broken.push(format!("{from} uses {to}, which stands above it")),
                None => {}
            }
            for (names, owners) in RESERVED {
                if names.iter().any(|name| family(to, name)) && !owners.contains(&from) {
                    broken.push(format!("{from} uses {to}, which is for {} alone", owners.join(", ")));
                }
            }
            for (pure, may) in PURE {
                if from == pure && !may.contains(&to) {
                    broken.push(format!("{from} uses {to}, but it is pure: {} will do", may.join(", ")));
                }
            }
            if NO_IO.contains(&from) && IO.iter().any(|name| family(to, name)) {
                broken.push(format!("{from} uses {to}, but it waits for nothing"));
            }
        }
    }
    broken
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Only what the manifests say: nothing is resolved, nothing is downloaded.
fn metadata() -> Value {
    let told = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--offline", "--no-deps"])
        .current_dir(root())
        .output()
        .expect("cargo runs");
    assert!(told.status.success(), "{}", String::from_utf8_lossy(&told.stderr));
    serde_json::from_slice(&told.stdout).expect("JSON")
}

#[test]
fn arrows_point_down_and_what_is_reserved_stays_where_it_belongs() {
    let metadata = metadata();
    let packages = metadata["packages"].as_array().expect("packages");
    for name in ROWS.iter().flat_map(|row| row.iter()) {
        assert!(
            packages.iter().any(|package| text(package, "name") == *name),
            "{name} is not in the workspace"
        );
    }
    let arrows = packages.iter().filter_map(|package| package["dependencies"].as_array()).flatten();
    let inside = arrows.filter(|dependency| row(text(dependency, "name")).is_some()).count();
    assert!(inside > 30, "only {inside} arrows were seen");
    let broken = broken(&metadata);
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}

/// A workspace of one crate with one dependency.
fn fabricated(from: &str, to: &str, kind: Option<&str>) -> Value {
    json!({ "packages": [{ "name": from, "dependencies": [{ "name": to, "kind": kind, "optional": true }] }] })
}

#[test]
fn a_broken_arrow_is_reported_and_a_sound_one_is_not() {
    let wrong = [
        ("cacheclip-plan", "cacheclip-model", "above"),
        ("cacheclip-chunk", "cacheclip-rpc", "above"),
        ("cacheclip-service", "cacheclip", "above"),
        ("cacheclip-gateway", "cacheclip-gpu-worker", "beside"),
        ("cacheclip-service", "cacheclip-client", "beside"),
        ("cacheclip-prompt", "cacheclip-plan", "beside"),
        ("cacheclip-plan", "cacheclip-plan", "beside"),
        ("cacheclip-gpu-worker", "candle-core", "alone"),
        ("cacheclip-kernels", "candle-nn", "alone"),
        ("cacheclip-gateway", "redis", "alone"),
        ("cacheclip-client", "object_store", "alone"),
        ("cacheclip-service", "redb", "alone"),
        ("cacheclip-gpu-worker", "cudarc", "alone"),
        ("cacheclip-gateway", "opentelemetry_sdk", "alone"),
        ("cacheclip-client", "tracing-opentelemetry", "alone"),
        ("cacheclip-model", "tonic", "alone"),
        ("cacheclip-prompt", "tonic-prost", "alone"),
        ("cacheclip-plan", "rand", "pure"),
        ("cacheclip-chunk", "tokio", "waits"),
        ("cacheclip-kernels", "tokio-util", "waits"),
        ("cacheclip-novelty", "serde", "no place"),
    ];
    for (from, to, why) in wrong {
        for kind in [None, Some("build")] {
            let broken = broken(&fabricated(from, to, kind));
            assert!(!broken.is_empty(), "{from} → {to} was not seen");
            assert!(
                broken.iter().any(|it| it.contains(from) && it.contains(why)),
                "{from} → {to}: {broken:?}"
            );
        }
    }
    let sound = [
        ("cacheclip-client", "cacheclip-service"),
        ("cacheclip-gateway", "cacheclip-chunk"),
        ("cacheclip", "cacheclip-bench"),
        ("cacheclip-tests", "cacheclip"),
        ("cacheclip-model", "candle-core"),
        ("cacheclip-cache-store", "redis"),
        ("cacheclip-kernels", "cudarc"),
        ("cacheclip-service", "opentelemetry-otlp"),
        ("cacheclip-bench", "tonic"),
        ("cacheclip-plan", "thiserror"),
        ("cacheclip-gateway", "redistribution"),
    ];
    for (from, to) in sound {
        assert_eq!(broken(&fabricated(from, to, None)), [""; 0], "{from} → {to}");
    }
    assert_eq!(broken(&fabricated("cacheclip-client", "cacheclip-cache-store", Some("dev"))), [""; 0]);
}

/// Rust sources of the workspace, by their path in it.
fn sources() -> Vec<(String, String)> {
    let mut sources = Vec::new();
    for top in ["crates", "services", "tests"] {
        collect(&root().join(top), top, &mut sources);
    }
    sources
}

fn collect(folder: &Path, within: &str, sources: &mut Vec<(String, String)>) {
    for entry in std::fs::read_dir(folder).expect("a folder of the workspace") {
        let entry = entry.expect("an entry");
        let name = format!("{within}/{}", entry.file_name().to_string_lossy());
        if entry.path().is_dir() {
            collect(&entry.path(), &name, sources);
        } else if name.ends_with(".rs") {
            sources.push((name, std::fs::read_to_string(entry.path()).expect("a source")));
        }
    }
}

/// A line without what stands in quotes or behind `//`.
fn code(line: &str) -> String {
    let (mut kept, mut quoted) = (String::new(), false);
    let mut rest = line.chars().peekable();
    while let Some(next) = rest.next() {
        match next {
            // What is escaped ends no quotes; outside of quotes it is part of a character.
            '\\' => drop(rest.next()),
            // A quote as a character.
            '\'' if !quoted && rest.peek() == Some(&'"') => drop(rest.next()),
            '"' => quoted = !quoted,
            '/' if !quoted && rest.peek() == Some(&'/') => break,
            _ if quoted => {}
            _ => kept.push(next),
        }
    }
    kept
}

/// Numbers of the lines that are `unsafe` or lift the lint against it.
fn unsafe_lines(source: &str) -> Vec<usize> {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let lifts = |line: &str| {
        line.contains("unsafe_code") && ["allow", "expect", "warn"].iter().any(|level| line.contains(level))
    };
    let whole: Vec<String> = source.lines().map(code).collect();
    let hit = |line: &String| line.split(|c| !is_word(c)).any(|word| word == "unsafe");
    // An attribute may stand on several lines.
    let opened =
        |at: usize| lifts(&whole[at.saturating_sub(2)..=at].concat()) && whole[at].contains("unsafe_code");
    (0..whole.len()).filter(|&at| hit(&whole[at]) || opened(at)).map(|at| at + 1).collect()
}

/// Kernels, and the mapping of container files.
fn may_be_unsafe(path: &str) -> bool {
    path.starts_with("crates/kernels/") || path == "crates/chunk/src/mmap.rs"
}

#[test]
fn unsafe_stands_in_the_kernels_alone() {
    let sources = sources();
    assert!(sources.len() > 100, "only {} sources were seen", sources.len());
    let (may, must_not): (Vec<_>, Vec<_>) = sources.iter().partition(|(path, _)| may_be_unsafe(path));
    let found: Vec<String> = must_not
        .iter()
        .flat_map(|(path, source)| unsafe_lines(source).into_iter().map(move |line| format!("{path}:{line}")))
        .collect();
    assert!(found.is_empty(), "unsafe outside of the kernels: {}", found.join(", "));
    assert!(may.iter().any(|(_, source)| !unsafe_lines(source).is_empty()), "the kernels' own is not seen");
}

#[test]
fn unsafe_is_seen_in_code_and_not_in_words_about_it() {
    let seen = [
        "    unsafe { call() }",
        "pub unsafe fn x() {}",
        "let a = \"\\\"\"; unsafe{}",
        "let c = '\"'; unsafe {}",
        "#![allow(unsafe_code)]",
        "#[expect(\n    unsafe_code,\n    reason = \"\")]",
    ];
    for source in seen {
        assert_eq!(unsafe_lines(source).len(), 1, "{source}");
    }
    let quiet = [
        "// unsafe { }",
        "/// Why this is unsafe.",
        "let word = \"unsafe\";",
        "unsafely();",
        "deny(unsafe_code)",
        "unsafe_lines(x)",
    ];
    for source in quiet {
        assert!(unsafe_lines(source).is_empty(), "{source}");
    }
}

/// Which of the words stand in the code of a source.
fn found(words: &[&'static str], source: &str) -> Vec<&'static str> {
    let code: String = source.lines().map(|line| code(line) + "\n").collect();
    words.iter().copied().filter(|word| code.contains(word)).collect()
}

#[test]
fn plan_is_pure_functions() {
    let sources = sources();
    let plan: Vec<_> = sources.iter().filter(|(path, _)| path.starts_with("crates/plan/src/")).collect();
    assert!(plan.len() >= 5, "{} sources of plan were seen", plan.len());
    let words = [&OUTSIDE[..], &STATE[..]].concat();
    for (path, source) in plan {
        assert_eq!(found(&words, source), [""; 0], "{path}");
    }
    let impure = "use std::time::Instant;\nfn now() -> Instant { Instant::now() } // tokio\n";
    assert_eq!(found(&words, impure), ["std::time"], "and the check sees what it looks for");
}

#[test]
fn containers_know_no_files_no_clock_and_no_waiting() {
    let sources = sources();
    let ours = |path: &str| path.starts_with("crates/chunk/src/") && !may_be_unsafe(path);
    let chunk: Vec<_> = sources.iter().filter(|(path, _)| ours(path)).collect();
    assert!(chunk.len() >= 8, "{} sources of chunk were seen", chunk.len());
    for (path, source) in chunk {
        assert_eq!(found(&OUTSIDE, source), [""; 0], "{path}");
    }
}
