//! The metrics of all services as one table, made from what their code registers: the documentation cannot say
//! anything else than the code.

use metrics::{
    Counter, Gauge, Histogram, Key, KeyName, Metadata, Recorder, SharedString, Unit, with_local_recorder,
};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::Mutex;

/// One metric as it is registered.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Metric {
    /// Its full name.
    pub name: String,
    /// counter, gauge or histogram.
    pub kind: &'static str,
    /// Which parts of the fleet export it.
    pub exported_by: BTreeSet<&'static str>,
    /// Labels, with the values that exist from the start.
    pub labels: BTreeMap<String, BTreeSet<String>>,
    /// Whether it has series before anything has happened.
    pub from_start: bool,
    /// What it counts.
    pub help: String,
}

/// Notes descriptions instead of recording values.
#[derive(Default)]
struct Notes {
    part: Mutex<&'static str>,
    metrics: Mutex<BTreeMap<String, Metric>>,
}

impl Notes {
    fn describe(&self, name: &KeyName, kind: &'static str, help: &str) {
        self.with(name.as_str(), kind, |metric| metric.help = help.to_owned());
    }

    fn register(&self, key: &Key, kind: &'static str) {
        self.with(key.name(), kind, |metric| {
            metric.from_start = true;
            for label in key.labels() {
                metric.labels.entry(label.key().to_owned()).or_default().insert(label.value().to_owned());
            }
        });
    }

    fn with(&self, name: &str, kind: &'static str, note: impl FnOnce(&mut Metric)) {
        let part = *self.part.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut metrics = self.metrics.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let metric = metrics.entry(name.to_owned()).or_default();
        metric.name = name.to_owned();
        metric.kind = kind;
        metric.exported_by.insert(part);
        note(metric);
    }
}

impl Recorder for Notes {
    fn describe_counter(&self, name: KeyName, _: Option<Unit>, help: SharedString) {
        self.describe(&name, "counter", &help);
    }

    fn describe_gauge(&self, name: KeyName, _: Option<Unit>, help: SharedString) {
        self.describe(&name, "gauge", &help);
    }

    fn describe_histogram(&self, name: KeyName, _: Option<Unit>, help: SharedString) {
        self.describe(&name, "histogram", &help);
    }

    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        self.register(key, "counter");
        Counter::noop()
    }

    fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
        self.register(key, "gauge");
        Gauge::noop()
    }

    fn register_histogram(&self, key: &Key, _: &Metadata<'_>) -> Histogram {
        self.register(key, "histogram");
        Histogram::noop()
    }
}

/// Every metric, by name.
pub fn all() -> Vec<Metric> {
    let parts: [(&'static str, &[fn()]); 5] = [
        ("every service", &[cacheclip_service::describe_metrics]),
        ("gateway", &[cacheclip_gateway::metrics::describe]),
        ("gpu-worker", &[cacheclip_gpu_worker::metrics::describe, cacheclip_client::metrics::describe]),
        ("aux-scorer", &[cacheclip_aux_scorer::metrics::describe, cacheclip_client::metrics::describe]),
        ("cache-store", &[cacheclip_cache_store::metrics::describe]),
    ];
    let notes = Notes::default();
    for (part, describe) in parts {
        *notes.part.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = part;
        with_local_recorder(&notes, || describe.iter().for_each(|describe| describe()));
    }
    notes.metrics.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner).into_values().collect()
}

/// [`all`] as a Markdown page.
pub fn page() -> String {
    let mut page = String::from(PREAMBLE);
    for metric in all() {
        let by: Vec<&str> = metric.exported_by.iter().copied().collect();
        let labels: Vec<String> = metric
            .labels
            .iter()
            .map(|(label, values)| {
                let values: Vec<&str> = values.iter().map(String::as_str).collect();
                format!("`{label}`: {}", values.join(", "))
            })
            .collect();
        // Writing to a string cannot fail.
        let _ = writeln!(
            page,
            "| `{}` | {} | {} | {} | {} |",
            metric.name,
            metric.kind,
            by.join(", "),
            metric.help.replace('|', "\\|"),
            labels.join("; "),
        );
    }
    page
}

const PREAMBLE: &str = "\
# Metrics

Every service exports these as Prometheus text at `/metrics` on its admin port. This page is generated from the code
(`cacheclip metrics --markdown`); a test keeps it true. Histograms have explicit buckets, chosen by the name's unit.
Labels are shown with the values that exist from the start; more may come where the meaning says so, always from a
closed set. Nothing that a caller sends becomes a label.

A hit rate is two counters: `rate(cacheclip_lookup_hit_tokens_total) / rate(cacheclip_lookup_requested_tokens_total)`.
The `vllm:` names are what autoscalers and gateways of the ecosystem read.

| name | kind | exported by | meaning | labels |
| --- | --- | --- | --- | --- |
";
