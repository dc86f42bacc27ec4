//! The AIC hop and its codecs, for `/status.json`, `/readyz` and the metrics.

use super::metrics::{
    ENGINE_COMPLETE, ENGINE_JOBS, ENGINE_OPENED, ENGINE_RESTARTS, ENGINE_RUNG, HOP_BYTES,
    HOP_JITTER, HOP_NATIVE, HOP_ORIGINALS, HOP_PACKETS, RECODE_PACKETS, RECODE_SAVED,
};
use super::status::{Check, CheckState};
use auralink_engine::Engine;
use auralink_proto::coding::HopStats;
use auralink_proto::hop::NativeReason;
use auralink_proto::hop::recode::{KEPT, RecodeStats};
use auralink_proto::ladder::{Rung, Rungs};
use metrics::{counter, gauge};
use serde::Serialize;
use std::collections::BTreeMap;

/// One direction of a peer connection, or the sum over all.
#[derive(Debug, Clone, Default, Serialize)]
pub struct HopStatus {
    /// The cheapest rung that speech is packed with: `L1` to `L6`; none: nothing is packed, or natively.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rung: Option<String>,
    /// Streams that are packed or restored.
    pub streams: usize,
    /// Framed packets by what became of them.
    pub packets: BTreeMap<&'static str, u64>,
    /// Bytes on the wire, of framed packets that came and of what was made of them.
    pub bytes: BTreeMap<&'static str, u64>,
    /// Interarrival jitter of framed packets, of several streams the largest.
    pub jitter_ms: f64,
    /// Original packets by what became of them.
    pub originals: BTreeMap<&'static str, u64>,
    /// Original packets that were not coded, by reason.
    pub native: BTreeMap<&'static str, u64>,
}

/// Audio that is coded anew without a hop: of one direction of a peer connection, or the sum over all.
#[derive(Debug, Clone, Default, Serialize)]
pub struct RecodeStatus {
    /// Audio packets by what became of them: `recoded`, `repeated`, `dropped`, and those that went as they came by reason.
    pub packets: BTreeMap<&'static str, u64>,
    /// Bytes that packets became shorter.
    pub saved_bytes: u64,
}

impl RecodeStatus {
    /// From counters.
    #[must_use]
    pub fn new(stats: &RecodeStats) -> Self {
        let whole = [
            ("recoded", stats.recoded),
            ("repeated", stats.repeated),
            ("dropped", stats.dropped),
        ];
        Self {
            packets: KEPT.into_iter().zip(stats.kept).chain(whole).collect(),
            saved_bytes: stats.saved,
        }
    }
}

impl HopStatus {
    /// From counters.
    #[must_use]
    pub fn new(rung: Option<Rung>, streams: usize, stats: &HopStats) -> Self {
        Self {
            rung: rung.map(|rung| rung.to_string()),
            streams,
            packets: BTreeMap::from([
                ("sent", stats.framed_sent),
                ("sent_with_copy", stats.copies_sent),
                ("received", stats.framed_received),
                ("lost", stats.lost),
                ("lost_but_copied", stats.copied),
                ("unreadable", stats.unreadable),
            ]),
            bytes: BTreeMap::from([
                ("received", stats.received_bytes),
                ("restored", stats.restored_bytes),
            ]),
            jitter_ms: f64::from(stats.jitter) / 65.536,
            originals: BTreeMap::from([
                ("coded", stats.coded),
                ("sent_again", stats.resent),
                ("restored", stats.restored),
                ("concealed", stats.concealed),
                ("lost", stats.gaps),
                ("undecoded", stats.undecoded),
            ]),
            native: NativeReason::ALL
                .into_iter()
                .zip(stats.natives)
                .map(|(reason, count)| (reason.name(), count))
                .collect(),
        }
    }
}

