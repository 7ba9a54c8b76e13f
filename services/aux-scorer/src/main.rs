//! `cacheclip-aux-scorer`: configuration, start, drain.

use std::process::ExitCode;

fn main() -> ExitCode {
    cacheclip_service::run("cacheclip-aux-scorer", cacheclip_aux_scorer::start)
}
