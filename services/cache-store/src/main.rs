//! `cacheclip-cache-store`: configuration, start, drain.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: cacheclip_service::Allocator = cacheclip_service::Allocator;

fn main() -> ExitCode {
    cacheclip_service::run("cacheclip-cache-store", cacheclip_cache_store::serve)
}
