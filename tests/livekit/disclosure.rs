//! What is said of the processing: to the room by an attribute, to the operator by the audit log.

use crate::chain::{Chain, models, talker, with_models};
use crate::client::Kind;
use crate::harness::{Load, Trial, number, string, wait_for};
use crate::servers::Sidecar;
use serde_json::Value;
use sha2::Digest;
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Everything that a line may hold: nothing of it is media.
const KEYS: [&str; 12] = [
    "time",
    "event",
    "run",
    "session",
    "room",
    "participant",
    "direction",
    "speakers",
    "rung",
    "models",
    "packets",
    "media_stored",
];

fn rules(log: &Path, disclose: bool) -> String {
    let rules = format!(
        "rooms:\n  - {{ match: \"neural-*\", mode: neural, disclose: {disclose} }}\naudit: {{ log: {} }}\n",
        log.display()
    );
    with_models(&models(), &rules)
}

/// The SHA-256 of a bundle's manifest, by which the bundle is named.
fn sha256(bundle: &str) -> String {
    let manifest = Path::new(&models()).join(bundle).join("manifest.yaml");
    let digest = sha2::Sha256::digest(fs::read(manifest).unwrap());
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn now() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    since.as_secs_f64()
}

/// The lines of a log once all that began has ended: 2 participants, 2 directions, begin and end.
fn lines(log: &Path) -> Vec<Value> {
    wait_for(
        "the end of every processing",
        Duration::from_secs(20),
        || {
            let text = fs::read_to_string(log).unwrap();
            let lines: Vec<Value> = text
                .lines()
                .map(|line| serde_json::from_str(line).expect("every line is JSON"))
                .collect();
            let count = |event| lines.iter().filter(|line| line["event"] == event).count();
            (count("begin") >= 4 && count("begin") == count("end")).then_some(lines)
        },
    )
}

/// Asserts that a log says of both participants, in both directions, who was processed by what from when to when, and no more.
fn audited(sidecar: &Sidecar, log: &Path, room: &str, called: (f64, f64)) {
    let mode = fs::metadata(log).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "it names participants");
    let lines = lines(log);
    for line in &lines {
        let keys = line.as_object().unwrap().keys();
        let strange: Vec<_> = keys.filter(|key| !KEYS.contains(&&***key)).collect();
        assert!(strange.is_empty() && line.to_string().len() < 600, "{line}");
        assert_eq!(line["media_stored"], false);
        assert_eq!(string(line, "/room"), room);
        assert_eq!(string(line, "/models/lyra2"), sha256("lyra2"));
        assert_eq!(string(line, "/models/silero-vad"), sha256("silero-vad"));
    }
    let mut sessions = BTreeSet::new();
    for participant in ["anna", "ben"] {
        for direction in ["from", "to"] {
            let of = |event: &str| {
                let is_it = |line: &&Value| {
                    line["event"] == event
                        && line["participant"] == participant
                        && line["direction"] == direction
                };
                let found: Vec<_> = lines.iter().filter(is_it).collect();
                assert_eq!(
                    found.len(),
                    1,
                    "{event} {participant} {direction}: {lines:#?}"
                );
                found[0]
            };
            let (begin, end) = (of("begin"), of("end"));
            assert_eq!(begin["session"], end["session"]);
            assert_eq!(begin["run"], end["run"]);
            let other = if participant == "anna" { "ben" } else { "anna" };
            let speaker = if direction == "from" {
                participant
            } else {
                other
            };
            for line in [begin, end] {
                assert_eq!(line["speakers"], serde_json::json!([speaker]), "{line}");
            }
            sessions.insert(begin["session"].to_string());
            let (from, to) = (number(begin, "/time"), number(end, "/time"));
            assert!(
                called.0 - 2.0 < from && from + 5.0 < to && to < called.1 + 5.0,
                "{from} to {to} of {called:?}"
            );
            assert!(number(end, "/packets") > 150.0, "{end}");
            assert!(begin.get("packets").is_none(), "{begin}");
        }
    }
    assert_eq!(sessions.len(), 2);
    // The other log names nobody.
    let text = fs::read_to_string(&sidecar.process.log).unwrap();
    assert!(!text.contains("anna") && !text.contains("\"ben\""));
}

/// Two talk over the hop. The room is told of the one whose token allows it; both sidecars' audit logs have both.
#[test]
fn coded_speech_is_disclosed_and_audited() {
    let trial = Trial::new("coded_speech_is_disclosed_and_audited", Load::Alone);
    let room = trial.room("neural");
    let log = |name: &str| -> PathBuf { trial.dir.join(format!("audit-{name}.jsonl")) };
    let chain = Chain::start(
        &trial,
        rules(&log("edge"), true),
        rules(&log("origin"), false),
    );
    let began = now();
    let make = |identity: &str, name: &str| {
        talker(
            &trial,
            Kind::Python,
            &chain.edge.url(),
            &room,
            identity,
            name,
        )
        .seconds(12.0)
    };
    let anna = make("anna", "talker-a")
        .flag("--own-metadata")
        .spawn(&trial);
    let ben = make("ben", "talker-b").spawn(&trial);
    let (anna, ben) = (anna.finish(), ben.finish());
    let ended = now();
    anna.lasted(&ben);
    ben.lasted(&anna);
    assert_eq!(
        string(&ben.json, "/attributes/anna/auralink.aic"),
        "L2",
        "ben was not told: {}",
        ben.json
    );
    assert_eq!(
        anna.json["attributes"],
        serde_json::json!({}),
        "the token of ben doesn't allow it"
    );
    let warned: Vec<Value> = chain
        .edge
        .log()
        .into_iter()
        .filter(|line| string(line, "/fields/message").contains("canUpdateOwnMetadata"))
        .collect();
    assert_eq!(warned.len(), 1, "{warned:?}");
    chain.wait_over(&room);
    for (name, sidecar) in [("edge", &chain.edge), ("origin", &chain.origin)] {
        audited(sidecar, &log(name), &room, (began, ended));
    }
}
