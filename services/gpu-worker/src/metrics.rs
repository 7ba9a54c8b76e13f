//! Metrics of the worker: every name, label and meaning in one place.
//!
//! A chunk's lookup has a `result` (hit, mismatch: another layout's, corrupt, timeout, miss: anything else) and a
//! `reason`: that of a miss, `none` for a hit.

use cacheclip_client::Written;
use cacheclip_rpc::v1::MissReason;
use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};

const REQUESTS: &str = "cacheclip_worker_requests_total";
const TTFT: &str = "cacheclip_worker_ttft_seconds";
const STAGE: &str = "cacheclip_worker_stage_seconds";
const LOOKUPS: &str = "cacheclip_chunk_lookups_total";
const RECOMPUTED: &str = "cacheclip_recomputed_tokens_total";
const REALISED: &str = "cacheclip_worker_realised_ratio";
const PAGES_USED: &str = "cacheclip_worker_pages_used";
const PAGES_TOTAL: &str = "cacheclip_worker_pages_capacity";
const PAGES_PEAK: &str = "cacheclip_worker_pages_peak_bytes";
const WEIGHTS: &str = "cacheclip_worker_weights_bytes";
const WRITES: &str = "cacheclip_worker_writes_total";
const SAVED: &str = "cacheclip_prefill_seconds_saved_total";
const SHADOWED: &str = "cacheclip_blend_quality_shadow_total";
const DRIFTED: &str = "cacheclip_blend_quality_drift_total";
const QUEUE: &str = "cacheclip_worker_queue_requests";
const WAITING: &str = "vllm:num_requests_waiting";
const RUNNING: &str = "vllm:num_requests_running";
const USAGE: &str = "vllm:kv_cache_usage_perc";
const CONFIG: &str = "vllm:cache_config_info";
const RAM: &str = "cacheclip_worker_ram_used_bytes";
const UNPLACED: &str = "cacheclip_worker_unplaced_bytes";
const UNPLACED_MOST: &str = "cacheclip_worker_unplaced_peak_bytes";
const FORGOTTEN: &str = "cacheclip_worker_forgotten_chunks_total";

/// Registers descriptions and the zero values of series that may never move.
pub fn describe() {
    describe_counter!(REQUESTS, "Generations by policy and rung of the ladder");
    describe_histogram!(TTFT, Unit::Seconds, "From receipt of a request to its first token");
    describe_histogram!(STAGE, Unit::Seconds, "Time in each stage of a generation");
    describe_counter!(
        LOOKUPS,
        "Chunks looked up, by result (hit, miss, mismatch, corrupt, timeout) and reason"
    );
    describe_counter!(RECOMPUTED, "Reused tokens recomputed, by reason: selected, miss, fallback");
    describe_histogram!(REALISED, "Recomputed share of the reused chunk rows");
    describe_gauge!(PAGES_USED, "KV pages held by running sequences");
    describe_gauge!(PAGES_TOTAL, "KV pages there are");
    describe_gauge!(
        PAGES_PEAK,
        Unit::Bytes,
        "KV in pages, the most so far: of running sequences, and of the chunk that is computed"
    );
    describe_gauge!(WEIGHTS, Unit::Bytes, "Weights of the model");
    describe_counter!(
        WRITES,
        "Chunks offered to the stores, by outcome: stored, existed, no_room, deleted (meanwhile), dropped, failed"
    );
    describe_counter!(
        SAVED,
        "Whole seconds of prefill that reuse made unnecessary, at the worker's own recent rate per row: a lower bound"
    );
    counter!(SAVED).increment(0);
    describe_counter!(SHADOWED, "Greedy requests that were computed in context, too, to compare");
    describe_counter!(DRIFTED, "Of these, requests whose first token differed");
    describe_gauge!(QUEUE, "Requests that wait for the engine");
    describe_gauge!(WAITING, "The same, by the name that autoscalers read");
    describe_gauge!(RUNNING, "Sequences being decoded, by the name that autoscalers read");
    describe_gauge!(USAGE, "Share of KV pages in use, 0 to 1, by the name that autoscalers read");
    describe_gauge!(CONFIG, "1, with tokens per page and number of pages, by the name that autoscalers read");
    counter!(SHADOWED).increment(0);
    counter!(DRIFTED).increment(0);
    requests(0, 0);
    gauge!(USAGE).set(0.0);
    describe_gauge!(RAM, Unit::Bytes, "Decoded chunk KV in the worker's RAM");
    describe_gauge!(
        UNPLACED,
        Unit::Bytes,
        "Chunk KV that requests have asked for or hold and that is not placed in pages, at most load_bytes"
    );
    describe_gauge!(UNPLACED_MOST, Unit::Bytes, "The most that there has been of it");
    describe_counter!(FORGOTTEN, "Chunks that went from the worker's RAM because a document was deleted");
    counter!(FORGOTTEN).increment(0);
    for reason in ["selected", "miss", "fallback"] {
        counter!(RECOMPUTED, "reason" => reason).increment(0);
    }
    lookups()
        .for_each(|(result, reason)| counter!(LOOKUPS, "result" => result, "reason" => reason).increment(0));
    Written::ALL.iter().for_each(|it| counter!(WRITES, "outcome" => it.label()).increment(0));
}

