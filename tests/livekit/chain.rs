//! Two sidecars in a row in front of the stock server, and what their status pages say of the hop between them.

use crate::client::{Client, Kind, Report};
use crate::harness::{Process, Trial, number, root, setting, string, wait_for};
use crate::servers::{LiveKit, Options, Sidecar};
use nix::sched::{CloneFlags, setns};
use serde_json::Value;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Rooms `neural-*` are neural, `lean-*` lean, all others off.
pub(crate) const ROOMS: &str =
    "rooms:\n  - { match: \"neural-*\", mode: neural }\n  - { match: \"lean-*\", mode: lean }\n";
/// Every room is off.
pub(crate) const ALL_OFF: &str = "rooms:\n  - { match: \"*\", mode: off }\n";

/// What `make models` made: the variable, or its place in the cache.
fn made(variable: &str, place: &str) -> String {
    if let Ok(value) = std::env::var(variable) {
        return value;
    }
    let cache = std::env::var("XDG_CACHE_HOME").unwrap_or_else(|_| {
        let home = std::env::var("HOME").expect("HOME or XDG_CACHE_HOME has to be set");
        format!("{home}/.cache")
    });
    let path = format!("{cache}/auralink/{place}");
    assert!(
        Path::new(&path).exists(),
        "{path} is not there: run `make models`"
    );
    path
}

/// The folder of bundles.
pub(crate) fn models() -> String {
    made("AURALINK_MODELS", "models")
}

/// ONNX Runtime's library.
pub(crate) fn runtime() -> String {
    made("AURALINK_ONNXRUNTIME", "onnxruntime/libonnxruntime.so")
}

/// Rules, and an engine with the models of this folder.
pub(crate) fn with_models(models: &str, rules: &str) -> String {
    with_runtime(models, &runtime(), rules)
}

/// The same with this ONNX Runtime.
pub(crate) fn with_runtime(models: &str, runtime: &str, rules: &str) -> String {
    format!("engine: {{ threads: 1, models: {models}, runtime: {runtime} }}\n{rules}")
}

/// Sidecar options with these rules; one worker, so that all sessions share it.
pub(crate) fn options(rules: String) -> Options {
    Options {
        workers: 1,
        rules,
        ..Options::default()
    }
}

/// clients ⇄ edge ⇄ origin ⇄ server.
pub(crate) struct Chain {
    pub(crate) edge: Sidecar,
    pub(crate) origin: Sidecar,
    pub(crate) livekit: LiveKit,
}

impl Chain {
    /// Both with models, rooms as [`ROOMS`] has them.
    pub(crate) fn neural(trial: &Trial) -> Self {
        let rules = with_models(&models(), ROOMS);
        Self::start(trial, rules.clone(), rules)
    }

    /// On loopback.
    pub(crate) fn start(trial: &Trial, edge: String, origin: String) -> Self {
        let livekit = LiveKit::start(&trial.dir);
        let origin = Sidecar::start(&trial.dir.join("origin"), livekit.port, options(origin));
        let edge = Sidecar::start(&trial.dir.join("edge"), origin.port, options(edge));
        for process in [&livekit.process, &origin.process, &edge.process] {
            trial.watch(&process.log);
        }
        Self {
            edge,
            origin,
            livekit,
        }
    }

    /// Waits until so many sessions of the room are open at the edge and framed packets go both ways.
    pub(crate) fn wait_talking(&self, room: &str, sessions: usize) {
        wait_for("the call", Duration::from_secs(60), || {
            let status = self.edge.status();
            (self.edge.sessions_in(room) == sessions
                && hop(&status, "/packets/sent") > 25.0
                && hop(&status, "/packets/received") > 25.0)
                .then_some(())
        });
    }

    /// Waits until the room's sessions have ended; neither sidecar may have complained.
    pub(crate) fn wait_over(&self, room: &str) {
        for sidecar in [&self.edge, &self.origin] {
            sidecar.wait_empty(room, Duration::from_secs(30));
            assert_eq!(sidecar.complaints(), Vec::<String>::new());
        }
    }
}

/// A counter of `totals.hop`.
pub(crate) fn hop(status: &Value, pointer: &str) -> f64 {
    number(status, &format!("/totals/hop{pointer}"))
}

/// Originals that were not coded though they hold speech.
pub(crate) fn natives(status: &Value) -> f64 {
    let all = status["totals"]["hop"]["native"].as_object();
    all.into_iter()
        .flatten()
        // Pauses are a few bytes as they are.
        .filter(|(reason, _)| !["dtx", "silence"].contains(&reason.as_str()))
        .filter_map(|(_, count)| count.as_f64())
        .sum()
}

/// Makes a call, and makes it once more where the machine was too busy for codecs to keep their deadline: then speech goes native, as
/// it has to, which says nothing about what else is asserted. `call` gives what it has seen and what the sidecars' status pages say.
pub(crate) fn undisturbed<T>(trial: &Trial, mut call: impl FnMut() -> (T, [Value; 2])) -> T {
    let (seen, statuses) = call();
    let counts = |status: &Value| {
        let late = hop(status, "/native/missed") + hop(status, "/native/resting");
        (late, hop(status, "/originals/coded"))
    };
    let mut counts = statuses.iter().map(counts);
    let Some((late, coded)) = counts.find(|(late, coded)| *late > 0.1 * coded) else {
        return seen;
    };
    if !trial.again(&format!(
        "codecs were late for {late} packets and in time for {coded}"
    )) {
        return seen;
    }
    drop(seen);
    call().0
}

