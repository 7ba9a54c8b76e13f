//! `cacheclip-gateway`: configuration, start, drain.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: cacheclip_service::Allocator = cacheclip_service::Allocator;

fn main() -> ExitCode {
    cacheclip_service::run("cacheclip-gateway", cacheclip_gateway::start)
}
