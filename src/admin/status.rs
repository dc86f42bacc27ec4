//! What `/status.json` and `/readyz` say. Times are seconds, counters run since the start of what
//! they belong to, bytes are on the wire with IP and UDP headers.
//!
//! No identity, no token and no client's full address is in it: identities are salted hashes,
//! client addresses are [masked](mask).

use super::hop::{EngineStatus, HopStatus, RecodeStatus};
use serde::Serialize;
use std::collections::BTreeMap;
use std::net::IpAddr;

/// `/status.json`.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Status {
    /// Of this program.
    pub version: &'static str,
    /// Of its source.
    pub revision: &'static str,
    /// Since the process started.
    pub uptime_s: u64,
    /// Of the configuration in force.
    pub generation: u64,
    /// No new sessions are taken.
    pub draining: bool,
    /// Why the configuration file as it is now is not in force; none: it is.
    pub config_error: Option<String>,
    /// In the order of their ports.
    pub workers: Vec<WorkerStatus>,
    /// Live ones.
    pub sessions: Vec<SessionStatus>,
    /// The codecs: of the hop between two AuraLinks, and of `enhance` and `recode`.
    pub engine: EngineStatus,
    /// Since the process started.
    pub totals: Totals,
}

/// One media worker.
#[derive(Debug, Clone, Default, Serialize)]
pub struct WorkerStatus {
    /// From 0.
    pub index: usize,
    /// Its thread runs. Where one has ended, the process is about to.
    pub alive: bool,
    /// Sessions that were assigned to it.
    pub sessions: usize,
    /// Peer connections pinned to it.
    pub peer_connections: usize,
    /// Datagrams received on all its sockets.
    pub received: u64,
    /// Datagrams sent.
    pub sent: u64,
}

/// One participant's session.
#[derive(Debug, Clone, Default, Serialize)]
pub struct SessionStatus {
    /// As in the log.
    pub id: u64,
    /// As the token names it.
    pub room: String,
    /// 12 hex digits of a hash of the identity, salted anew in each process.
    pub identity_hash: String,
    /// LiveKit's name of the participant, `PA_…`, which stands in its own log and API; none: it hasn't said it yet.
    pub participant_sid: Option<String>,
    /// `off`, `lean` or `neural`.
    pub mode: &'static str,
    /// Of the configuration that its policy is from.
    pub generation: u64,
    /// Since it was opened.
    pub age_s: u64,
    /// [`client_name`] of what the client says it is.
    pub client: Option<String>,
    /// The signalling connection is open; otherwise the session waits for a resume.
    pub signalling: Signalling,
    /// One or two.
    pub pcs: Vec<PcStatus>,
}

/// The signalling connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Signalling {
    /// There.
    Open,
    /// Gone; a resume may bring it back.
    #[default]
    Closed,
}

/// One peer connection.
#[derive(Debug, Clone, Default, Serialize)]
pub struct PcStatus {
    /// `publisher` or `subscriber`.
    pub target: &'static str,
    /// Towards the participant.
    pub client_leg: LegStatus,
    /// Towards LiveKit.
    pub server_leg: LegStatus,
    /// From the participant.
    pub up: Traffic,
    /// To the participant.
    pub down: Traffic,
    /// Streams whose redundancy is being shed now.
    pub shedding: usize,
    /// The AIC hop from the participant, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hop_up: Option<HopStatus>,
    /// To the participant.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hop_down: Option<HopStatus>,
    /// Audio from the participant that is enhanced, if any is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recode_up: Option<RecodeStatus>,
    /// Audio to the participant that is coded anew.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recode_down: Option<RecodeStatus>,
}

/// One leg.
#[derive(Debug, Clone, Default, Serialize)]
pub struct LegStatus {
    /// `checking`, `handshaking`, `established`, `closed`.
    pub state: &'static str,
    /// The peer's address: LiveKit's in full, a participant's [masked](mask).
    pub remote: Option<String>,
    /// `udp` or `tcp`.
    pub protocol: Option<&'static str>,
    /// The SRTP profile.
    pub srtp: Option<&'static str>,
}

/// One direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Traffic {
    /// RTP packets.
    pub rtp_packets: u64,
    /// RTCP packets.
    pub rtcp_packets: u64,
    /// Data-channel packets.
    pub data_packets: u64,
    /// Bytes on the participant's wire.
    pub bytes: u64,
    /// Bytes that would have been on it without the sidecar.
    pub bytes_native: u64,
    /// Packets whose redundancy was shed.
    pub shed_packets: u64,
    /// Packets wrapped as primary-only RED.
    pub wrapped_packets: u64,
}

impl Traffic {
    /// Adds another count.
    pub fn add(&mut self, other: &Self) {
        let Self {
            rtp_packets,
            rtcp_packets,
            data_packets,
            bytes,
            bytes_native,
            ..
        } = other;
        self.rtp_packets = self.rtp_packets.saturating_add(*rtp_packets);
        self.rtcp_packets = self.rtcp_packets.saturating_add(*rtcp_packets);
        self.data_packets = self.data_packets.saturating_add(*data_packets);
        self.bytes = self.bytes.saturating_add(*bytes);
        self.bytes_native = self.bytes_native.saturating_add(*bytes_native);
        self.shed_packets = self.shed_packets.saturating_add(other.shed_packets);
        self.wrapped_packets = self.wrapped_packets.saturating_add(other.wrapped_packets);
    }
}

