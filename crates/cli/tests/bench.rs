//! What `cacheclip bench` prints, from the real program.

use serde_json::Value;
use std::process::{Command, Output};

fn bench(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_cacheclip"))
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
        .arg("bench")
        .args(arguments)
        .output()
        .expect("the program runs")
}

#[test]
fn speed_reports_every_row_with_its_stages_spread_and_costs() {
    let store = std::path::Path::new(env!("CARGO_BIN_EXE_cacheclip")).with_file_name("cacheclip-cache-store");
    assert!(store.is_file(), "{} is not built: run ./test, which builds the binaries first", store.display());
    let asked = "speed --tokens 256 --chunk 128 --ratios 0.2,0 --runs 2 --json";
    let output = bench(&asked.split(' ').collect::<Vec<_>>());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert!(report["machine"]["cpu"].is_string() && report["peak_rss_bytes"].as_u64() > Some(100 << 20));
    let rows = report["rows"].as_array().expect("rows");
    assert_eq!(rows.len(), 2, "one per ratio");
    for (row, ratio) in rows.iter().zip([0.2, 0.0]) {
        assert_eq!(row["hits"], row["chunks"], "what was ingested is found");
        let realised = row["realised_ratio"].as_f64().expect("a ratio");
        assert!(
            realised <= ratio + 0.05 && (ratio == 0.0 || realised > ratio / 2.0),
            "{realised} for {ratio}"
        );
        for runs in ["ttft_full_ms", "ttft_reuse_ms", "speedup", "cpu_seconds_full", "cpu_seconds_reuse"] {
            let of = |field: &str| row[runs][field].as_f64().expect("a number");
            assert_eq!(of("n"), 2.0);
            assert!(of("least") <= of("median") && of("median") <= of("most") && of("most") > 0.0, "{runs}");
        }
        for stage in ["load", "recompute", "aux_question"] {
            assert!(row["stages_ms"][stage].as_f64() > Some(0.0), "{stage} in {}", row["stages_ms"]);
        }
    }
}

#[test]
fn peers_that_are_not_installed_are_named_with_the_place_that_tells_how() {
    let output = bench(&["peers", "--python", "no-such-python", "--tokens", "16", "--runs", "1"]);
    assert_eq!(output.status.code(), Some(1));
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(told.contains("no-such-python") && told.contains("crates/bench/peers/README.md"), "{told}");
}

#[test]
fn an_unknown_shape_is_refused_by_name() {
    let output = bench(&["peers", "--shape", "gpt-2"]);
    assert_eq!(output.status.code(), Some(1));
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(told.contains("gpt-2") && told.contains("smollm2-135m"), "{told}");
}
