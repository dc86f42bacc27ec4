//! Every metric, in one table: what describes them to Prometheus, and what docs/metrics.md is made of.

use super::status::{Status, Traffic};
use metrics::{counter, gauge};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use std::collections::BTreeMap;
use std::fmt::Write;

/// What kind of number it is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    /// Only grows; its name ends with `_total`.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Upper bounds of its buckets.
    Histogram(&'static [f64]),
}

/// One metric.
#[derive(Debug, Clone, Copy)]
pub struct Metric {
    /// As Prometheus has it.
    pub name: &'static str,
    /// What kind of number.
    pub kind: Kind,
    /// Labels, each with the values it takes.
    pub labels: &'static [(&'static str, &'static str)],
    /// One sentence; it names the unit.
    pub help: &'static str,
}

impl Metric {
    fn kind_name(&self) -> &'static str {
        match self.kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram(_) => "histogram",
        }
    }

    /// HELP and TYPE, for series that are written without the `metrics` crate.
    pub(super) fn head(&self, out: &mut String) {
        let _ = writeln!(out, "# HELP {} {}", self.name, self.help);
        let _ = writeln!(out, "# TYPE {} {}", self.name, self.kind_name());
    }
}

/// Join and handshake times: a LAN takes milliseconds, a lost flight of DTLS a second.
const SECONDS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
];

const DIRECTION: (&str, &str) = ("direction", "up (from participants), down");
const SIDE: (&str, &str) = ("side", "client, server");
const MODE: (&str, &str) = ("mode", "off, lean, neural");

