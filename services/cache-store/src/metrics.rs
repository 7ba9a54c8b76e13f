//! Metrics of the store: every name, label and meaning in one place.

use cacheclip_rpc::v1::MissReason;
use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use std::time::UNIX_EPOCH;

const REQUESTED: &str = "cacheclip_store_requested_chunks_total";
const HIT: &str = "cacheclip_store_hit_chunks_total";
const MISSING: &str = "cacheclip_store_missing_chunks_total";
const EXPIRED: &str = "cacheclip_store_expired_total";
const PINNED: &str = "cacheclip_store_pinned_bytes";
const OBJECTS: &str = "cacheclip_store_objects";
const USED: &str = "cacheclip_store_used_bytes";
const CAPACITY: &str = "cacheclip_store_capacity_bytes";
const EVICTIONS: &str = "cacheclip_evictions_total";
const VERIFY_FAILURES: &str = "cacheclip_verify_failures_total";
const QUARANTINED: &str = "cacheclip_store_quarantined_total";
const PUTS: &str = "cacheclip_store_puts_total";
const PUT_SECONDS: &str = "cacheclip_store_put_seconds";
const GET_SECONDS: &str = "cacheclip_store_get_seconds";
const SENT: &str = "cacheclip_store_sent_bytes_total";
const INDEX_UP: &str = "cacheclip_index_up";
const INDEX_ERRORS: &str = "cacheclip_index_errors_total";
const SCRUBBED_OBJECTS: &str = "cacheclip_scrub_objects_total";
const SCRUBBED_BYTES: &str = "cacheclip_scrub_bytes_total";
const SCRUB_PASSED: &str = "cacheclip_scrub_last_pass_timestamp_seconds";
const BUCKET_OBJECTS: &str = "cacheclip_store_bucket_objects";
const BUCKET_CALLS: &str = "cacheclip_store_bucket_operations_total";
const BUCKET_QUEUE: &str = "cacheclip_store_bucket_queue_objects";
const DRIFT: &str = "cacheclip_index_blob_drift_objects";

/// Registers descriptions and the zero values of series that may never move.
pub fn describe() {
    describe_counter!(REQUESTED, "Chunks asked for by reads (lookups are probes and do not count)");
    describe_counter!(HIT, "Chunks that reads were served, by tier");
    describe_counter!(
        MISSING,
        "Chunks that reads were not served, by reason; timeout: the client took too long, or the bucket did"
    );
    describe_counter!(EXPIRED, "Containers removed because their time was over");
    describe_gauge!(PINNED, Unit::Bytes, "Bytes of containers that are kept from eviction");
    describe_gauge!(OBJECTS, "Containers on disk");
    describe_gauge!(USED, Unit::Bytes, "Bytes of containers, by tier");
    describe_gauge!(CAPACITY, Unit::Bytes, "Most bytes of containers, by tier");
    describe_counter!(EVICTIONS, "Containers removed to make room, by tier and reason");
    describe_counter!(
        VERIFY_FAILURES,
        "Containers that were not what they should be, by where that was seen"
    );
    describe_counter!(QUARANTINED, "Damaged containers set aside");
    describe_counter!(PUTS, "Puts by outcome");
    describe_histogram!(PUT_SECONDS, Unit::Seconds, "One put");
    describe_histogram!(
        GET_SECONDS,
        Unit::Seconds,
        "One read of layers or of a container, to its last frame"
    );
    describe_counter!(SENT, Unit::Bytes, "Bytes of containers sent");
    describe_gauge!(INDEX_UP, "1 while the index answers this store");
    describe_counter!(
        INDEX_ERRORS,
        "Calls of the index that failed, by what was asked; epoch: it had lost its records"
    );
    describe_gauge!(
        DRIFT,
        "Chunks of which the index may say something else than the files: missing in it, or stale"
    );
    describe_counter!(SCRUBBED_OBJECTS, "Containers that the scrubber read from disk to their last byte");
    describe_counter!(SCRUBBED_BYTES, Unit::Bytes, "Bytes that the scrubber read again, in RAM and on disk");
    describe_gauge!(
        SCRUB_PASSED,
        Unit::Seconds,
        "When the scrubber had been over all containers, in seconds since 1970; 0: not since the start"
    );
    describe_gauge!(BUCKET_OBJECTS, "Containers in the bucket, on disk or not");
    describe_counter!(
        BUCKET_CALLS,
        "Objects that were moved to or from the bucket, and listings of it, by operation and outcome; dropped: the \
         queue was full; abandoned: it was evicted or deleted meanwhile"
    );
    describe_gauge!(BUCKET_QUEUE, "Containers that wait to be uploaded to the bucket");
    gauge!(BUCKET_OBJECTS).set(0.0);
    gauge!(BUCKET_QUEUE).set(0.0);
    for (op, outcome) in BUCKET_OUTCOMES {
        counter!(BUCKET_CALLS, "op" => op, "outcome" => outcome).increment(0);
    }
    counter!(SCRUBBED_OBJECTS).increment(0);
    counter!(SCRUBBED_BYTES).increment(0);
    gauge!(SCRUB_PASSED).set(0.0);
    for reason in MISSES {
        counter!(MISSING, "reason" => reason.label()).increment(0);
    }
    counter!(EXPIRED).increment(0);
    for outcome in ["stored", "existed", "no_room", "deleted", "failed"] {
        counter!(PUTS, "outcome" => outcome).increment(0);
    }
    for tier in [RAM, DISK, BUCKET] {
        counter!(HIT, "tier" => tier).increment(0);
    }
    for (tier, reason) in [(RAM, "capacity"), (DISK, "capacity"), (DISK, "volume_full")] {
        counter!(EVICTIONS, "tier" => tier, "reason" => reason).increment(0);
    }
    for op in [LEASE, PUBLISH, WITHDRAW, LOCATE, EPOCH] {
        counter!(INDEX_ERRORS, "op" => op).increment(0);
    }
    gauge!(INDEX_UP).set(0.0);
    drift(0, 0);
    for place in ["put", AT_DISK, "start", AT_SCRUB, AT_SCRUB_RAM, AT_BUCKET] {
        counter!(VERIFY_FAILURES, "where" => place).increment(0);
    }
    counter!(QUARANTINED).increment(0);
}

