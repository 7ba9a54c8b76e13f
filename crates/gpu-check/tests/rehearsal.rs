//! The real program, from its command line to its report, on the CPU.
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};

fn check(arguments: &[&str], out: &Path) -> Output {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny");
    Command::new(env!("CARGO_BIN_EXE_cacheclip-gpu-check"))
        .args(["--out", out.to_str().unwrap(), "--models", models.to_str().unwrap()])
        .args(arguments)
        .output()
        .unwrap()
}

fn report(out: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(out).unwrap()).unwrap()
}

#[test]
fn a_rehearsal_gives_every_part_and_says_that_it_is_one() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.json");
    let done = check(&["--rehearse", "--seconds", "3000"], &out);
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(done.status.success(), "{said}");
    let report = report(&out);
    assert_eq!(report["rehearsal"], true);
    let parts = report["parts"].as_array().unwrap();
    let names: Vec<&str> = parts.iter().map(|part| part["part"].as_str().unwrap()).collect();
    assert_eq!(names[0], "device");
    assert_eq!(names.len(), 9);
    assert!(parts.iter().all(|part| part["state"] == "done"), "{said}");
    let rows = |kind: &str| {
        let all = parts.iter().flat_map(|part| part["rows"].as_array().unwrap());
        all.filter(|row| row["row"] == kind).cloned().collect::<Vec<_>>()
    };
    assert_eq!(rows("certificate")[0]["passed"], true);
    let answers = &rows("answers")[0];
    assert_eq!(
        (&answers["n"], &answers["equal_full"], &answers["equal_reuse"]),
        (&3.into(), &3.into(), &3.into())
    );
    // A control that another prompt's logits would not meet.
    assert!(answers["least_control"].as_f64().unwrap() > 0.01, "{answers}");
    assert_eq!(rows("prompt").len(), 3 * 2);
    assert_eq!(rows("overlap").len() + rows("from_store").len(), 2);
    assert_eq!(rows("decode_model").len(), 2);
    let summary = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(summary.contains("speed-up of 16K tokens"), "{summary}");
}

#[test]
fn a_run_whose_time_is_up_keeps_what_it_has() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.json");
    let done = check(&["--rehearse", "--seconds", "4", "--parts", "exact,prompts14b"], &out);
    let report = report(&out);
    let parts = report["parts"].as_array().unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    assert_eq!(parts.len(), 3, "{said}");
    assert!(parts.iter().all(|part| part["state"] == "done" || part["state"] == "cut"), "{report}");
    // Nothing failed; what was cut is not called done.
    let whole = parts.iter().all(|part| part["state"] == "done");
    assert_eq!(done.status.code(), Some(if whole { 0 } else { 75 }), "{said}");
    let has = |kind: &str| {
        parts.iter().any(|part| part["rows"].as_array().unwrap().iter().any(|row| row["row"] == kind))
    };
    assert!(has("device") && has("certificate"), "{report}");
}

#[test]
fn without_a_gpu_it_says_so_in_one_line_and_ends_with_a_code_of_its_own() {
    if Path::new("/dev/nvidiactl").exists() {
        eprintln!("skipped: this machine has a GPU");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.json");
    let done = check(&["--part", "device", "--no-peers"], &out);
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert_eq!(said.lines().count(), 1, "{said}");
    // No device, or a build without CUDA.
    let code = done.status.code().unwrap();
    assert!([80, 86].contains(&code), "{code}: {said}");
    let whole = check(&["--no-peers"], &out);
    assert_eq!(whole.status.code(), Some(code), "no further part begins");
    assert!(!out.exists(), "nothing was measured");
}
