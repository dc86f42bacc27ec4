//! What every fuzz target shares: [`fuzz_target!`], which makes a libFuzzer target under cargo-fuzz and, in every other
//! build, a program that runs its body over the files named on its command line.
//!
//! The second needs neither nightly nor a fuzzer, so that `make test` compiles all targets and replays their seeds.

#[cfg(fuzzing)]
pub use libfuzzer_sys;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Defines a target over `&[u8]` or over `&str`, as `libfuzzer_sys::fuzz_target!` does.
#[macro_export]
macro_rules! fuzz_target {
    (|$text:ident: &str| $body:expr) => {
        $crate::fuzz_target!(|bytes: &[u8]| {
            let $text = $crate::text(bytes);
            $body
        });
    };
    (|$data:ident: &[u8]| $body:expr) => {
        #[cfg(fuzzing)]
        $crate::libfuzzer_sys::fuzz_target!(|$data: &[u8]| { $body });

        #[cfg(not(fuzzing))]
        fn main() -> std::process::ExitCode {
            $crate::replay(|$data: &[u8]| $body)
        }
    };
}

/// The longest start of `bytes` that is UTF-8.
#[must_use]
pub fn text(bytes: &[u8]) -> &str {
    match std::str::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => std::str::from_utf8(&bytes[..error.valid_up_to()]).unwrap_or_default(),
    }
}

/// Runs `target` over every file named on the command line, and over every file in the folders named there. Says which
/// file it was that a panic came from; no file at all is a failure.
pub fn replay(target: impl Fn(&[u8])) -> ExitCode {
    let mut files = Vec::new();
    for argument in std::env::args_os().skip(1) {
        if let Err(error) = collect(Path::new(&argument), &mut files) {
            eprintln!("{}: {error}", Path::new(&argument).display());
            return ExitCode::from(2);
        }
    }
    files.sort();
    if files.is_empty() {
        eprintln!("no inputs: name files, or folders of files such as fuzz/seeds/TARGET");
        return ExitCode::from(2);
    }
    let mut failed = 0;
    for file in &files {
        let bytes = match std::fs::read(file) {
            Ok(bytes) => bytes,
            Err(error) => {
                eprintln!("{}: {error}", file.display());
                return ExitCode::from(2);
            }
        };
        let run = std::panic::AssertUnwindSafe(|| target(&bytes));
        if std::panic::catch_unwind(run).is_err() {
            eprintln!("failed: {}", file.display());
            failed += 1;
        }
    }
    // The closing line is read by `.ci/run`; a closed pipe is nobody's concern here.
    let _ = writeln!(
        std::io::stdout(),
        "{} passed, {failed} failed",
        files.len() - failed
    );
    ExitCode::from(u8::from(failed > 0))
}

fn collect(path: &Path, files: &mut Vec<PathBuf>) -> std::io::Result<()> {
    if !path.is_dir() {
        files.push(path.to_owned());
        return Ok(());
    }
    for entry in std::fs::read_dir(path)? {
        collect(&entry?.path(), files)?;
    }
    Ok(())
}
