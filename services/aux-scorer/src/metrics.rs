//! Metrics of the scorer: every name, label and meaning in one place.

use cacheclip_client::Written;
use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};

const LATENCY: &str = "cacheclip_scorer_latency_seconds";
const CHUNKS: &str = "cacheclip_scorer_chunks_total";
const CACHE: &str = "cacheclip_scorer_cache_used_bytes";
const PAGES_PEAK: &str = "cacheclip_scorer_pages_peak_bytes";
const WEIGHTS: &str = "cacheclip_scorer_weights_bytes";
const WRITES: &str = "cacheclip_scorer_writes_total";
const FORGOTTEN: &str = "cacheclip_scorer_forgotten_chunks_total";

/// How a chunk's auxiliary KV was had: from RAM, from a store, from text; or neither of these.
pub const RESULTS: [&str; 4] = ["cached", "loaded", "computed", "text_needed"];

/// Registers descriptions and the zero values of series that may never move.
pub fn describe() {
    describe_histogram!(LATENCY, Unit::Seconds, "One scoring, auxiliary KV of unknown chunks included");
    describe_counter!(
        CHUNKS,
        "Chunks of requests by how their auxiliary KV was had: cached, loaded, computed, text_needed"
    );
    describe_gauge!(CACHE, Unit::Bytes, "Auxiliary chunk KV in RAM");
    describe_gauge!(PAGES_PEAK, Unit::Bytes, "Auxiliary KV in pages, the most so far");
    describe_gauge!(WEIGHTS, Unit::Bytes, "Weights of the auxiliary model");
    describe_counter!(
        WRITES,
        "Auxiliary KV offered to the stores, by outcome: stored, existed, no_room, deleted (meanwhile), dropped, failed"
    );
    describe_counter!(FORGOTTEN, "Chunks that went from the scorer's RAM because a document was deleted");
    counter!(FORGOTTEN).increment(0);
    RESULTS.iter().for_each(|&result| counter!(CHUNKS, "result" => result).increment(0));
    Written::ALL.iter().for_each(|it| counter!(WRITES, "outcome" => it.label()).increment(0));
}

pub(crate) fn scored(seconds: f64) {
    histogram!(LATENCY).record(seconds);
}

pub(crate) fn chunks(result: &'static str, count: usize) {
    counter!(CHUNKS, "result" => result).increment(count as u64);
}

pub(crate) fn forgotten(chunks: usize) {
    counter!(FORGOTTEN).increment(chunks as u64);
}

pub(crate) fn cache(bytes: u64) {
    gauge!(CACHE).set(bytes as f64);
}

pub(crate) fn pages_peak(bytes: usize) {
    gauge!(PAGES_PEAK).set(bytes as f64);
}

pub(crate) fn weights(bytes: usize) {
    gauge!(WEIGHTS).set(bytes as f64);
}

pub(crate) fn write(outcome: Written) {
    counter!(WRITES, "outcome" => outcome.label()).increment(1);
}
