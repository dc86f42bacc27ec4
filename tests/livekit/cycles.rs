//! Sessions come and go: nothing of them stays. AURALINK_CYCLES says how many, 200 where it is not set.

use crate::harness::{Load, Trial, array, number, setting, wait_for};
use crate::servers::{Options, Sidecar, Stack};
use std::fs;
use std::process::Command;
use std::time::Duration;

/// Participants that join together.
const BATCH: u32 = 50;

/// What a process holds: sockets, all descriptors, resident KiB, threads.
#[derive(Debug, Clone, Copy)]
struct Held {
    sockets: usize,
    descriptors: usize,
    rss_kib: u64,
    threads: u64,
}

fn held(sidecar: &Sidecar) -> Held {
    let pid = sidecar.process.pid();
    let entries: Vec<_> = fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .flatten()
        .collect();
    let sockets = entries
        .iter()
        .filter(|entry| {
            fs::read_link(entry.path())
                .is_ok_and(|to| to.display().to_string().starts_with("socket:"))
        })
        .count();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        status
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .and_then(|rest| rest.split_whitespace().next()?.parse().ok())
            .unwrap()
    };
    Held {
        sockets,
        descriptors: entries.len(),
        rss_kib: field("VmRSS:"),
        threads: field("Threads:"),
    }
}

fn batch(trial: &Trial, sidecar: &Sidecar, index: u32, participants: u32) {
    let mut command = Command::new(setting("AURALINK_GO_CLIENT"));
    command.args([
        "--url",
        &sidecar.url(),
        "--room",
        &format!("lean-cycle-{index}"),
        "--identity",
        "p",
        "--load",
        &participants.to_string(),
        "--rooms",
        "10",
        "--speakers",
        "10",
        "--seconds",
        "2",
        "--join-rate",
        "40",
        "--wait-timeout",
        "60",
    ]);
    let mut process = trial.participant(&format!("load-{index}"), command, 2.0);
    let code = process.wait(Duration::from_secs(120));
    let text = fs::read_to_string(&process.out).unwrap_or_default();
    assert_eq!(code, 0, "batch {index}: {text}");
    let report: serde_json::Value =
        serde_json::from_str(text.lines().last().unwrap_or("")).unwrap();
    assert_eq!(
        number(&report, "/joined"),
        f64::from(participants),
        "batch {index}: {text}"
    );
    assert_eq!(
        number(&report, "/pairs_heard"),
        number(&report, "/pairs"),
        "batch {index}: {text}"
    );
    // Of what was sent while all were there.
    let (expected, lost) = (
        number(&report, "/packets_expected"),
        number(&report, "/packets_lost"),
    );
    assert!(
        expected > 0.0 && lost <= 0.02 * expected,
        "batch {index}: {text}"
    );
    wait_for(
        "the batch's sessions to end",
        Duration::from_secs(30),
        || sidecar.open_sessions().is_empty().then_some(()),
    );
}

#[test]
fn nothing_stays_of_ended_sessions() {
    let trial = Trial::new("nothing_stays_of_ended_sessions", Load::Alone);
    let cycles: u32 = std::env::var("AURALINK_CYCLES").map_or(200, |count| {
        count
            .parse()
            .expect("AURALINK_CYCLES is a number of sessions")
    });
    let stack = Stack::own(
        &trial,
        Options {
            resume_grace: "3s",
            consent_timeout: "10s",
            ..Options::default()
        },
    );
    let sidecar = &stack.sidecar;
    // Fills what is allocated once: buffers, thread pools, metrics.
    batch(&trial, sidecar, 0, BATCH);
    std::thread::sleep(Duration::from_secs(2));
    let before = held(sidecar);
    let batches = cycles.div_ceil(BATCH);
    for index in 1..=batches {
        batch(&trial, sidecar, index, BATCH);
    }
    // Connections that were kept alive end, and a worker's snapshot is a second old.
    let settled = wait_for("sockets to be freed", Duration::from_secs(20), || {
        let now = held(sidecar);
        (now.sockets <= before.sockets).then_some(now)
    });
    println!(
        "before {before:?}, after {} more sessions {settled:?}",
        batches * BATCH
    );
    assert!(
        settled.descriptors <= before.descriptors,
        "descriptors grew from {} to {}",
        before.descriptors,
        settled.descriptors
    );
    assert!(
        settled.threads <= before.threads + 2,
        "threads grew: {before:?} {settled:?}"
    );
    // A session that stayed whole would hold far more than this (docs/benchmarks.md: memory per session).
    let allowed = 8 * 1024 + u64::from(batches * BATCH) * 4;
    assert!(
        settled.rss_kib <= before.rss_kib + allowed,
        "resident memory grew from {} to {} KiB, more than {allowed} KiB",
        before.rss_kib,
        settled.rss_kib
    );
    // A worker tells what it holds once a second.
    wait_for(
        "/status.json to show neither session nor peer connection",
        Duration::from_secs(5),
        || {
            let status = sidecar.status();
            let held = array(&status, "/workers")
                .iter()
                .map(|worker| number(worker, "/peer_connections"));
            (array(&status, "/sessions").is_empty() && held.sum::<f64>() == 0.0).then_some(())
        },
    );
    assert_eq!(sidecar.complaints(), Vec::<String>::new());
}
