//! `cacheclip serve`: the embedded fleet until it is told to stop.

use crate::text;
use cacheclip::fleet::{Fleet, Options};
use std::path::PathBuf;
use std::process::ExitCode;

/// Arguments of `serve`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Address of the gateway's gRPC port.
    #[arg(long, default_value = "127.0.0.1:7070")]
    listen: String,
    /// Address of the admin port: /metrics, /live, /ready.
    #[arg(long, default_value = "127.0.0.1:7071")]
    admin: String,
    /// Directory of the store.
    #[arg(long, default_value = "data")]
    data: PathBuf,
    /// Directory with the models `primary/` and `aux/`.
    #[arg(long, default_value = "models/tiny")]
    models: PathBuf,
    /// Collector that spans are sent to, by OTLP over gRPC; absent: nowhere.
    #[arg(long, value_name = "URL", env = cacheclip_service::telemetry::ENDPOINT)]
    pub(crate) otlp_endpoint: Option<String>,
}

pub(crate) async fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    // Listened for before the start, so that a signal during it is not lost.
    let stop = cacheclip_service::stop_signal();
    tokio::pin!(stop);
    let mut options = Options::embedded(&arguments.models, &arguments.data);
    options.gateway.service.listen = arguments.listen;
    options.gateway.service.admin_listen = Some(arguments.admin);
    let fleet = tokio::select! {
        fleet = Fleet::start(options) => fleet?,
        () = &mut stop => return Ok(ExitCode::SUCCESS),
    };
    text::line(format_args!("gateway {}", fleet.endpoint()));
    if let Some(admin) = fleet.admin() {
        text::line(format_args!("metrics http://{admin}/metrics"));
    }
    stop.await;
    fleet.drain().await;
    Ok(ExitCode::SUCCESS)
}