/// Since the process started, ended sessions included: nothing here ever falls.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Totals {
    /// Sessions opened, by mode.
    pub sessions: BTreeMap<&'static str, u64>,
    /// From participants.
    pub up: Traffic,
    /// To participants.
    pub down: Traffic,
    /// Datagrams received on all sockets.
    pub received_datagrams: u64,
    /// Their bytes, IP and UDP headers not counted.
    pub received_bytes: u64,
    /// Datagrams sent on all sockets.
    pub sent_datagrams: u64,
    /// Their bytes, IP and UDP headers not counted.
    pub sent_bytes: u64,
    /// Peer connections that were ended because handling them panicked.
    pub panics: u64,
    /// What was dropped, by reason.
    pub drops: BTreeMap<&'static str, u64>,
    /// The AIC hops, both directions.
    pub hop: HopStatus,
    /// Audio that is coded anew without a hop, both directions.
    pub recode: RecodeStatus,
}

/// Whether new sessions should be sent here, and why not.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Readiness {
    /// The process is about to end.
    pub draining: bool,
    /// What was looked at.
    pub checks: Vec<Check>,
}

impl Readiness {
    /// Not draining, and nothing failed. A warning does not count: a configuration file that could
    /// not be reloaded leaves the old one in force, and taking every sidecar that reads the same bad
    /// file out of service at once would turn a typing mistake into an outage.
    #[must_use]
    pub fn ready(&self) -> bool {
        !self.draining && self.checks.iter().all(|c| c.state != CheckState::Failed)
    }
}

/// One thing that readiness depends on.
#[derive(Debug, Clone, Serialize)]
pub struct Check {
    /// `upstream`, `workers`, `tasks`, `config`, `engine`.
    pub name: &'static str,
    /// How it is.
    pub state: CheckState,
    /// In words; empty where there is nothing to say.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub detail: String,
}

/// How a [`Check`] came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckState {
    /// Good.
    Ok,
    /// Somebody should look; sessions are served all the same.
    Warning,
    /// New sessions would fail.
    Failed,
}

/// `/readyz`.
#[derive(Serialize)]
pub(super) struct ReadyReport {
    pub(super) ready: bool,
    #[serde(flatten)]
    pub(super) readiness: Readiness,
}

/// A participant's address without what tells it from its neighbours': `198.51.x.x`, `2001:db8:x`.
/// Loopback addresses are nobody's and stay.
#[must_use]
pub fn mask(ip: IpAddr) -> String {
    match ip.to_canonical() {
        ip if ip.is_loopback() => ip.to_string(),
        IpAddr::V4(v4) => {
            let [a, b, ..] = v4.octets();
            format!("{a}.{b}.x.x")
        }
        IpAddr::V6(v6) => {
            let [a, b, ..] = v6.segments();
            format!("{a:x}:{b:x}:x")
        }
    }
}

/// LiveKit's `ClientInfo.SDK`, by number.
const SDKS: [&str; 15] = [
    "unknown",
    "js",
    "swift",
    "android",
    "flutter",
    "go",
    "unity",
    "react-native",
    "rust",
    "python",
    "cpp",
    "unity-web",
    "node",
    "unreal",
    "esp32",
];

/// What a client says it is (`sdk` and `version` of LiveKit's `ClientInfo`), fit to be shown: of the
/// version only letters, digits, `.`, `-` and `_`, and no more than 24 of them. None where it says
/// neither.
#[must_use]
pub fn client_name(sdk: i32, version: &str) -> Option<String> {
    let sane = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    let version: String = version.chars().filter(sane).take(24).collect();
    let known = usize::try_from(sdk).ok().and_then(|n| SDKS.get(n));
    let name = known.map_or_else(|| format!("sdk-{sdk}"), |name| (*name).to_owned());
    match (sdk, version.is_empty()) {
        (0, true) => None,
        (_, true) => Some(name),
        (_, false) => Some(format!("{name} {version}")),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn nothing_personal_is_shown() {
        for (ip, shown) in [
            ("198.51.100.7", "198.51.x.x"),
            ("::ffff:198.51.100.7", "198.51.x.x"),
            ("2001:db8:1:2::7", "2001:db8:x"),
            ("127.0.0.1", "127.0.0.1"),
            ("::1", "::1"),
        ] {
            assert_eq!(mask(ip.parse().unwrap()), shown);
        }
        assert_eq!(client_name(9, "1.2"), Some("python 1.2".into()));
        assert_eq!(client_name(1, "<b>\n"), Some("js b".into()));
        assert_eq!(client_name(0, "\n"), None);
        assert_eq!(client_name(14, ""), Some("esp32".into()));
        assert_eq!(
            client_name(-7, &"x".repeat(99)),
            Some(format!("sdk--7 {}", "x".repeat(24)))
        );
    }

    #[test]
    fn readiness() {
        let check = |state| Check {
            name: "x",
            state,
            detail: String::new(),
        };
        let ready = |draining, state| {
            Readiness {
                draining,
                checks: vec![check(state)],
            }
            .ready()
        };
        assert!(ready(false, CheckState::Ok));
        assert!(ready(false, CheckState::Warning));
        assert!(!ready(false, CheckState::Failed));
        assert!(!ready(true, CheckState::Ok));
    }
}
