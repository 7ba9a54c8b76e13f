//! Worker options that benchmarks compare.

use cacheclip_gpu_worker::Loading;
use serde_json::json;

/// How the worker of a benchmark decides.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct Tuning {
    /// Chunks that the store has: auto (loaded if that is sooner than computing them), always, never.
    #[arg(long, default_value = "auto", value_parser = loading)]
    pub(crate) loading: Loading,
}

/// One way to decide, by its name in the worker's configuration.
pub(crate) fn loading(text: &str) -> Result<Loading, String> {
    serde_json::from_value(json!(text)).map_err(|_| "auto, always or never".into())
}

/// `on` or `off` of the command line.
pub(crate) fn on_off(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("on or off".into()),
    }
}
