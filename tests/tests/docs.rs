//! Documentation that is generated stays true.

#[test]
fn the_page_of_metrics_is_what_the_code_registers() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/metrics.md");
    let page = cacheclip::metrics::page();
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(&path, &page).expect("docs/metrics.md is written");
    }
    let written = std::fs::read_to_string(&path).expect("docs/metrics.md");
    assert!(
        page == written,
        "docs/metrics.md is out of date: cacheclip metrics --markdown > docs/metrics.md"
    );
}

#[test]
fn every_metric_says_what_it_is_and_follows_the_naming_rules() {
    let all = cacheclip::metrics::all();
    assert!(all.len() > 30, "the whole fleet's: {}", all.len());
    for metric in &all {
        assert!(!metric.help.is_empty(), "{} has no description", metric.name);
        let foreign = metric.name.starts_with("vllm:");
        assert!(foreign || metric.name.starts_with("cacheclip_"), "{}", metric.name);
        let total = metric.name.ends_with("_total");
        assert_eq!(metric.kind == "counter", total, "{} is a {}", metric.name, metric.kind);
        let unit = ["_seconds", "_bytes", "_tokens", "_ratio"].iter().any(|unit| metric.name.ends_with(unit));
        assert!(metric.kind != "histogram" || unit, "{} has no unit to take buckets from", metric.name);
    }
}

/// Numbered sentences of a page: from their number to the next empty line.
fn promises(page: &str) -> Vec<&str> {
    let numbered = |paragraph: &&str| {
        let digits = paragraph.chars().take_while(char::is_ascii_digit).count();
        digits > 0 && paragraph[digits..].starts_with(". ")
    };
    page.split("\n\n").map(str::trim_start).filter(numbered).collect()
}

/// Whether a file has a test of this name that the suite runs.
fn runs(text: &str, name: &str) -> bool {
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    let start = format!("fn {name}(");
    let Some(at) = lines.iter().position(|line| line.trim_start_matches("async ").starts_with(&start)) else {
        return false;
    };
    let attributes: Vec<&&str> = lines[..at].iter().rev().take_while(|line| line.starts_with("#[")).collect();
    let test = attributes.iter().any(|line| line.starts_with("#[test]") || line.starts_with("#[tokio::test"));
    test && !attributes.iter().any(|line| line.starts_with("#[ignore"))
}

#[test]
fn every_promise_of_the_store_names_tests_that_exist() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let page = std::fs::read_to_string(root.join("docs/store.md")).expect("docs/store.md");
    let promises = promises(&page);
    assert!(promises.len() >= 20, "{} promises", promises.len());
    for (at, promise) in promises.iter().enumerate() {
        let number = format!("{}. ", at + 1);
        assert!(promise.starts_with(&number), "promises count on from 1: {promise}");
        let tests: Vec<(&str, &str)> =
            promise.split('`').skip(1).step_by(2).filter_map(|code| code.split_once(".rs::")).collect();
        assert!(!tests.is_empty(), "no test holds this promise: {promise}");
        for (path, name) in tests {
            let text = std::fs::read_to_string(root.join(format!("{path}.rs")));
            let text = text.unwrap_or_else(|error| panic!("{path}.rs: {error}; named by promise {}", at + 1));
            assert!(runs(&text, name), "{path}.rs has no test {name}; named by promise {}", at + 1);
        }
    }
}
