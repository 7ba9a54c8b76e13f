//! `cacheclip-gateway`: configuration, start, drain.

use std::process::ExitCode;

fn main() -> ExitCode {
    cacheclip_service::run("cacheclip-gateway", cacheclip_gateway::start)
}
