//! `cacheclip-gpu-worker`: configuration, start, drain.

use std::process::ExitCode;

fn main() -> ExitCode {
    cacheclip_service::run("cacheclip-gpu-worker", cacheclip_gpu_worker::start)
}
