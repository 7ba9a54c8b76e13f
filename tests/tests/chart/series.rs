//! Whether a page of metrics has what a query asks for: the metric, its labels, and the values that it is chosen by.

use crate::metrics::names;
use std::collections::{BTreeMap, BTreeSet};

/// Labels that Prometheus adds to what a service exports.
const ADDED: [&str; 4] = ["namespace", "pod", "job", "instance"];

/// A metric as a query selects it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Selector {
    pub(crate) metric: String,
    /// Label, operator and value.
    matchers: Vec<(String, String, String)>,
}

impl Selector {
    /// A metric without conditions.
    pub(crate) fn bare(metric: &str) -> Self {
        Self { metric: metric.to_owned(), matchers: Vec::new() }
    }

    /// The components of a release whose jobs are selected.
    pub(crate) fn components(&self, release: &str) -> Vec<String> {
        let job = self.matchers.iter().find(|(label, ..)| label == "job");
        let (_, _, job) = job.unwrap_or_else(|| panic!("{self:?} selects no job"));
        let rest = job.strip_prefix(release).and_then(|rest| rest.strip_prefix('-'));
        let rest = rest.unwrap_or_else(|| panic!("{job} is no job of {release}"));
        rest.trim_matches(['(', ')']).split('|').map(str::to_owned).collect()
    }

    /// What of it a page does not have. A value that is excluded must be there, too: excluding nothing is a mistake.
    pub(crate) fn missing(&self, page: &str) -> Result<(), String> {
        let series = series(page, &self.metric);
        if series.is_empty() {
            return Err(format!("no series of {}", self.metric));
        }
        for (label, _, value) in self.matchers.iter().filter(|(label, ..)| !ADDED.contains(&label.as_str())) {
            for value in value.split('|') {
                let has = |labels: &BTreeMap<String, String>| labels.get(label).is_some_and(|it| it == value);
                if !series.iter().any(has) {
                    return Err(format!("no series of {} with {label}={value:?}", self.metric));
                }
            }
        }
        Ok(())
    }
}

/// The metrics of a query, each as it is selected.
pub(crate) fn selectors(query: &str) -> BTreeSet<Selector> {
    let mut found = BTreeSet::new();
    for metric in names(query) {
        for (at, _) in query.match_indices(&metric) {
            let after = &query[at + metric.len()..];
            let whole = !after.starts_with(|next: char| next.is_ascii_alphanumeric() || next == '_');
            if !whole {
                continue;
            }
            let inner = after.strip_prefix('{').and_then(|rest| rest.split_once('}')).map(|(inner, _)| inner);
            let matchers =
                inner.unwrap_or_default().split(',').map(str::trim).filter(|text| !text.is_empty());
            found.insert(Selector { metric: metric.clone(), matchers: matchers.map(matcher).collect() });
        }
    }
    found
}

fn matcher(text: &str) -> (String, String, String) {
    let at = text.find(['=', '!']).unwrap_or_else(|| panic!("{text}: no operator"));
    let (label, rest) = text.split_at(at);
    let (operator, value) = rest.split_at(rest.find('"').unwrap_or_else(|| panic!("{text}: no value")));
    assert!(["=", "=~", "!=", "!~"].contains(&operator), "{text}");
    (label.trim().to_owned(), operator.to_owned(), value.trim_matches('"').to_owned())
}

/// Labels that a query groups by and Prometheus does not add.
pub(crate) fn grouped(query: &str) -> BTreeSet<String> {
    let lists = query.split("by (").skip(1).filter_map(|rest| rest.split_once(')'));
    let labels = lists.flat_map(|(list, _)| list.split(',')).map(str::trim);
    labels.filter(|label| !ADDED.contains(label)).map(str::to_owned).collect()
}

/// Whether a page has a metric with a label.
pub(crate) fn has_label(page: &str, metric: &str, label: &str) -> bool {
    series(page, metric).iter().any(|labels| labels.contains_key(label))
}

/// The series of a metric on a page, by their labels. Lines that only describe it do not count.
fn series(page: &str, metric: &str) -> Vec<BTreeMap<String, String>> {
    let mut found = Vec::new();
    for line in page.lines().filter(|line| !line.starts_with('#')) {
        let Some(rest) = line.strip_prefix(metric) else { continue };
        let labels = match rest.strip_prefix('{').and_then(|rest| rest.split_once('}')) {
            Some((labels, _)) => labels,
            None if rest.starts_with(' ') => "",
            None => continue,
        };
        let pair = |pair: &str| {
            let (label, value) = pair.split_once('=')?;
            Some((label.to_owned(), value.trim_matches('"').to_owned()))
        };
        found.push(labels.split(',').filter_map(pair).collect());
    }
    found
}

#[test]
fn a_metric_a_label_or_a_value_that_is_not_there_is_found_missing() {
    let page = "# TYPE cacheclip_a_total counter\ncacheclip_a_total{tier=\"disk\",reason=\"full\"} 0\n\
                # HELP cacheclip_described_total never seen\ncacheclip_b_tokens 7\n";
    let missing = |query: &str| {
        let found = selectors(query).into_iter().find_map(|selector| selector.missing(page).err());
        found.unwrap_or_default()
    };
    let job = "job=\"cc-cacheclip-cache-store\"";
    assert_eq!(
        missing(&format!("rate(cacheclip_a_total{{{job}, tier=\"disk\"}}[5m]) / cacheclip_b_tokens")),
        ""
    );
    assert_eq!(missing("cacheclip_described_total > 0"), "no series of cacheclip_described_total");
    assert_eq!(missing("cacheclip_a > 0"), "no series of cacheclip_a");
    assert!(missing("cacheclip_a_total{level=\"disk\"}").contains("level=\"disk\""));
    assert!(missing("cacheclip_a_total{tier=~\"disk|tape\"}").contains("tier=\"tape\""));
    assert!(missing("cacheclip_a_total{reason!=\"ful\"}").contains("reason=\"ful\""));
    let all = "sum by (namespace, where) (cacheclip_a_total{job=~\"cc-cacheclip-(gateway|cache-store)\"})";
    let selector = selectors(all).into_iter().next().expect("a selector");
    assert_eq!(selector.components("cc-cacheclip"), ["gateway", "cache-store"]);
    assert_eq!(grouped(all).into_iter().collect::<Vec<_>>(), ["where"]);
    assert!(has_label(page, "cacheclip_a_total", "tier") && !has_label(page, "cacheclip_a_total", "where"));
}
