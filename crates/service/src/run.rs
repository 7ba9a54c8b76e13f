//! What every server's `main` does: arguments, configuration, start, wait for a signal, drain.

use crate::config::{self, Override};
use crate::running::Drain;
use crate::telemetry::{self, Format, TelemetryOptions};
use clap::{CommandFactory as _, FromArgMatches as _, Parser};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::future::Future;
use std::path::PathBuf;
use std::process::ExitCode;

/// Exit code for a configuration that cannot be used (EX_USAGE).
pub const BAD_CONFIG: u8 = 64;
/// Exit code for a server that did not start.
pub const FAILED_START: u8 = 1;

/// Why a server did not start, where that has an exit code of its own: for who starts it again, or somewhere else.
#[derive(Debug, thiserror::Error)]
#[error("{why}")]
pub struct Failure {
    /// The code.
    pub code: u8,
    /// What happened, in one line.
    pub why: String,
}

#[derive(Debug, Parser)]
struct Arguments {
    /// TOML file with the configuration.
    #[arg(long, value_name = "FILE", env = "CACHECLIP_CONFIG")]
    config: Option<PathBuf>,
    /// Sets one field, over file and environment; may be repeated.
    #[arg(long = "set", value_name = "FIELD=VALUE")]
    overrides: Vec<Override>,
    /// Prints the resulting configuration and stops.
    #[arg(long)]
    dump_config: bool,
    /// Log filter.
    #[arg(long, value_name = "FILTER", env = "CACHECLIP_LOG", default_value = "info")]
    log: String,
    /// Shape of log lines.
    #[arg(long, env = "CACHECLIP_LOG_FORMAT", default_value = "text")]
    log_format: Format,
    /// Collector that spans are sent to, by OTLP over gRPC; absent: nowhere.
    #[arg(long, value_name = "URL", env = telemetry::ENDPOINT)]
    otlp_endpoint: Option<String>,
}

/// Runs a server until SIGTERM or SIGINT, then drains it. `start` returns once the ports are bound.
///
/// Exit codes: 0 drained (or help, or the configuration was printed), 64 bad configuration, that of a [`Failure`], or 1 failed start.
pub fn run<T, S, F, R, E>(name: &'static str, start: S) -> ExitCode
where
    T: DeserializeOwned + Serialize + Default,
    S: FnOnce(T) -> F,
    F: Future<Output = Result<R, E>>,
    R: Drain,
    E: Into<anyhow::Error>,
{
    let arguments = match parse(name, std::env::args_os()) {
        Ok(arguments) => arguments,
        Err(error) => {
            // clap prints help and version the same way, with an exit code of 0.
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(BAD_CONFIG) } else { ExitCode::SUCCESS };
        }
    };
    let options: T = match config::load(arguments.config.as_deref(), &arguments.overrides) {
        Ok(options) => options,
        Err(error) => return fail(name, &error, BAD_CONFIG),
    };
    if arguments.dump_config {
        return match config::dump(&options) {
            Ok(text) => {
                use std::io::Write as _;
                // A reader that closed the pipe early has what it wanted.
                let _ = std::io::stdout().write_all(text.as_bytes());
                ExitCode::SUCCESS
            }
            Err(error) => fail(name, &error, BAD_CONFIG),
        };
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().thread_name(name).build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(name, &error, FAILED_START),
    };
    let telemetry = TelemetryOptions {
        format: arguments.log_format,
        filter: arguments.log,
        service: name.into(),
        otlp_endpoint: arguments.otlp_endpoint,
    };
    {
        // Spans are sent from this runtime.
        let _entered = runtime.enter();
        if let Err(error) = telemetry::init(&telemetry) {
            return fail(name, &error, BAD_CONFIG);
        }
    }
    let code = runtime.block_on(async {
        // Listened for before the start, so that a signal during a long start is not lost.
        let stop = stop_signal();
        tokio::pin!(stop);
        let started = tokio::select! {
            started = start(options) => started,
            () = &mut stop => return ExitCode::SUCCESS,
        };
        match started {
            Ok(running) => {
                stop.await;
                running.drain().await;
                ExitCode::SUCCESS
            }
            Err(error) => {
                let error: anyhow::Error = error.into();
                fail(name, &format_args!("{error:#}"), failed_with(&error))
            }
        }
    });
    runtime.block_on(telemetry::flush());
    // A blocking call that never returns must not keep a drained process alive.
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    code
}

fn parse(
    name: &'static str,
    arguments: impl Iterator<Item = std::ffi::OsString>,
) -> Result<Arguments, clap::Error> {
    let matches =
        Arguments::command().name(name).version(env!("CARGO_PKG_VERSION")).try_get_matches_from(arguments)?;
    Arguments::from_arg_matches(&matches)
}

fn failed_with(error: &anyhow::Error) -> u8 {
    let failure = error.chain().find_map(|cause| cause.downcast_ref::<Failure>());
    failure.map_or(FAILED_START, |failure| failure.code)
}

#[allow(clippy::print_stderr, reason = "the line must appear whatever the log filter says")]
fn fail(name: &str, error: &dyn std::fmt::Display, code: u8) -> ExitCode {
    eprintln!("{name}: {error}");
    ExitCode::from(code)
}

/// Completes on SIGTERM or SIGINT.
pub async fn stop_signal() {
    use tokio::signal::unix::{SignalKind, signal};
    let (terminate, interrupt) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()));
    match (terminate, interrupt) {
        (Ok(mut terminate), Ok(mut interrupt)) => {
            tokio::select! {
                _ = terminate.recv() => tracing::info!("SIGTERM: draining"),
                _ = interrupt.recv() => tracing::info!("SIGINT: draining"),
            }
        }
        (terminate, interrupt) => {
            tracing::warn!(?terminate, ?interrupt, "signals cannot be caught: a stop will not be gentle");
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(line: &str) -> Result<Arguments, clap::Error> {
        parse("sample", line.split(' ').map(Into::into))
    }

    #[test]
    fn the_command_line_takes_a_file_and_repeated_overrides() {
        let parsed =
            arguments("sample --config a.toml --set x=1 --set y.z=two --log-format json").expect("sound");
        assert_eq!(parsed.config, Some("a.toml".into()));
        assert_eq!(parsed.overrides.len(), 2);
        assert_eq!(parsed.log_format, Format::Json);
        assert!(!parsed.dump_config);
        let parsed = arguments("sample --otlp-endpoint http://collector:4317").expect("sound");
        assert_eq!(parsed.otlp_endpoint.as_deref(), Some("http://collector:4317"));
        assert!(arguments("sample --set nothing").expect_err("no value").use_stderr());
    }

    #[test]
    fn a_failure_keeps_its_code_under_what_is_said_about_it() {
        let error = anyhow::Error::from(Failure { code: 80, why: "no device".into() }).context("model tiny");
        assert_eq!((failed_with(&error), format!("{error:#}").as_str()), (80, "model tiny: no device"));
        assert_eq!(failed_with(&anyhow::anyhow!("an address in use")), FAILED_START);
    }
}
