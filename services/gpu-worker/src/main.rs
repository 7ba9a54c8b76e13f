//! `cacheclip-gpu-worker`: configuration, start, drain.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: cacheclip_service::Allocator = cacheclip_service::Allocator;

fn main() -> ExitCode {
    cacheclip_service::run("cacheclip-gpu-worker", cacheclip_gpu_worker::start)
}