macro_rules! table {
    ($($(#[$doc:meta])* $id:ident = $kind:expr, $name:literal, [$($label:expr),*], $help:literal;)*) => {
        $($(#[$doc])*
        #[doc = $help]
        pub const $id: Metric =
            Metric { name: $name, kind: $kind, labels: &[$($label),*], help: $help };)*

        /// Every metric of the process, in the order of docs/metrics.md.
        pub const ALL: &[Metric] = &[$($id),*];
    };
}

table! {
    BUILD_INFO = Kind::Gauge, "auralink_build_info", [("version", "of the program"), ("revision", "of its source, or debug")],
        "Always 1.";
    UPTIME = Kind::Gauge, "auralink_uptime_seconds", [],
        "Seconds since the process started.";
    DRAINING = Kind::Gauge, "auralink_draining", [],
        "1 while the process takes no new sessions and is about to end.";

    CONFIG_GENERATION = Kind::Gauge, "auralink_config_generation", [],
        "Generation of the configuration in force: 1 at the start, one more for each reload that changed something.";
    CONFIG_FAILED = Kind::Gauge, "auralink_config_last_reload_failed", [],
        "1 while the configuration file as it is now could not be put in force; the one before it is.";
    CONFIG_RELOADS = Kind::Counter, "auralink_config_reloads_total", [("result", "ok, unchanged, failed")],
        "Times the configuration file was read again.";
    TLS_NOT_AFTER = Kind::Gauge, "auralink_tls_certificate_not_after_timestamp_seconds", [],
        "When the listener's certificate in force ends, in seconds since 1970; only with `tls`.";
    TLS_FAILED = Kind::Gauge, "auralink_tls_last_reload_failed", [],
        "1 while certificate, key or trusted roots as they are now could not be put in force; those before them are. Only with `tls` or an https upstream.";
    TLS_RELOADS = Kind::Counter, "auralink_tls_reloads_total", [("result", "ok, unchanged, failed")],
        "Times certificate, key and trusted roots were read again: they had changed, or a reload was asked for.";

    HTTP_REQUESTS = Kind::Counter, "auralink_http_requests_total",
        [("kind", "session, upgrade, plain"), ("class", "1xx to 5xx")],
        "Answers to HTTP requests.";
    HTTP_CONNECTIONS = Kind::Gauge, "auralink_http_connections", [],
        "Open TCP connections of clients, upgraded ones included.";
    HTTP_EVICTED = Kind::Counter, "auralink_http_evicted_total", [("why", "full, address, memory, refused")],
        "Connections of clients that kept us waiting and had to go for others, or found no place (refused).";
    WS_OPEN = Kind::Gauge, "auralink_ws_open", [("kind", "session, opaque")],
        "Open upgraded connections.";
    WS_MESSAGES = Kind::Counter, "auralink_ws_messages_total",
        [("from", "client, upstream"), ("verdict", "keep, drop, replace")],
        "Signalling messages of sessions.";
    HANDSHAKE = Kind::Histogram(SECONDS), "auralink_handshake_seconds", [],
        "Seconds from a session's request to LiveKit's answer.";
    FAULTS = Kind::Counter, "auralink_faults_total",
        [("side", "client, upstream, internal"), ("what", "as in src/fault.rs")],
        "Requests and sessions that were ended by a fault, by whose it was.";

    UPSTREAM_UP = Kind::Gauge, "auralink_upstream_up", [],
        "1 while LiveKit answered the last probe (every 2 s) as one that takes sessions.";
    UPSTREAM_PROBES = Kind::Counter, "auralink_upstream_probes_total",
        [("result", "up, unhealthy (406), error (5xx), unreachable, timeout")],
        "Probes of LiveKit, by what came of them.";
    UPSTREAM_PROBE = Kind::Histogram(SECONDS), "auralink_upstream_probe_seconds", [],
        "Seconds from a probe's beginning to LiveKit's answer, whatever it was; the connection included.";
    UPSTREAM_LAST = Kind::Gauge, "auralink_upstream_last_success_timestamp_seconds", [],
        "When LiveKit was up last, in seconds since 1970.";

    SESSIONS = Kind::Gauge, "auralink_sessions", [MODE],
        "Live sessions.";
    SESSIONS_OPENED = Kind::Counter, "auralink_sessions_total", [MODE],
        "Sessions opened.";
    PEER_CONNECTIONS = Kind::Gauge, "auralink_peer_connections", [],
        "Live peer connections, each with two legs.";
    LEGS = Kind::Gauge, "auralink_legs", [SIDE, ("state", "checking, handshaking, established, closed")],
        "Legs of live peer connections.";
    LEGS_CLOSED = Kind::Counter, "auralink_legs_closed_total",
        [SIDE, ("reason", "peer_closed, consent_lost, handshake, fingerprint, local, defect")],
        "Legs that ended, by the reason that ended their peer connection.";
    LEG_SETUP = Kind::Histogram(SECONDS), "auralink_leg_setup_seconds", [SIDE],
        "Seconds from a leg's making to its keys: ICE and DTLS.";
    JOIN = Kind::Histogram(SECONDS), "auralink_join_seconds", [],
        "Seconds from a session's request to the first peer connection with both legs up.";

    PACKETS = Kind::Counter, "auralink_packets_total", [DIRECTION, ("kind", "rtp, rtcp, data")],
        "Packets relayed.";
    WIRE_BYTES = Kind::Counter, "auralink_wire_bytes_total", [DIRECTION],
        "Bytes on the participants' wire, IP and UDP headers included.";
    NATIVE_BYTES = Kind::Counter, "auralink_native_bytes_total", [DIRECTION],
        "Bytes that would have been on the participants' wire without the sidecar.";
    RED_SHED = Kind::Counter, "auralink_red_shed_packets_total", [DIRECTION],
        "Packets whose redundancy was shed.";
    RED_WRAPPED = Kind::Counter, "auralink_red_wrapped_packets_total", [DIRECTION],
        "Opus packets wrapped as RED without redundancy.";
    DROPS = Kind::Counter, "auralink_drops_total", [("reason", "as in /status.json")],
        "Packets dropped.";
    DATAGRAMS = Kind::Counter, "auralink_datagrams_total", [("op", "received, sent")],
        "Datagrams on all media sockets, STUN and DTLS included.";
    DATAGRAM_BYTES = Kind::Counter, "auralink_datagram_bytes_total", [("op", "received, sent")],
        "Their bytes, IP and UDP headers not counted.";
    TCP_REFUSED = Kind::Counter, "auralink_tcp_refused_total", [],
        "ICE-TCP connections refused: silent for too long, or for longer than others when there were too many, or none of a session's.";

    HOP_PACKETS = Kind::Counter, "auralink_hop_packets_total",
        [("what", "sent, sent_with_copy, received, lost, lost_but_copied, unreadable")],
        "Framed packets between two AuraLinks.";
    HOP_BYTES = Kind::Counter, "auralink_hop_bytes_total", [("what", "received, restored")],
        "Bytes of framed packets that came over the hop, IP and UDP headers included, and of the packets that were made of them.";
    HOP_JITTER = Kind::Gauge, "auralink_hop_jitter_seconds", [],
        "Interarrival jitter of framed packets by the send times in their hints, one a second, of all present streams the largest.";
    HOP_ORIGINALS = Kind::Counter, "auralink_hop_originals_total",
        [("what", "coded, sent_again, restored, concealed, lost, undecoded")],
        "Audio packets that went over the hop coded; `sent_again`: those that followed as they came, because the other end could not restore them.";
    HOP_NATIVE = Kind::Counter, "auralink_hop_native_total", [("reason", "as in /status.json")],
        "Audio packets that went over the hop as they came, by why they were not coded.";
    RECODE_PACKETS = Kind::Counter, "auralink_recode_packets_total", [("what", "recoded, or as in /status.json")],
        "Audio packets of streams that are enhanced or coded anew without a hop, by what became of them.";
    RECODE_SAVED = Kind::Counter, "auralink_recode_saved_bytes_total", [],
        "Bytes that packets coded anew became shorter.";
    ENGINE_COMPLETE = Kind::Gauge, "auralink_engine_complete", [],
        "1 while every codec that is configured, and all models that a room's rule wants, are there and work.";
    ENGINE_RUNG = Kind::Gauge, "auralink_engine_rung_usable", [("rung", "L1 to L6")],
        "1 while the rung can be coded: loaded, and no circuit breaker open.";
    ENGINE_JOBS = Kind::Counter, "auralink_engine_jobs_total",
        [("what", "encoded, decoded, recoded, shared, refused, failed, late, expired, busy, dropped")],
        "Groups of audio packets handed to the codecs, by what became of them; late ones are among encoded and decoded.";
    ENGINE_OPENED = Kind::Counter, "auralink_engine_breaker_opened_total", [("rung", "L1 to L6, all")],
        "Times a circuit breaker opened because codecs failed or were late.";
    AUDIT_FAILED = Kind::Counter, "auralink_audit_failed_total", [],
        "Lines of the audit log that could not be written.";
    ENGINE_RESTARTS = Kind::Counter, "auralink_engine_restarts_total", [],
        "Codec threads started again after a panic or a hang.";

    WORKER_ALIVE = Kind::Gauge, "auralink_worker_alive", [("worker", "from 0")],
        "1 while the media worker's thread runs; where one has ended, the process is about to.";
    WORKER_SESSIONS = Kind::Gauge, "auralink_worker_sessions", [("worker", "from 0")],
        "Sessions that were assigned to the media worker.";
    TASK_RESTARTS = Kind::Counter, "auralink_task_restarts_total", [("task", "as in /readyz")],
        "Tasks that ended and were restarted.";
    PANICS = Kind::Counter, "auralink_panics_total", [("thread", "its name")],
        "Panics, each a mistake in the program: one in a media thread ends one peer connection, one in a codec thread has it restarted.";

    ROOM_SESSIONS = Kind::Gauge, "auralink_room_sessions", [("room", "its name, or other")],
        "Live sessions of a room; rooms beyond metrics.rooms are other.";
    ROOM_WIRE_BYTES = Kind::Counter, "auralink_room_wire_bytes_total", [("room", "its name, or other"), DIRECTION],
        "Bytes on the wire of a room's participants, IP and UDP headers included.";
    ROOM_NATIVE_BYTES = Kind::Counter, "auralink_room_native_bytes_total", [("room", "its name, or other"), DIRECTION],
        "Bytes that would have been on it without the sidecar.";

    PROCESS_CPU = Kind::Counter, "process_cpu_seconds_total", [],
        "Seconds of CPU time, user and system, of all threads.";
    PROCESS_RESIDENT = Kind::Gauge, "process_resident_memory_bytes", [],
        "Bytes of memory that are resident.";
    PROCESS_VIRTUAL = Kind::Gauge, "process_virtual_memory_bytes", [],
        "Bytes of address space.";
    PROCESS_FDS = Kind::Gauge, "process_open_fds", [],
        "File descriptors that are open.";
    PROCESS_MAX_FDS = Kind::Gauge, "process_max_fds", [],
        "File descriptors that may be open at a time.";
    PROCESS_THREADS = Kind::Gauge, "process_threads", [],
        "Threads.";
    PROCESS_START = Kind::Gauge, "process_start_time_seconds", [],
        "When the process started, in seconds since 1970.";
}

fn builder() -> Result<PrometheusBuilder, BuildError> {
    ALL.iter()
        .try_fold(PrometheusBuilder::new(), |builder, metric| {
            match metric.kind {
                Kind::Histogram(bounds) => {
                    builder.set_buckets_for_metric(Matcher::Full(metric.name.to_owned()), bounds)
                }
                _ => Ok(builder),
            }
        })
}

/// Makes this process's recorder and describes every metric. Once, before anything counts: what is
/// counted earlier is lost.
///
/// # Errors
/// A recorder is installed already.
pub fn install() -> Result<PrometheusHandle, BuildError> {
    let handle = builder()?.install_recorder()?;
    describe();
    gauge!(BUILD_INFO.name, "version" => env!("CARGO_PKG_VERSION"), "revision" => crate::REVISION)
        .set(1.0);
    Ok(handle)
}

fn describe() {
    for Metric {
        name, kind, help, ..
    } in ALL
    {
        match kind {
            Kind::Counter => metrics::describe_counter!(*name, *help),
            Kind::Gauge => metrics::describe_gauge!(*name, *help),
            Kind::Histogram(_) => metrics::describe_histogram!(*name, *help),
        }
    }
}

/// Writes what a snapshot says into the recorder: media counts in its own way, on threads that must
/// not wait for a recorder.
#[expect(
    clippy::cast_precision_loss,
    reason = "Prometheus' numbers are floating point"
)]
pub fn publish(status: &Status) {
    gauge!(UPTIME.name).set(status.uptime_s as f64);
    gauge!(DRAINING.name).set(f64::from(u8::from(status.draining)));

    let mut sessions = BTreeMap::from([("off", 0_u32), ("lean", 0), ("neural", 0)]);
    let mut legs = BTreeMap::new();
    for side in ["client", "server"] {
        for state in ["checking", "handshaking", "established", "closed"] {
            legs.insert((side, state), 0_u32);
        }
    }
    let mut pcs = 0_u32;
    for session in &status.sessions {
        *sessions.entry(session.mode).or_default() += 1;
        for pc in &session.pcs {
            pcs += 1;
            *legs.entry(("client", pc.client_leg.state)).or_default() += 1;
            *legs.entry(("server", pc.server_leg.state)).or_default() += 1;
        }
    }
    for (mode, n) in sessions {
        gauge!(SESSIONS.name, "mode" => mode).set(n);
    }
    gauge!(PEER_CONNECTIONS.name).set(pcs);
    for ((side, state), n) in legs {
        gauge!(LEGS.name, "side" => side, "state" => state).set(n);
    }

    for worker in &status.workers {
        let label = worker.index.to_string();
        let alive = u8::from(worker.alive);
        gauge!(WORKER_ALIVE.name, "worker" => label.clone()).set(f64::from(alive));
        gauge!(WORKER_SESSIONS.name, "worker" => label).set(worker.sessions as f64);
    }

    super::hop::publish(&status.totals.hop, &status.totals.recode, &status.engine);

    let totals = &status.totals;
    for (mode, n) in &totals.sessions {
        counter!(SESSIONS_OPENED.name, "mode" => *mode).absolute(*n);
    }
    publish_traffic("up", &totals.up);
    publish_traffic("down", &totals.down);
    for (reason, n) in &totals.drops {
        counter!(DROPS.name, "reason" => *reason).absolute(*n);
    }
    for (op, datagrams, bytes) in [
        ("received", totals.received_datagrams, totals.received_bytes),
        ("sent", totals.sent_datagrams, totals.sent_bytes),
    ] {
        counter!(DATAGRAMS.name, "op" => op).absolute(datagrams);
        counter!(DATAGRAM_BYTES.name, "op" => op).absolute(bytes);
    }
}

fn publish_traffic(direction: &'static str, t: &Traffic) {
    for (kind, n) in [
        ("rtp", t.rtp_packets),
        ("rtcp", t.rtcp_packets),
        ("data", t.data_packets),
    ] {
        counter!(PACKETS.name, "direction" => direction, "kind" => kind).absolute(n);
    }
    for (metric, n) in [
        (WIRE_BYTES, t.bytes),
        (NATIVE_BYTES, t.bytes_native),
        (RED_SHED, t.shed_packets),
        (RED_WRAPPED, t.wrapped_packets),
    ] {
        counter!(metric.name, "direction" => direction).absolute(n);
    }
}

/// docs/metrics.md.
#[must_use]
pub fn markdown() -> String {
    let mut out = String::from(
        "# Metrics\n\n\
         Served at `/metrics` of `admin.listen`, in Prometheus' text format. This page is made from\n\
         `src/admin/metrics.rs`; a test keeps it equal (`AURALINK_BLESS=1 cargo test metrics` writes it).\n\
         `1 - rate(auralink_wire_bytes_total[5m]) / rate(auralink_native_bytes_total[5m])` is the share saved.\n\n\
         | name | kind | labels | meaning |\n|---|---|---|---|\n",
    );
    for metric in ALL {
        let labels: Vec<_> = metric
            .labels
            .iter()
            .map(|(l, values)| format!("`{l}`: {values}"))
            .collect();
        let _ = writeln!(
            out,
            "| `{}` | {} | {} | {} |",
            metric.name,
            metric.kind_name(),
            labels.join("; "),
            metric.help
        );
    }
    out
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(super) mod tests {
    use super::*;
    use metrics_exporter_prometheus::PrometheusRecorder;
    use std::collections::BTreeSet;
    use std::path::Path;

    /// A recorder of a test's own.
    pub(in super::super) fn recorder() -> PrometheusRecorder {
        let recorder = builder().unwrap().build_recorder();
        metrics::with_local_recorder(&recorder, describe);
        recorder
    }

    #[test]
    fn the_table_is_sound() {
        let names: BTreeSet<_> = ALL.iter().map(|m| m.name).collect();
        assert_eq!(names.len(), ALL.len(), "a name twice");
        for m in ALL {
            // Prometheus' own names for what every process has.
            let known = ["auralink_", "process_"];
            assert!(
                known.iter().any(|start| m.name.starts_with(start)),
                "{}",
                m.name
            );
            assert_eq!(
                m.kind == Kind::Counter,
                m.name.ends_with("_total"),
                "{}",
                m.name
            );
            assert_eq!(
                matches!(m.kind, Kind::Histogram(_)),
                m.name.ends_with("_seconds") && m.kind != Kind::Gauge,
                "{}",
                m.name
            );
            assert!(m.help.ends_with('.') && !m.help.contains('|'), "{}", m.name);
        }
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let file = root.join("docs/metrics.md");
        if std::env::var_os("AURALINK_BLESS").is_some() {
            std::fs::write(&file, markdown()).unwrap();
        }
        let there = std::fs::read_to_string(&file).unwrap_or_default();
        assert!(
            there == markdown(),
            "docs/metrics.md is not what the table says: AURALINK_BLESS=1 cargo test metrics"
        );
    }

    /// Names that stand in files: `auralink_…` as far as a metric's name goes.
    fn names_in(text: &str) -> BTreeSet<String> {
        text.match_indices("auralink_")
            .filter(|(at, _)| !text[..*at].ends_with(|c: char| c.is_alphanumeric() || c == '_'))
            .map(|(at, _)| {
                text[at..]
                    .chars()
                    .take_while(|c| c.is_ascii_lowercase() || *c == '_')
                    .collect()
            })
            .collect()
    }

    fn sources(dir: &Path, out: &mut Vec<(String, String)>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                sources(&path, out);
            } else if path.extension().is_some_and(|e| e == "rs") {
                out.push((
                    path.display().to_string(),
                    std::fs::read_to_string(&path).unwrap(),
                ));
            }
        }
    }

    #[test]
    fn what_is_counted_is_in_the_table() {
        let known: BTreeSet<_> = ALL.iter().map(|m| m.name).collect();
        let mut files = Vec::new();
        sources(
            &Path::new(env!("CARGO_MANIFEST_DIR")).join("src"),
            &mut files,
        );
        assert!(files.len() > 10);
        for (file, text) in files {
            for (at, quote) in text.match_indices("\"auralink_") {
                let name = &text[at + 1..];
                let end = name
                    .find(|c: char| !c.is_ascii_lowercase() && c != '_')
                    .unwrap_or(name.len());
                let name = name[..end].trim_end_matches("_bucket");
                // This test's own prefix, and the core's crate.
                let other = name.len() < quote.len() || name == "auralink_proto";
                assert!(
                    other || known.contains(name),
                    "{file}: {name} is not in src/admin/metrics.rs"
                );
            }
        }
    }

    #[test]
    fn what_is_in_the_table_is_counted() {
        let mut files = Vec::new();
        sources(
            &Path::new(env!("CARGO_MANIFEST_DIR")).join("src"),
            &mut files,
        );
        // Counted in a test only is not counted.
        let all: String = files
            .iter()
            .filter(|(file, _)| !file.contains("tests"))
            .filter_map(|(_, text)| text.split("mod tests {").next())
            .collect();
        let table = include_str!("metrics.rs");
        for metric in ALL {
            // `ID = Kind::…, "name"`, and the identifier's uses in this file or in rooms.rs.
            let (before, _) = table.split_once(&format!("\"{}\"", metric.name)).unwrap();
            let (head, _) = before.rsplit_once(" = Kind::").unwrap();
            let id = head.rsplit(char::is_whitespace).next().unwrap();
            let by_id = ["(", "&super::metrics::", "super::metrics::"]
                .iter()
                .any(|p| {
                    [".name", ", ", ".head"]
                        .iter()
                        .any(|e| all.contains(&format!("{p}{id}{e}")))
                });
            let literals = all.matches(&format!("\"{}\"", metric.name)).count();
            assert!(
                by_id || literals > 1,
                "{} is described and never counted",
                metric.name
            );
        }
    }

    #[test]
    fn the_dashboard_shows_metrics_that_exist() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let text = std::fs::read_to_string(root.join("config/grafana/auralink.json")).unwrap();
        let _: serde_json::Value = serde_json::from_str(&text).unwrap();
        let names = names_in(&text);
        assert!(names.len() > 12, "{names:?}");
        for name in names {
            let base = name
                .trim_end_matches("_bucket")
                .trim_end_matches("_sum")
                .trim_end_matches("_count");
            assert!(ALL.iter().any(|m| m.name == base), "{name}");
        }
    }

    #[test]
    fn histograms_have_buckets_and_help() {
        let recorder = recorder();
        metrics::with_local_recorder(&recorder, || {
            metrics::histogram!(JOIN.name).record(0.02);
        });
        let text = recorder.handle().render();
        assert!(
            text.contains("auralink_join_seconds_bucket{le=\"0.025\"} 1"),
            "{text}"
        );
        assert!(
            text.contains(&format!("# HELP auralink_join_seconds {}", JOIN.help)),
            "{text}"
        );
    }
}
