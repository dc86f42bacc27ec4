//! Rules about the source text itself (docs/ARCHITECTURE.md), and about the Makefile.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr)]

use std::fs;
use std::path::{Path, PathBuf};

/// A file should stay under this; beyond it, it is listed.
const GOAL: usize = 600;

/// A file over this fails.
const MOST: usize = 900;

fn rust_files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn no_source_file_runs_away() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    for folder in ["src", "tests", "benches"] {
        rust_files(&root.join(folder), &mut files);
    }
    assert!(files.len() > 50, "only {} files were found", files.len());
    let mut long: Vec<(usize, String)> = files
        .iter()
        .map(|path| {
            let name = path.strip_prefix(root).unwrap().display().to_string();
            (fs::read_to_string(path).unwrap().lines().count(), name)
        })
        .filter(|(lines, _)| *lines > GOAL)
        .collect();
    long.sort_unstable();
    for (lines, name) in &long {
        eprintln!("{name}: {lines} lines, over the {GOAL} it should stay under");
    }
    long.retain(|(lines, _)| *lines > MOST);
    assert!(long.is_empty(), "over {MOST} lines, split them: {long:?}");
}

/// What `make clean` would run, with this folder for builds named by the caller or none.
fn clean(target: Option<&str>) -> String {
    let mut make = std::process::Command::new("make");
    // Under `make test` this is a make within a make.
    make.args(["--no-print-directory", "-n", "clean"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env("XDG_CACHE_HOME", "/the-cache")
        .env_remove("MAKEFLAGS")
        .env_remove("CARGO_TARGET_DIR");
    if let Some(target) = target {
        make.env("CARGO_TARGET_DIR", target);
    }
    let output = make
        .output()
        .expect("make is missing: apt-get install make");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn make_clean_deletes_what_is_its_own() {
    assert_eq!(clean(None), "rm -rf \"/the-cache/auralink/target\"\n");
    let careful = clean(Some("/somebody/elses"));
    assert!(!careful.contains("rm "), "{careful}");
    assert!(careful.lines().count() == 2 && careful.contains("cargo clean --locked -p auralink "));
}