/// The codecs.
#[derive(Debug, Clone, Default, Serialize)]
pub struct EngineStatus {
    /// Rungs that can be used now.
    pub rungs: Vec<String>,
    /// Everything that is configured, and all that a room's rule wants, is there and works.
    pub complete: bool,
    /// What is wrong and what to do.
    pub problems: Vec<String>,
    /// Bundles of models in use, with the sha256 of their manifests.
    pub bundles: BTreeMap<String, String>,
    /// Codec threads that take jobs.
    pub threads_up: usize,
    /// Groups encoded, by rung.
    pub encoded: BTreeMap<String, u64>,
    /// Jobs by what became of them.
    pub jobs: BTreeMap<&'static str, u64>,
    /// How often circuit breakers opened, by rung; `all`: the engine's.
    pub breakers_opened: BTreeMap<&'static str, u64>,
    /// Codec threads started again after a panic or a hang.
    pub restarts: u64,
}

/// Names of the breakers, in the engine's order.
const BREAKERS: [&str; 7] = ["L1", "L2", "L3", "L4", "L5", "L6", "all"];

impl EngineStatus {
    /// As it is now. Where nothing is configured that models need, and no rule `wants` any, nothing is missing.
    #[must_use]
    pub fn of(engine: &Engine, wants: bool) -> Self {
        let mut status = engine.status();
        if !wants {
            let unconfigured = &status.unconfigured;
            status
                .problems
                .retain(|problem| !unconfigured.contains(problem));
            status.complete = status.problems.is_empty();
        }
        let counters = engine.counters();
        Self {
            rungs: status.rungs.iter().map(|rung| rung.to_string()).collect(),
            complete: status.complete,
            problems: status.problems,
            bundles: status.bundles.into_iter().collect(),
            threads_up: status.threads_up,
            encoded: Rungs::ALL
                .iter()
                .map(|rung| rung.to_string())
                .zip(counters.encoded)
                .collect(),
            jobs: BTreeMap::from([
                ("encoded", counters.encoded.iter().sum()),
                ("decoded", counters.decoded),
                ("recoded", counters.recoded),
                ("shared", counters.shared),
                ("refused", counters.refused),
                ("failed", counters.failed),
                ("late", counters.late),
                ("expired", counters.expired),
                ("busy", counters.busy),
                ("dropped", counters.dropped),
            ]),
            breakers_opened: BREAKERS.into_iter().zip(counters.opened).collect(),
            restarts: counters.restarts,
        }
    }

    /// For `/readyz`: a sidecar without models serves calls all the same.
    #[must_use]
    pub fn check(&self) -> Check {
        Check {
            name: "engine",
            state: if self.problems.is_empty() {
                CheckState::Ok
            } else {
                CheckState::Warning
            },
            detail: self.problems.join("; "),
        }
    }
}

pub(super) fn publish(hop: &HopStatus, recode: &RecodeStatus, engine: &EngineStatus) {
    for (what, n) in &recode.packets {
        counter!(RECODE_PACKETS.name, "what" => *what).absolute(*n);
    }
    counter!(RECODE_SAVED.name).absolute(recode.saved_bytes);
    for (what, n) in &hop.packets {
        counter!(HOP_PACKETS.name, "what" => *what).absolute(*n);
    }
    for (what, n) in &hop.bytes {
        counter!(HOP_BYTES.name, "what" => *what).absolute(*n);
    }
    gauge!(HOP_JITTER.name).set(hop.jitter_ms / 1000.0);
    for (what, n) in &hop.originals {
        counter!(HOP_ORIGINALS.name, "what" => *what).absolute(*n);
    }
    for (reason, n) in &hop.native {
        counter!(HOP_NATIVE.name, "reason" => *reason).absolute(*n);
    }
    gauge!(ENGINE_COMPLETE.name).set(f64::from(u8::from(engine.complete)));
    for rung in Rungs::ALL.iter().map(|rung| rung.to_string()) {
        let usable = f64::from(u8::from(engine.rungs.contains(&rung)));
        gauge!(ENGINE_RUNG.name, "rung" => rung).set(usable);
    }
    for (what, n) in &engine.jobs {
        counter!(ENGINE_JOBS.name, "what" => *what).absolute(*n);
    }
    for (rung, n) in &engine.breakers_opened {
        counter!(ENGINE_OPENED.name, "rung" => *rung).absolute(*n);
    }
    counter!(ENGINE_RESTARTS.name).absolute(engine.restarts);
}