pub(crate) fn request(policy: &'static str, rung: String) {
    counter!(REQUESTS, "policy" => policy, "rung" => rung).increment(1);
}

pub(crate) fn first_token(seconds: f64) {
    histogram!(TTFT).record(seconds);
}

pub(crate) fn stage(name: &'static str, seconds: f64) {
    histogram!(STAGE, "stage" => name).record(seconds);
}

/// How one chunk's lookup is counted: result and reason.
fn outcome(reason: Option<MissReason>) -> (&'static str, &'static str) {
    let result = match reason {
        None => "hit",
        Some(MissReason::Layout) => "mismatch",
        Some(MissReason::Corrupt) => "corrupt",
        Some(MissReason::Timeout) => "timeout",
        Some(_) => "miss",
    };
    (result, reason.map_or("none", MissReason::label))
}

/// Every outcome there is.
fn lookups() -> impl Iterator<Item = (&'static str, &'static str)> {
    use MissReason::{Corrupt, Cost, Deleted, Evicted, Expired, Layout, NeverSeen, Timeout, Unavailable};
    let reasons =
        [NeverSeen, Evicted, Expired, Deleted, Layout, Corrupt, Timeout, Unavailable, Cost].map(Some);
    std::iter::once(None).chain(reasons).map(outcome)
}

pub(crate) fn lookup(reason: Option<MissReason>) {
    let (result, reason) = outcome(reason);
    counter!(LOOKUPS, "result" => result, "reason" => reason).increment(1);
}

pub(crate) fn recomputed(reason: &'static str, tokens: usize) {
    counter!(RECOMPUTED, "reason" => reason).increment(tokens as u64);
}

pub(crate) fn realised(ratio: f32) {
    histogram!(REALISED).record(f64::from(ratio));
}

pub(crate) fn pages(used: usize, total: usize) {
    gauge!(PAGES_USED).set(used as f64);
    gauge!(PAGES_TOTAL).set(total as f64);
    gauge!(USAGE).set(used as f64 / total.max(1) as f64);
}

pub(crate) fn pages_peak(bytes: u64) {
    gauge!(PAGES_PEAK).set(bytes as f64);
}

pub(crate) fn weights(bytes: usize) {
    gauge!(WEIGHTS).set(bytes as f64);
}

pub(crate) fn write(outcome: Written) {
    counter!(WRITES, "outcome" => outcome.label()).increment(1);
}

pub(crate) fn ram(bytes: u64) {
    gauge!(RAM).set(bytes as f64);
}

pub(crate) fn unplaced(now: u64, most: u64) {
    gauge!(UNPLACED).set(now as f64);
    gauge!(UNPLACED_MOST).set(most as f64);
}

pub(crate) fn forgotten(chunks: usize) {
    counter!(FORGOTTEN).increment(chunks as u64);
}

pub(crate) fn saved(seconds: u64) {
    counter!(SAVED).increment(seconds);
}

pub(crate) fn shadow(same: bool) {
    counter!(SHADOWED).increment(1);
    counter!(DRIFTED).increment(u64::from(!same));
}

pub(crate) fn requests(waiting: usize, running: usize) {
    gauge!(QUEUE).set(waiting as f64);
    gauge!(WAITING).set(waiting as f64);
    gauge!(RUNNING).set(running as f64);
}

pub(crate) fn cache_config(page: usize, pages: usize) {
    gauge!(CONFIG, "block_size" => page.to_string(), "num_gpu_blocks" => pages.to_string()).set(1.0);
}
