//! `cacheclip-cache-store`: configuration, start, drain.

use std::process::ExitCode;

fn main() -> ExitCode {
    cacheclip_service::run("cacheclip-cache-store", cacheclip_cache_store::serve)
}
