//! What `cacheclip bench` prints, from the real program and a real cache-store.

use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};

fn bench(arguments: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_cacheclip"))
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
        .arg("bench")
        .args(arguments.split(' '))
        // No field of any service: would stop one that read the caller's environment.
        .env("CACHECLIP_NO_SUCH_FIELD", "1")
        .output()
        .expect("the program runs")
}

/// What a benchmark of a fleet reports.
fn report(arguments: &str) -> Value {
    let store = Path::new(env!("CARGO_BIN_EXE_cacheclip")).with_file_name("cacheclip-cache-store");
    assert!(store.is_file(), "{} is not built: run ./test, which builds the binaries first", store.display());
    let output = bench(&format!("{arguments} --json"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let machine = &report["machine"];
    assert!(machine["cpu"].is_string() && machine["limits"]["flops"].as_f64() > Some(1e8), "{machine}");
    report
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is a number"))
}

/// So many runs, their median within their ends, all above zero.
fn runs(value: &Value, count: usize) -> f64 {
    let of = |field: &str| number(&value[field]);
    assert_eq!(of("n"), count as f64, "{value}");
    assert!(of("least") > 0.0 && of("least") <= of("median") && of("median") <= of("most"), "{value}");
    of("median")
}

fn rows(report: &Value) -> &[Value] {
    report["rows"].as_array().expect("rows")
}

#[test]
fn speed_reports_every_row_with_its_stages_spread_and_costs() {
    let report = report("speed --tokens 256 --chunk 128 --ratios 0.2,0 --runs 2 --loading always");
    let rows = rows(&report);
    assert_eq!(rows.len(), 2, "one per ratio");
    for (row, ratio) in rows.iter().zip([0.2, 0.0]) {
        assert_eq!(row["hits"], row["chunks"], "what was ingested is found: {}", row["misses"]);
        let realised = number(&row["realised_ratio"]);
        assert!(
            realised <= ratio + 0.05 && (ratio == 0.0 || realised > ratio / 2.0),
            "{realised} for {ratio}"
        );
        for field in ["ttft_full_ms", "ttft_reuse_ms", "speedup", "cpu_seconds_full", "cpu_seconds_reuse"] {
            runs(&row[field], 2);
        }
        for stage in ["load", "recompute", "aux_question"] {
            assert!(number(&row["stages_ms"][stage]) > 0.0, "{stage} in {}", row["stages_ms"]);
        }
        let rate = number(&row["tokens"]) / number(&row["ttft_reuse_ms"]["median"]) * 1e3;
        assert!((number(&row["reuse_tokens_per_second"]) / rate - 1.0).abs() < 1e-6);
        assert_eq!(row["rung"], "scorer");
        // 135M parameters are in the same process.
        assert!(row["peak_rss_bytes"].as_u64() > Some(100 << 20), "{row}");
        let memory = &row["memory"];
        let parts = ["weights_bytes", "pages_bytes", "caches_bytes", "unplaced_bytes"];
        let parts = parts.map(|part| number(&memory[part]));
        assert!(parts[0] > 2.0 * 134e6 && parts.iter().all(|&part| part > 0.0), "{memory}");
        assert_eq!(number(&memory["promised_bytes"]), parts.iter().sum::<f64>());
        let over = number(&row["peak_rss_bytes"]) / number(&memory["promised_bytes"]);
        assert!((number(&memory["peak_over_promised"]) / over - 1.0).abs() < 1e-6, "{memory}");
    }
    let even = report["break_even"].as_array().expect("one per ratio");
    for (even, row) in even.iter().zip(rows) {
        let ahead = number(&row["speedup"]["median"]) > 1.0;
        assert_eq!(even["tokens"].as_u64(), if ahead { row["tokens"].as_u64() } else { None });
    }
}

#[test]
fn speed_takes_every_link_with_and_without_the_pipeline() {
    let asked = "speed --shape own --tokens 192 --chunk 96 --ratios 0.1 --runs 1 --loading always \
                 --link-mb-per-s 5,100 --pipeline on,off";
    let report = report(asked);
    let of = |row: &Value| (number(&row["link_mb_per_s"]), row["pipeline"].as_bool().expect("on or off"));
    let variants: Vec<_> = rows(&report).iter().map(of).collect();
    assert_eq!(variants, [(5.0, true), (5.0, false), (100.0, true), (100.0, false)]);
    for row in rows(&report) {
        assert_eq!(row["hits"], row["chunks"], "{}", row["misses"]);
    }
}

#[test]
fn a_curve_doubles_its_lengths_and_is_fitted_and_drawn() {
    let svg = tempfile::NamedTempFile::new().expect("a file");
    let asked = "curve --shape own --from 128 --to 600 --full-up-to 256 --chunk 64 --ratios 0.1 --runs 1";
    let report = report(&format!("{asked} --svg {}", svg.path().display()));
    let rows = rows(&report);
    assert_eq!(rows.iter().map(|row| number(&row["chunks"])).collect::<Vec<_>>(), [2.0, 4.0, 8.0]);
    assert!(rows[1]["speedup"].is_object() && rows[2]["speedup"].is_null(), "full prefill ends at 256");
    let curves = report["curves"].as_array().expect("curves");
    let points = |curve: &Value| curve["points"].as_array().expect("points").len();
    assert_eq!(curves.iter().map(points).collect::<Vec<_>>(), [2, 3]);
    for curve in curves {
        for part in ["fixed_ms", "linear_ms", "quadratic_ms", "worst_residual"] {
            assert!(number(&curve["fit"][part]) >= 0.0, "{part} of {}", curve["fit"]);
        }
    }
    let drawn = std::fs::read_to_string(svg.path()).expect("a drawing");
    assert_eq!(drawn.matches("<circle").count(), 5, "a dot for every point");
}

#[test]
fn reuse_neither_stores_more_nor_misses_nor_recomputes_more_over_many_prompts() {
    let asked = "decay --shape own --prompts 24 --every 4 --corpus 12 --chunks 4 --chunk 48 --loading always";
    let svg = tempfile::NamedTempFile::new().expect("a file");
    let report = report(&format!("{asked} --svg {}", svg.path().display()));
    // Primary and auxiliary KV of each chunk, and the prefix.
    assert_eq!(number(&report["before"]["objects"]), 25.0);
    assert_eq!(report["before"], report["after"]);
    assert_eq!(number(&report["hit_tokens_share"]), 1.0);
    assert_eq!(report["rungs"], serde_json::json!({ "scorer": 18 }));
    let realised = &report["realised_ratio"];
    assert!((runs(realised, 18) - 0.1).abs() < 0.01, "{realised}");
    assert!(number(&realised["most"]) - number(&realised["least"]) < 0.01, "{realised}");
    assert_eq!(report["points"].as_array().expect("a point per full prefill").len(), 6);
    for drift in ["time_ratio_drift", "cpu_ratio_drift", "recomputed_drift"] {
        assert!(report[drift].is_object(), "{drift}");
    }
    assert!(std::fs::read_to_string(svg.path()).expect("a drawing").contains("reuse over full prefill"));
}

#[test]
fn load_compares_choosing_with_loading_and_computing_everything() {
    let report = report(
        "load --shape own --requests 6 --tokens 192 --chunk 96 --corpus 6 --link-mb-per-s 50 \
         --loading auto,always,never",
    );
    let loaded = |row: &Value| {
        (row["loading"].as_str().expect("a mode").to_owned(), number(&row["loaded_share"]["median"]))
    };
    let rows = rows(&report);
    assert_eq!(loaded(&rows[1]), ("always".to_owned(), 1.0));
    assert_eq!(loaded(&rows[2]), ("never".to_owned(), 0.0));
    for row in rows {
        assert_eq!(row["failed"], 0, "{}", row["failure"]);
        assert!(runs(&row["ttft_p50_ms"], 1) <= runs(&row["ttft_p99_ms"], 1));
        runs(&row["wall_seconds"], 1);
    }
    let p99 = |row: &Value| number(&row["ttft_p99_ms"]["median"]);
    let ratio = number(&report["choices"][0]["p99_over_better"]["median"]);
    assert!((ratio / (p99(&rows[0]) / p99(&rows[1]).min(p99(&rows[2]))) - 1.0).abs() < 1e-9, "{ratio}");
}

#[test]
fn batch_counts_streams_a_prefill_among_them_and_the_pages_of_callers_who_left() {
    let report = report(
        "batch --shape own --streams 1,3 --tokens 64 --answer 8 --runs 2 --join-streams 2 --join-tokens 256 \
         --prefill-rows 64",
    );
    let rows = rows(&report);
    assert_eq!(rows.iter().map(|row| number(&row["streams"])).collect::<Vec<_>>(), [1.0, 3.0]);
    for row in rows {
        for field in ["tokens_per_second", "ttft_p50_ms", "ttft_p99_ms", "gap_p50_ms", "gap_p99_ms"] {
            runs(&row[field], 2);
        }
    }
    let join = &report["join"];
    assert!(number(&join["tokens"]) >= 256.0 && number(&join["ttft_ms"]) > 0.0, "{join}");
    assert!(number(&join["without"]["count"]) >= 16.0, "{join}");
    assert!(number(&join["with"]["count"]) >= 1.0, "running answers go on beside the prefill: {join}");
    let pages = ["pages_before", "pages_during", "pages_after"].map(|field| number(&join[field]));
    assert!(pages[1] > pages[0], "{pages:?}");
    assert_eq!(pages[2], pages[0], "what callers held is free when they have hung up");
    assert!(number(&join["kv_bytes"]) > 0.0 && join["freed_ms"].is_f64(), "{join}");
}

#[test]
fn peers_are_timed_in_turns_where_they_are_installed() {
    let python = concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/peers/venv/bin/python");
    if !Path::new(python).is_file() {
        #[allow(clippy::print_stderr, reason = "a skipped test says why")]
        {
            eprintln!("skipped: {python} is not there; crates/bench/peers/README.md says how to install it");
        }
        return;
    }
    let report = report("peers --peers torch --tokens 32 --ops prefill --runs 2");
    let [ours, torch] = rows(&report) else { panic!("ours and torch: {report}") };
    assert_eq!([&ours["engine"], &torch["engine"]], ["cacheclip", "torch"]);
    let ratio = runs(&torch["ratio"], 2);
    let rates = [ours, torch].map(|row| {
        runs(&row["tokens_per_second"], 2);
        let end = |end: &str| number(&row["tokens_per_second"][end]);
        [end("least"), end("most")]
    });
    assert!(ratio >= rates[0][0] / rates[1][1] && ratio <= rates[0][1] / rates[1][0], "{report}");
}

#[test]
fn the_scorers_pass_is_compared_with_products_of_the_same_rounds() {
    let report = report("scorer --tokens 64,128 --question 8 --runs 2 --threads 1");
    assert_eq!(report["shape"], "aux-30m", "what scorers are measured with");
    let [short, long] = rows(&report) else { panic!("two lengths: {report}") };
    assert_eq!([&short["tokens"], &long["tokens"]], [64, 128]);
    for row in [short, long] {
        let (rate, products) = (&row["flops_per_second"], &row["products_flops_per_second"]);
        let share = runs(&row["share_of_products"], 2);
        let end = |value: &Value, end: &str| number(&value[end]);
        let least = end(rate, "least") / end(products, "most");
        let most = end(rate, "most") / end(products, "least");
        assert!(share >= least * (1.0 - 1e-9) && share <= most * (1.0 + 1e-9), "{row}");
    }
}

/// A promise of `bench store` is judged by its own median.
fn judged(promise: &Value, count: usize) {
    let (median, wanted) = (runs(&promise["value"], count), &promise["wanted"]);
    let kept = match (wanted["at_least"].as_f64(), wanted["at_most"].as_f64()) {
        (Some(least), None) => median >= least,
        (None, Some(most)) => median <= most,
        _ => panic!("one bound: {promise}"),
    };
    assert_eq!(promise["kept"], kept, "{promise}");
}

#[test]
fn the_store_is_measured_beside_its_peers_and_its_promises_are_judged() {
    let report = report("store --sizes 1,2 --runs 2 --start-objects 50 --readers 2 --budget-mib 128");
    let transfers = report["transfers"].as_array().expect("one per size");
    for (transfer, mib) in transfers.iter().zip([1, 2]) {
        let rows = rows(transfer);
        assert_eq!(rows.len(), 9);
        for row in rows {
            assert_eq!(row["mib"], mib);
            // Without a Redis there is a reason instead.
            match row["skipped"].as_str() {
                Some(why) => assert!(row["name"] == "redis get + blake3" && !why.is_empty(), "{row}"),
                None => assert!(runs(&row["bytes_per_second"], 2) > 1e6, "{row}"),
            }
        }
        for stage in ["get", "socket", "transport", "verify", "decode"] {
            runs(&transfer["stages"][stage], 2);
        }
        let promises = transfer["promises"].as_array().expect("promises");
        assert!(promises.len() >= 3, "{transfer}");
        promises.iter().for_each(|promise| judged(promise, 2));
    }
    assert!(runs(&report["layers"]["first_ms"], 2) <= runs(&report["layers"]["whole_ms"], 2));
    judged(&report["layers"]["promise"], 2);
    runs(&report["lookup"]["lookup_us"], 2);
    assert_eq!(report["lookup"]["promise"].is_null(), report["lookup"]["skipped"].is_string());
    let (memory, start) = (&report["memory"], &report["start"]);
    assert!(number(&memory["peak_bytes"]) >= number(&memory["before_bytes"]) && memory["readers"] == 2);
    judged(&memory["promise"], 1);
    assert!(start["objects"] == 50 && number(&start["first_seconds"]) > 0.0);
    judged(&start["promise"], 2);
}

#[test]
fn every_way_to_store_kv_is_measured_on_every_sample_and_the_default_is_compared_with_the_best() {
    let report = report("codec --tokens 48 --shapes aux-30m --runs 2");
    let verdicts = report["verdicts"].as_array().expect("verdicts");
    assert_eq!(verdicts.len(), 9, "three samples in three dtypes");
    let groups = rows(&report).chunks_exact(rows(&report).len() / verdicts.len());
    for (group, verdict) in groups.zip(verdicts) {
        let alike = |row: &Value| row["sample"] == verdict["sample"] && row["dtype"] == verdict["dtype"];
        assert!(group.len() == 16 && group.iter().all(alike), "{verdict}");
        assert_eq!(number(&group[0]["ratio"]), 1.0, "the first is stored as it is");
        assert_eq!(group.iter().filter(|row| row["default"] == true).count(), 1);
        for row in group {
            assert!(number(&row["ratio"]) <= 1.0 && runs(&row["encode_gb_per_s"], 2) > 0.0, "{row}");
            assert!(runs(&row["load_gb_per_s"], 2) < runs(&row["decode_gb_per_s"], 2), "{row}");
        }
        assert!(group.iter().any(|row| row["way"] == verdict["best"]));
        let share = number(&verdict["default_over_best"]);
        assert!(share > 0.0 && share <= 1.0, "{verdict}");
    }
}

#[test]
fn peers_that_are_not_installed_are_named_with_the_place_that_tells_how() {
    let output = bench("peers --python no-such-python --tokens 16 --runs 1");
    assert_eq!(output.status.code(), Some(1));
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(told.contains("no-such-python") && told.contains("crates/bench/peers/README.md"), "{told}");
}

#[test]
fn what_cannot_be_measured_is_refused_with_what_can() {
    for (asked, told) in [
        ("peers --shape gpt-2", ["gpt-2", "smollm2-135m"]),
        ("speed --shape gpt-2", ["gpt-2", "smollm2-135m"]),
        ("decay --shape own --corpus 2 --chunks 4", ["chunks", "corpus"]),
        ("load --shape own --tokens 4096 --chunk 64 --corpus 8", ["corpus", "64 chunks"]),
    ] {
        let output = bench(asked);
        assert_eq!(output.status.code(), Some(1), "{asked}");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(told.iter().all(|word| error.contains(word)), "{asked}: {error}");
    }
}
