//! Tells the program which revision it is built from (`AURALINK_REVISION` in its environment).
#![allow(clippy::print_stdout)]

use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-env-changed=AURALINK_REVISION");
    let given = std::env::var("AURALINK_REVISION").unwrap_or_default();
    let release = std::env::var("PROFILE").is_ok_and(|profile| profile == "release");
    let revision = if !given.is_empty() {
        given
    } else if release {
        // Where there is no repository, or no git, as in an image or an archive, whoever builds says it by the variable.
        asked().unwrap_or_else(|| "unknown".to_owned())
    } else {
        // Each commit would build everything anew.
        "debug".to_owned()
    };
    let sane = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | '+');
    let revision: String = revision.chars().filter(sane).take(64).collect();
    println!("cargo:rustc-env=AURALINK_REVISION={revision}");
}

/// The commit, with `-dirty` where the tree is not what was committed.
fn asked() -> Option<String> {
    for place in ["HEAD", "logs/HEAD", "index"] {
        let path = git(&["rev-parse", "--git-path", place])?;
        if Path::new(&path).exists() {
            println!("cargo:rerun-if-changed={path}");
        }
    }
    for part in ["build.rs", "Cargo.toml", "Cargo.lock", "src"] {
        println!("cargo:rerun-if-changed={part}");
    }
    git(&[
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
        "--exclude=*",
    ])
}

fn git(args: &[&str]) -> Option<String> {
    let output = Command::new("git").args(args).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let text = text.trim();
    (output.status.success() && !text.is_empty()).then(|| text.to_owned())
}
