//! Every metric that rules, autoscalers and dashboards name is one that the services have.

use crate::helm::{profiles, root};
use crate::monitoring::PrometheusRule;
use crate::objects::of_kind;
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use k8s_openapi::api::core::v1::ConfigMap;
use serde_json::Value;
use std::collections::BTreeSet;

/// The metrics' names in a text: its words with one of the two prefixes.
pub(crate) fn names(text: &str) -> BTreeSet<String> {
    let words = text.split(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_' && letter != ':');
    let metric =
        |word: &&str| word.starts_with("cacheclip_") || (word.starts_with("vllm:") && word.len() > 5);
    words.filter(metric).map(str::to_owned).collect()
}

/// A histogram's three series go by the histogram's name.
fn known(list: &BTreeSet<String>, name: &str) -> bool {
    let histogram = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix));
    list.contains(name) || histogram.is_some_and(|name| list.contains(name))
}

/// Every metric that rules, autoscalers and dashboards of rendered objects name.
pub(crate) fn named(objects: &[Value]) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for object in of_kind::<PrometheusRule>(objects, "PrometheusRule") {
        let rules = object.spec.groups.into_iter().flat_map(|group| group.rules);
        for rule in rules {
            let here = names(&rule.expr);
            // `up` is the only metric that is not the services' own.
            assert!(
                !here.is_empty() || rule.expr.contains("up{"),
                "{}: no metric in {}",
                rule.alert,
                rule.expr
            );
            found.extend(here);
        }
    }
    for scaler in of_kind::<HorizontalPodAutoscaler>(objects, "HorizontalPodAutoscaler") {
        for metric in scaler.spec.and_then(|spec| spec.metrics).expect("metrics") {
            found.insert(metric.pods.expect("a metric of the pods").metric.name);
        }
    }
    for map in of_kind::<ConfigMap>(objects, "ConfigMap") {
        let data = map.data.unwrap_or_default();
        let dashboards = data.iter().filter(|(name, _)| name.ends_with(".json"));
        found.extend(dashboards.flat_map(|(_, text)| names(text)));
    }
    found
}

#[test]
fn every_metric_that_the_chart_names_is_in_the_list_of_metrics() {
    let path = root().join("docs/metrics.md");
    let Ok(text) = std::fs::read_to_string(&path) else {
        println!("skipped: {} is not there", path.display());
        return;
    };
    let list = names(&text);
    assert!(!known(&list, "cacheclip_of_no_service_total"), "the list holds anything");
    // The metrics that an autoscaler may be given by other values.
    let schema =
        std::fs::read_to_string(root().join("deploy/helm/cacheclip/values.schema.json")).expect("the schema");
    let mut used = names(&schema);
    for (_, objects) in profiles() {
        used.extend(named(&objects));
    }
    assert!(used.contains("vllm:num_requests_waiting"), "{used:?}");
    let missing = used.iter().filter(|name| !known(&list, name)).collect::<Vec<_>>();
    assert!(missing.is_empty(), "docs/metrics.md has no {missing:?}");
}

#[test]
fn a_metric_is_found_in_a_query_and_a_histogram_by_its_series() {
    let query = r#"sum(rate(cacheclip_rpc_seconds_bucket{job="cc-cacheclip-gateway"}[5m])) / vllm:num_requests_running"#;
    let found = names(query);
    assert_eq!(
        found,
        BTreeSet::from(["cacheclip_rpc_seconds_bucket".into(), "vllm:num_requests_running".into()])
    );
    let list = BTreeSet::from(["cacheclip_rpc_seconds".to_owned()]);
    assert!(known(&list, "cacheclip_rpc_seconds_bucket") && !known(&list, "cacheclip_rpc_seconds_total"));
}
