//! `gantry-runner`: the program inside every sandbox.

use std::process::ExitCode;

fn main() -> ExitCode {
    match gantry::runner::main(std::env::args().skip(1)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("gantry-runner: {error:#}");
            ExitCode::FAILURE
        }
    }
}
