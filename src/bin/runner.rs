//! `gantry-runner`: the program inside every sandbox.

fn main() -> std::process::ExitCode {
    gantry::runner::main(std::env::args().skip(1))
}