/// Why a store does not serve a chunk.
const MISSES: [MissReason; 8] = [
    MissReason::NeverSeen,
    MissReason::Evicted,
    MissReason::Expired,
    MissReason::Deleted,
    MissReason::Layout,
    MissReason::Corrupt,
    MissReason::Timeout,
    MissReason::Unavailable,
];

pub(crate) const RAM: &str = "ram";
pub(crate) const DISK: &str = "disk";
pub(crate) const BUCKET: &str = "bucket";

/// What is done with the bucket, and how it may end.
const BUCKET_OUTCOMES: [(&str, &str); 12] = [
    ("upload", "done"),
    ("upload", "failed"),
    ("upload", "dropped"),
    ("upload", "abandoned"),
    ("fetch", "done"),
    ("fetch", "failed"),
    ("fetch", "missing"),
    ("fetch", "corrupt"),
    ("delete", "done"),
    ("delete", "failed"),
    ("list", "done"),
    ("list", "failed"),
];

/// Where a damaged container was seen: in a read, by the scrubber on disk, by the scrubber in RAM, in the bucket.
pub(crate) const AT_DISK: &str = "disk";
pub(crate) const AT_SCRUB: &str = "scrub";
pub(crate) const AT_SCRUB_RAM: &str = "scrub_ram";
pub(crate) const AT_BUCKET: &str = "bucket";

/// What was asked of the index.
pub(crate) const LEASE: &str = "lease";
pub(crate) const PUBLISH: &str = "publish";
pub(crate) const WITHDRAW: &str = "withdraw";
pub(crate) const LOCATE: &str = "locate";
/// Not a call that failed, but one that showed that the index was emptied.
pub(crate) const EPOCH: &str = "epoch";

pub(crate) fn requested() {
    counter!(REQUESTED).increment(1);
}

pub(crate) fn hit(tier: &'static str) {
    counter!(HIT, "tier" => tier).increment(1);
}

/// A chunk was not served.
pub(crate) fn missing(reason: MissReason) {
    counter!(MISSING, "reason" => reason.label()).increment(1);
}

pub(crate) fn expired() {
    counter!(EXPIRED).increment(1);
}

pub(crate) fn pinned(bytes: u64) {
    gauge!(PINNED).set(bytes as f64);
}

pub(crate) fn capacity(tier: &'static str, bytes: u64) {
    gauge!(CAPACITY, "tier" => tier).set(bytes as f64);
}

pub(crate) fn used(tier: &'static str, bytes: u64) {
    gauge!(USED, "tier" => tier).set(bytes as f64);
}

pub(crate) fn objects(count: usize) {
    gauge!(OBJECTS).set(count as f64);
}

pub(crate) fn bucket_holds(objects: u64, bytes: u64) {
    gauge!(BUCKET_OBJECTS).set(objects as f64);
    used(BUCKET, bytes);
}

/// `op` and `outcome` are a pair of [`BUCKET_OUTCOMES`].
pub(crate) fn bucket(op: &'static str, outcome: &'static str, objects: usize) {
    counter!(BUCKET_CALLS, "op" => op, "outcome" => outcome).increment(objects as u64);
}

pub(crate) fn bucket_queue(objects: usize) {
    gauge!(BUCKET_QUEUE).set(objects as f64);
}

pub(crate) fn evicted(tier: &'static str, reason: &'static str) {
    counter!(EVICTIONS, "tier" => tier, "reason" => reason).increment(1);
}

/// `place` is put, start, or one of the `AT_` above.
pub(crate) fn verify_failed(place: &'static str) {
    counter!(VERIFY_FAILURES, "where" => place).increment(1);
}

pub(crate) fn quarantined() {
    counter!(QUARANTINED).increment(1);
}

pub(crate) fn scrubbed(bytes: u64) {
    counter!(SCRUBBED_BYTES).increment(bytes);
}

pub(crate) fn scrubbed_object() {
    counter!(SCRUBBED_OBJECTS).increment(1);
}

/// The scrubber has been over everything.
pub(crate) fn scrub_passed() {
    gauge!(SCRUB_PASSED).set(UNIX_EPOCH.elapsed().map_or(0.0, |since| since.as_secs_f64()));
}

pub(crate) fn put(outcome: &'static str, seconds: f64) {
    counter!(PUTS, "outcome" => outcome).increment(1);
    histogram!(PUT_SECONDS).record(seconds);
}

pub(crate) fn get(seconds: f64) {
    histogram!(GET_SECONDS).record(seconds);
}

pub(crate) fn sent(bytes: usize) {
    counter!(SENT).increment(bytes as u64);
}

pub(crate) fn index_up(up: bool) {
    gauge!(INDEX_UP).set(f64::from(u8::from(up)));
}

pub(crate) fn index_error(op: &'static str) {
    counter!(INDEX_ERRORS, "op" => op).increment(1);
}

/// Chunks that the index may lack, and chunks that it may name wrongly.
pub(crate) fn drift(missing: usize, stale: usize) {
    gauge!(DRIFT, "kind" => "missing").set(missing as f64);
    gauge!(DRIFT, "kind" => "stale").set(stale as f64);
}
