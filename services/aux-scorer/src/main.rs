//! `cacheclip-aux-scorer`: configuration, start, drain.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: cacheclip_service::Allocator = cacheclip_service::Allocator;

fn main() -> ExitCode {
    cacheclip_service::run("cacheclip-aux-scorer", cacheclip_aux_scorer::start)
}