/// Whether anything was ever framed here.
pub(crate) fn framed(status: &Value) -> bool {
    hop(status, "/packets/sent") + hop(status, "/packets/received") > 0.0
}

/// Groups that were encoded on a rung.
pub(crate) fn encoded(status: &Value, rung: &str) -> f64 {
    number(status, &format!("/engine/encoded/{rung}"))
}

/// Whether the engine can use a rung now.
pub(crate) fn usable(status: &Value, rung: &str) -> bool {
    status["engine"]["rungs"]
        .as_array()
        .is_some_and(|rungs| rungs.iter().any(|name| name == rung))
}

/// What tests/clients/python/score.py says of a recording.
fn score(trial: &Trial, name: &str, reference: &str, recording: &str) -> Value {
    let mut command = Command::new(setting("AURALINK_PYTHON"));
    command
        .arg(root().join("tests/clients/python/score.py"))
        .args([reference, recording, "--skip", "2"]);
    let mut process = Process::spawn(&trial.dir, &format!("score-{name}"), &mut command, true);
    let code = process.wait(Duration::from_secs(120));
    let text = fs::read_to_string(&process.out).unwrap_or_default();
    assert_eq!(
        code,
        0,
        "score.py {reference} {recording}: {}",
        fs::read_to_string(&process.log).unwrap_or_default()
    );
    println!("{}: {name}: {}", trial.name, text.trim());
    serde_json::from_str(&text).expect("score.py's report")
}

/// ViSQOL of L2 after the client's own Opus is 3.36 over many speakers, and between 2.95 and 3.7 for single stretches of the two
/// that talk here. Under this it is broken, not unlucky.
pub(crate) const GOOD_SPEECH: f64 = 2.7;

/// Path of a speech file.
pub(crate) fn speech(name: &str) -> String {
    format!("{}/{name}.wav", setting("AURALINK_SPEECH"))
}

/// Someone who says `name` and keeps what it hears.
pub(crate) fn talker(
    trial: &Trial,
    kind: Kind,
    url: &str,
    room: &str,
    identity: &str,
    name: &str,
) -> Client {
    Client::new(kind, url, room, identity)
        .wav(&speech(name))
        .with("--record", trial.dir.display())
}

/// Asserts that `ear` heard the speech `name` of `peer` well, and to its end; the score is printed.
pub(crate) fn heard_well(
    trial: &Trial,
    ear: &Report,
    peer: &Report,
    name: &str,
    least: f64,
) -> Value {
    ear.lasted(peer);
    let peer = &peer.client.identity;
    let recording = string(ear.audio_from(peer), "/wav");
    assert!(
        !recording.is_empty(),
        "{} has no recording of {peer}: {}",
        ear.client.identity,
        ear.json
    );
    let what = format!("{}-from-{peer}", ear.client.identity);
    let score = score(trial, &what, &speech(name), recording);
    // Another's speech has envelopes that correlate by 0.29 to 0.36; what lost a tenth of its packets in bursts, by 0.52 to 0.82.
    assert!(
        number(&score, "/visqol") >= least && number(&score, "/correlation") > 0.42,
        "{what}: not the speech that was said, or badly coded (ViSQOL under {least}): {score}"
    );
    score
}

/// A link of tests/tools/linksim.py between two network namespaces; they go away with this value. Needs root.
pub(crate) struct Link {
    left: PathBuf,
    right: PathBuf,
    _process: Process,
}

/// Addresses of the link's ends.
pub(crate) const LEFT: &str = "10.77.0.1";
pub(crate) const RIGHT: &str = "10.77.0.2";

impl Link {
    /// `arguments` say what the link does to packets, both ways.
    pub(crate) fn new(trial: &Trial, arguments: &[&str]) -> Self {
        let mut command = Command::new(setting("AURALINK_PYTHON"));
        command
            .arg(root().join("tests/tools/linksim.py"))
            .args(arguments)
            .args(["--", "sh", "-c", "echo \"$LEFT;$RIGHT\"; exec sleep 600"]);
        let mut process = Process::spawn(&trial.dir, "linksim", &mut command, true);
        trial.watch(&process.log);
        let said = wait_for("linksim.py", Duration::from_secs(20), || {
            let said = fs::read_to_string(&process.out).unwrap_or_default();
            assert!(
                process.running(),
                "linksim.py ended (it needs root and /dev/net/tun): {}",
                fs::read_to_string(&process.log).unwrap_or_default()
            );
            said.ends_with('\n').then_some(said)
        });
        let path = |said: &str| {
            let path = said.trim().strip_prefix("nsenter --net=");
            PathBuf::from(path.expect("linksim.py's LEFT and RIGHT"))
        };
        let (left, right) = said.split_once(';').expect("linksim.py's LEFT and RIGHT");
        Self {
            left: path(left),
            right: path(right),
            _process: process,
        }
    }

    /// Runs `work`, and every process that it starts, at the left end.
    pub(crate) fn left<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        within(&self.left, work)
    }

    /// Runs `work`, and every process that it starts, at the right end.
    pub(crate) fn right<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        within(&self.right, work)
    }
}

/// A thread has a network namespace of its own, and its children inherit it.
fn within<T: Send>(namespace: &Path, work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let file = File::open(namespace).expect("linksim.py's namespace");
            setns(file, CloneFlags::CLONE_NEWNET).expect("setns: network namespaces need root");
            work()
        });
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
