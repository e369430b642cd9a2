//! The binary `engine`: the library's command line.

fn main() -> std::process::ExitCode {
    kernelcast::cli::main()
}
