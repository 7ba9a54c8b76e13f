//! What `cacheclip eval` prints and writes, from the real program.

use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

fn eval(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_cacheclip"))
        .current_dir(ROOT)
        .arg("eval")
        .args(arguments)
        .output()
        .expect("the program runs")
}

fn report(arguments: &[&str]) -> Value {
    let output = eval(arguments);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn refused(arguments: &[&str]) -> String {
    let output = eval(arguments);
    assert!(!output.status.success(), "{arguments:?} is refused");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_report_has_a_row_per_family_policy_and_ratio_and_is_written_in_four_forms() {
    let dir = tempfile::tempdir().expect("a directory");
    let out = dir.path().to_str().expect("a path");
    let asked = "--families vt-1,niah-multi-key --policies stale,question-on-stale,cacheclip --ratios 0.1,0.2 --n 4 --json";
    let asked: Vec<&str> = asked.split(' ').chain(["--out", out]).collect();
    let found = report(&asked);
    let rows = found["rows"].as_array().expect("rows");
    // Per family and pool: full and stale once, two policies at two ratios.
    assert_eq!(rows.len(), 4 * 6);
    for row in rows {
        for field in ["accuracy", "pct_of_full", "ci_low", "ci_high", "realised_ratio", "n"] {
            assert!(row[field].is_number(), "{field} in {row}");
        }
        if row["policy"] == "cacheclip" {
            let (asked, realised) = (row["ratio"].as_f64(), row["realised_ratio"].as_f64());
            assert!((asked.expect("a ratio") - realised.expect("a ratio")).abs() < 0.002, "{row}");
        }
    }
    let page = std::fs::read_to_string(dir.path().join("report.html")).expect("a page");
    assert!(page.contains("<svg") && page.contains("vt-1"), "drawings are in the page");
    for name in ["by-budget.svg", "by-family.svg", "report.json", "records.jsonl"] {
        assert!(dir.path().join(name).metadata().expect(name).len() > 500, "{name}");
    }
    let error = refused(&asked);
    assert!(error.contains("--resume"), "{error}");
    let again = report(&[&asked[..], &["--resume"]].concat());
    assert_eq!(again["rows"], found["rows"], "nothing is computed twice, and nothing differs");
}

#[test]
fn task_files_in_both_forms_are_evaluated() {
    for (format, family) in [("ruler", "ruler"), ("longbench", "reports")] {
        let file = format!("crates/bench/samples/{format}.jsonl");
        let asked = format!(
            "--tasks {file} --format {format} --chunk-words 30 --policies stale,prefix-only,cacheclip --json"
        );
        let found = report(&asked.split(' ').collect::<Vec<_>>());
        let of = |policy: &str| {
            let rows = found["rows"].as_array().expect("rows");
            rows.iter().find(|row| row["policy"] == policy).unwrap_or_else(|| panic!("{policy}")).clone()
        };
        assert_eq!(of("full")["family"], family);
        assert_eq!(of("full")["n"], 2);
        assert_eq!(of("prefix-only")["accuracy"], of("full")["accuracy"], "prefix caching loses nothing");
        assert!(of("cacheclip")["realised_ratio"].as_f64() > Some(0.0));
    }
}

#[test]
fn what_cannot_be_evaluated_is_named() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("tasks.jsonl");
    std::fs::write(&file, "{\"input\": \"a\\nb\\nc\"}\n").expect("a file");
    let error = refused(&["--tasks", file.to_str().expect("a path"), "--format", "ruler"]);
    assert!(error.contains("tasks.jsonl:1: outputs: missing"), "{error}");
    let error = refused(&["--policies", "cachclip", "--n", "1"]);
    assert!(error.contains("cachclip") && error.contains("question-on-stale"), "{error}");
    let error = refused(&["--families", "vt-9"]);
    assert!(error.contains("vt-9") && error.contains("chunks-16"), "{error}");
    let error = refused(&["--primary", "no/such/model"]);
    assert!(error.contains("no/such/model"), "{error}");
}

#[test]
fn a_model_without_a_certificate_is_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let tiny = Path::new(ROOT).join("models/tiny/primary");
    for name in ["config.json", "tokenizer.json", "prompt.json"] {
        std::fs::copy(tiny.join(name), dir.path().join(name)).expect(name);
    }
    // Weights of nothing: stale and full prefill agree, so the controls show nothing.
    let mut weights = std::fs::read(tiny.join("model.safetensors")).expect("weights");
    let head = u64::from_le_bytes(weights[..8].try_into().expect("a length")) as usize;
    weights[8 + head..].fill(0);
    std::fs::write(dir.path().join("model.safetensors"), weights).expect("weights");
    let error = refused(&["--primary", dir.path().to_str().expect("a path"), "--n", "1"]);
    assert!(error.contains("certificate") && error.contains("control"), "{error}");
}
