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
