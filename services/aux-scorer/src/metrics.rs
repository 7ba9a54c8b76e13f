//! Metrics of the scorer: every name, label and meaning in one place.

use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};

const LATENCY: &str = "cacheclip_scorer_latency_seconds";
const CHUNKS: &str = "cacheclip_scorer_chunks_total";
const CACHE: &str = "cacheclip_scorer_cache_used_bytes";

/// Registers descriptions and the zero values of series that may never move.
pub fn describe() {
    describe_histogram!(LATENCY, Unit::Seconds, "One scoring, auxiliary KV of unknown chunks included");
    describe_counter!(
        CHUNKS,
        "Chunks of requests by how their auxiliary KV was had: cached, computed, text_needed"
    );
    describe_gauge!(CACHE, Unit::Bytes, "Auxiliary chunk KV in RAM");
    for result in ["cached", "computed", "text_needed"] {
        counter!(CHUNKS, "result" => result).increment(0);
    }
}

pub(crate) fn scored(seconds: f64) {
    histogram!(LATENCY).record(seconds);
}

pub(crate) fn chunks(result: &'static str, count: usize) {
    counter!(CHUNKS, "result" => result).increment(count as u64);
}

pub(crate) fn cache(bytes: u64) {
    gauge!(CACHE).set(bytes as f64);
}
