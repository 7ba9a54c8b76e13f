//! Clocks and counters of this machine.

use super::limits::Limits;
use anyhow::Context as _;
pub(crate) use cacheclip_bench::runs::Runs;
use serde::Serialize;

/// The machine and the build that figures come from.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Machine {
    pub(crate) cpu: String,
    pub(crate) cores: usize,
    pub(crate) threads: usize,
    /// Widest vector unit that the kernels use here.
    pub(crate) vectors: &'static str,
    pub(crate) limits: Limits,
    pub(crate) version: &'static str,
}

impl Machine {
    pub(crate) fn here() -> Self {
        let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = info.lines().find(|line| line.starts_with("model name"));
        let cpu = model.and_then(|line| line.split(": ").nth(1)).unwrap_or("unknown").to_owned();
        Self {
            cpu,
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            threads: rayon::current_num_threads(),
            vectors: cacheclip_model::vectors(),
            limits: Limits::measure(rayon::current_num_threads()),
            version: env!("CARGO_PKG_VERSION"),
        }
    }
}

impl Machine {
    /// One line for people.
    pub(crate) fn text(&self) -> String {
        format!(
            "{}, {} threads, {}: {:.0} GFLOP/s of multiply-adds, {:.1} GB/s read",
            self.cpu,
            self.threads,
            self.vectors,
            self.limits.flops / 1e9,
            self.limits.read_bytes / 1e9
        )
    }
}

/// CPU seconds (user and system, all threads) of a process so far.
pub(crate) fn cpu_seconds(process: &str) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    // Behind the name, which may hold spaces: state is field 3, user and system ticks are 14 and 15.
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or_default().split(' ').collect();
    let ticks = |index: usize| fields.get(index).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
    // Linux fixes the unit of these at a hundredth of a second.
    (ticks(11) + ticks(12)) / 100.0
}

/// A gauge of the services that share this process.
pub(crate) fn reported(name: &str) -> anyhow::Result<f64> {
    let metrics = cacheclip_service::telemetry::render();
    let value = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    Ok(value.with_context(|| format!("no service reports {name}"))?.trim().parse()?)
}

/// Forgets the peak so far; where the system does not allow that, later peaks include it.
pub(crate) fn reset_peak_rss() {
    reset_peak_rss_of("self");
}

/// The same of another process of this user.
pub(crate) fn reset_peak_rss_of(process: &str) {
    let _ = std::fs::write(format!("/proc/{process}/clear_refs"), "5");
}

/// Peak resident bytes of this process, since it began or since the peak was last forgotten.
pub(crate) fn peak_rss_bytes() -> u64 {
    peak_rss_bytes_of("self")
}

/// The same of another process.
pub(crate) fn peak_rss_bytes_of(process: &str) -> u64 {
    status_bytes(process, "VmHWM:")
}

/// Resident bytes of this process.
pub(crate) fn rss_bytes() -> u64 {
    rss_bytes_of("self")
}

/// The same of another process.
pub(crate) fn rss_bytes_of(process: &str) -> u64 {
    status_bytes(process, "VmRSS:")
}

fn status_bytes(process: &str, field: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

/// Uses this many threads in kernels; before anything else does.
pub(crate) fn use_threads(threads: usize) -> anyhow::Result<()> {
    Ok(rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_used_time_and_memory() {
        while cpu_seconds("self") == 0.0 {
            std::hint::black_box((0..1_000_000u64).sum::<u64>());
        }
        // The kernel counts pages in batches per thread: the peak may be read a little below what is resident.
        assert!(rss_bytes() > 1 << 20 && peak_rss_bytes() > 1 << 20);
    }
}
