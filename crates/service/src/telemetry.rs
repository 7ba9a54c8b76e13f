//! Logs, metrics and traces of a process. All are installed once; asking again is harmless, because an in-process
//! fleet and every test do.

use crate::{Error, otlp};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use serde::{Deserialize, Serialize};
use std::sync::OnceLock;
use std::time::Duration;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _, Registry};

/// The standard's variable for the collector's endpoint.
pub const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";

/// What is done with spans and events, behind a filter of its own: what is exported does not depend on what is logged.
pub(crate) type Layer = Box<dyn tracing_subscriber::Layer<Registry> + Send + Sync>;

/// What a process logs, and how; where its spans go.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TelemetryOptions {
    /// One line of text or one JSON object per event.
    pub format: Format,
    /// `tracing` filter directives, such as `info` or `info,cacheclip_gateway=debug`.
    pub filter: String,
    /// How the process calls itself in traces; `OTEL_SERVICE_NAME` goes before it.
    pub service: String,
    /// `http://host:port` of a collector that takes OTLP over gRPC; absent or empty: spans are not exported.
    pub otlp_endpoint: Option<String>,
}

impl Default for TelemetryOptions {
    fn default() -> Self {
        Self { format: Format::Text, filter: "info".into(), service: "cacheclip".into(), otlp_endpoint: None }
    }
}

/// Shape of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// For people.
    Text,
    /// For collectors.
    Json,
}

/// Starts logging to stderr (stdout belongs to a command's result) and installs the metrics recorder. A process
/// that already logs keeps its logger, and exports nothing. With an endpoint this needs a tokio runtime that lives
/// until [`flush`].
///
/// # Errors
/// A filter or an endpoint that cannot be parsed; an endpoint outside of a runtime.
pub fn init(options: &TelemetryOptions) -> Result<(), Error> {
    let filter = EnvFilter::try_new(&options.filter)
        .map_err(|error| Error::Telemetry(format!("log filter {:?}: {error}", options.filter)))?;
    // The standard says that an empty variable is one that is not set.
    let endpoint = options.otlp_endpoint.as_deref().map(str::trim).filter(|endpoint| !endpoint.is_empty());
    let exporter = endpoint.map(|endpoint| otlp::Exporter::start(&options.service, endpoint)).transpose()?;
    install_recorder();
    let layers: Vec<Layer> =
        exporter.iter().filter_map(otlp::Exporter::layer).chain([logging(options.format, filter)]).collect();
    // An error here only says that a logger is installed already.
    let installed = tracing_subscriber::registry().with(layers).try_init().is_ok();
    if let Some(exporter) = exporter.filter(|_| installed) {
        exporter.installed();
    }
    Ok(())
}

fn logging(format: Format, filter: EnvFilter) -> Layer {
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    match format {
        Format::Text => {
            let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr());
            lines.with_ansi(ansi).with_filter(filter).boxed()
        }
        Format::Json => lines.json().flatten_event(true).with_current_span(true).with_filter(filter).boxed(),
    }
}

/// Sends the spans that still wait, for two seconds at most; the last thing a process does. Spans that end later are
/// lost.
pub async fn flush() {
    otlp::flush().await;
}

/// Upper bounds of histogram buckets, chosen by the metric's unit, which is its name's last word. Without them
/// the exporter renders summaries, which cannot be added up over replicas.
const BUCKETS: [(&str, &[f64]); 4] = [
    (
        "_seconds",
        &[
            0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
            60.0, 300.0,
        ],
    ),
    (
        "_bytes",
        &[4096.0, 65_536.0, 262_144.0, 1_048_576.0, 4_194_304.0, 16_777_216.0, 67_108_864.0, 268_435_456.0],
    ),
    ("_tokens", &[16.0, 64.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16_384.0, 32_768.0, 131_072.0]),
    ("_ratio", &[0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0]),
];

static RECORDER: OnceLock<Option<PrometheusHandle>> = OnceLock::new();

/// Installs the Prometheus recorder of this process, the first time it is called.
pub fn install_recorder() {
    RECORDER.get_or_init(|| {
        let mut builder = PrometheusBuilder::new();
        for (suffix, bounds) in BUCKETS {
            builder = builder.set_buckets_for_metric(Matcher::Suffix(suffix.into()), bounds).ok()?;
        }
        // Fails where a program embeds us and has a recorder of its own: then that one gets the metrics.
        let handle = builder.install_recorder().ok()?;
        crate::metrics::describe();
        upkeep(handle.clone());
        Some(handle)
    });
}

/// Histograms keep every sample until they are drained; a process that nobody scrapes must drain them itself.
/// A thread and not a task, because the recorder outlives any one runtime.
fn upkeep(handle: PrometheusHandle) {
    let thread = std::thread::Builder::new().name("metrics-upkeep".into());
    let spawned = thread.spawn(move || {
        loop {
            std::thread::sleep(Duration::from_secs(5));
            handle.run_upkeep();
        }
    });
    if let Err(error) = spawned {
        tracing::warn!(%error, "no thread for metrics upkeep: histograms are drained by scrapes only");
    }
}

/// All metrics of this process as Prometheus text; empty when the program has a recorder of its own.
pub fn render() -> String {
    RECORDER.get().and_then(Option::as_ref).map(PrometheusHandle::render).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn telemetry_can_be_asked_for_twice_and_a_bad_filter_is_named() {
        init(&TelemetryOptions::default()).expect("the first time");
        init(&TelemetryOptions { format: Format::Json, ..Default::default() }).expect("the second time");
        let error =
            init(&TelemetryOptions { filter: "a=b=c".into(), ..Default::default() }).expect_err("bad filter");
        assert!(error.to_string().contains("a=b=c"), "{error}");
    }

    #[test]
    fn histograms_have_buckets_and_not_quantiles() {
        install_recorder();
        metrics::histogram!("cacheclip_service_test_seconds").record(0.003);
        let text = render();
        assert!(text.contains("cacheclip_service_test_seconds_bucket{le=\"0.005\"} 1"), "{text}");
        assert!(!text.contains("quantile"), "{text}");
    }
}
