//! What the admin side shows of a running sidecar: sessions of the registry joined with the
//! snapshots of the media workers.

mod probe;

use crate::admin::hop::{EngineStatus, HopStatus, RecodeStatus};
use crate::admin::status::{
    Check, CheckState, LegStatus, PcStatus, Readiness, SessionStatus, Signalling, Status, Totals,
    Traffic, WorkerStatus, client_name, mask,
};
use crate::admin::{RoomMeter, Rooms, StatusSource};
use crate::app::App;
use crate::config::Live;
use crate::media::{HopSnapshot, LegSnapshot, Media, SessionId, Snapshot};
use crate::tasks::Tasks;
use auralink_engine::Engine;
use auralink_proto::coding::HopStats;
use auralink_proto::description::Target;
use auralink_proto::flow::FlowStats;
use auralink_proto::hop::recode::RecodeStats;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

pub(crate) use probe::Probed;

/// How often rooms are metered: as often as workers publish.
const METER_EVERY: Duration = Duration::from_secs(1);

/// The whole sidecar, seen from outside.
pub(crate) struct Overview {
    pub(crate) app: Arc<App>,
    pub(crate) media: Arc<Media>,
    pub(crate) live: Arc<Live>,
    pub(crate) engine: Arc<Engine>,
    pub(crate) started: Instant,
    pub(crate) draining: AtomicBool,
    pub(crate) probed: Probed,
    pub(crate) tasks: Tasks,
}

impl Overview {
    /// Keeps the books of rooms until the process ends.
    pub(crate) async fn meter(self: Arc<Self>, rooms: Arc<Rooms>) {
        let mut meters: HashMap<SessionId, RoomMeter> = HashMap::new();
        let mut every = tokio::time::interval(METER_EVERY);
        loop {
            every.tick().await;
            rooms.set_limit(self.live.load().metrics.rooms);
            let mut traffic: HashMap<SessionId, [Traffic; 2]> = HashMap::new();
            for snapshot in self.media.snapshots() {
                for pc in &snapshot.pcs {
                    let [up, down] = traffic.entry(pc.session).or_default();
                    up.add(&pc.up.into());
                    down.add(&pc.down.into());
                }
            }
            let cells = self.app.cells();
            let live: HashSet<SessionId> = cells.iter().map(|cell| cell.id).collect();
            meters.retain(|id, _| live.contains(id));
            for cell in cells {
                let meter = meters
                    .entry(cell.id)
                    .or_insert_with(|| rooms.enter(cell.room()));
                if let Some([up, down]) = traffic.get(&cell.id) {
                    meter.observe(up.into(), down.into());
                }
            }
        }
    }

    fn engine_status(&self) -> EngineStatus {
        EngineStatus::of(&self.engine, self.live.load().rules.want_models())
    }

    /// How the listener's certificate and the upstream's roots are, where there are any.
    fn tls_check(&self) -> Option<Check> {
        let (settings, material) = (self.live.load(), self.live.material());
        if settings.tls.is_none() && !settings.upstream.https {
            return None;
        }
        let failed = self.live.state().files_failed;
        let mut details: Vec<String> = failed
            .map(|(_, problems)| format!("not renewed: {problems}"))
            .into_iter()
            .collect();
        if let Some(certificate) = &material.certificate {
            let local = settings.listen.ip().is_loopback();
            details.extend(certificate.doubts(std::time::SystemTime::now(), local));
        }
        Some(Check {
            name: "tls",
            state: if details.is_empty() {
                CheckState::Ok
            } else {
                CheckState::Warning
            },
            detail: details.join("; "),
        })
    }

    fn tasks_check(&self) -> Check {
        let (state, detail) = match (self.tasks.failed(), self.tasks.restarted()) {
            (Some(why), _) => (CheckState::Failed, format!("{why}; the process ends")),
            (None, Some(name)) => {
                let detail = format!("{name} had to be restarted; the log says where it failed");
                (CheckState::Warning, detail)
            }
            (None, None) => (CheckState::Ok, String::new()),
        };
        Check {
            name: "tasks",
            state,
            detail,
        }
    }

    fn sessions(&self, snapshots: &[Arc<Snapshot>]) -> Vec<SessionStatus> {
        let mut pcs: HashMap<SessionId, Vec<PcStatus>> = HashMap::new();
        for pc in snapshots.iter().flat_map(|snapshot| &snapshot.pcs) {
            pcs.entry(pc.session).or_default().push(PcStatus {
                target: match pc.target {
                    Target::Publisher => "publisher",
                    Target::Subscriber => "subscriber",
                },
                client_leg: leg(&pc.client, true),
                server_leg: leg(&pc.server, false),
                up: pc.up.into(),
                down: pc.down.into(),
                shedding: pc.shedding,
                hop_up: hop(&pc.hop[0]),
                hop_down: hop(&pc.hop[1]),
                recode_up: recode(&pc.hop[0]),
                recode_down: recode(&pc.hop[1]),
            });
        }
        let mut sessions: Vec<SessionStatus> = self
            .app
            .cells()
            .iter()
            .map(|cell| {
                let (sdk, version, open) = cell.facts();
                SessionStatus {
                    id: cell.id,
                    room: cell.room().to_owned(),
                    identity_hash: cell.identity_hash.clone(),
                    participant_sid: cell.participant_sid(),
                    mode: cell.policy.mode.name(),
                    generation: cell.policy.generation,
                    age_s: cell.opened.elapsed().as_secs(),
                    client: client_name(sdk, &version),
                    signalling: if open {
                        Signalling::Open
                    } else {
                        Signalling::Closed
                    },
                    pcs: pcs.remove(&cell.id).unwrap_or_default(),
                }
            })
            .collect();
        sessions.sort_by_key(|session| session.id);
        sessions
    }
}

fn hop(hop: &HopSnapshot) -> Option<HopStatus> {
    (hop.streams > 0).then(|| HopStatus::new(hop.rung, hop.streams, &hop.stats))
}

fn recode(hop: &HopSnapshot) -> Option<RecodeStatus> {
    let stats = &hop.stats.recode;
    (*stats != RecodeStats::default()).then(|| RecodeStatus::new(stats))
}

fn leg(leg: &LegSnapshot, is_client: bool) -> LegStatus {
    LegStatus {
        state: leg.state.name(),
        remote: leg.remote.map(|(addr, _)| {
            if is_client {
                mask(addr.ip())
            } else {
                addr.to_string()
            }
        }),
        protocol: leg.remote.map(|(_, tcp)| if tcp { "tcp" } else { "udp" }),
        srtp: leg.srtp,
    }
}

fn totals(app: &App, snapshots: &[Arc<Snapshot>]) -> Totals {
    let mut totals = Totals {
        sessions: app.opened_by_mode(),
        ..Totals::default()
    };
    let (mut up, mut down) = (FlowStats::default(), FlowStats::default());
    let mut drops: BTreeMap<&'static str, u64> = BTreeMap::new();
    let (mut hop, mut streams) = (HopStats::default(), 0);
    for snapshot in snapshots {
        hop += snapshot.ended_hop;
        up += snapshot.ended_up;
        down += snapshot.ended_down;
        for pc in &snapshot.pcs {
            up += pc.up;
            down += pc.down;
            for direction in &pc.hop {
                hop += direction.stats;
                streams += direction.streams;
            }
        }
        let counters = &snapshot.counters;
        totals.panics += counters.panics;
        totals.received_datagrams += counters.received;
        totals.received_bytes += counters.received_bytes;
        totals.sent_datagrams += counters.sent;
        totals.sent_bytes += counters.sent_bytes;
        for (reason, count) in [
            ("unknown_ufrag", counters.dropped_unknown_ufrag),
            ("unknown_address", counters.dropped_unknown_address),
            ("socket", counters.dropped_send),
            ("handshake", counters.dropped_handshake),
        ] {
            *drops.entry(reason).or_default() += count;
        }
    }
    for flow in [&up, &down] {
        for (reason, count) in [
            ("unauthentic", flow.dropped_unauthentic),
            ("check", flow.dropped_checks),
            ("unproved", flow.dropped_unproved),
            ("replayed", flow.dropped_replayed),
            ("malformed", flow.dropped_malformed),
            ("early", flow.dropped_early),
            ("unsent", flow.dropped_unsent),
        ] {
            *drops.entry(reason).or_default() += count;
        }
    }
    totals.up = up.into();
    totals.down = down.into();
    totals.hop = HopStatus::new(None, streams, &hop);
    totals.recode = RecodeStatus::new(&hop.recode);
    totals.drops = drops;
    totals
}

impl StatusSource for Overview {
    fn snapshot(&self) -> Status {
        let snapshots = self.media.snapshots();
        let (alive, placed) = (self.media.alive(), self.media.placed());
        let reload = self.live.state();
        Status {
            version: env!("CARGO_PKG_VERSION"),
            revision: crate::REVISION,
            uptime_s: self.started.elapsed().as_secs(),
            generation: reload.generation,
            draining: self.draining.load(Ordering::Relaxed),
            config_error: reload.failed.map(|(_, problems)| problems.to_string()),
            workers: snapshots
                .iter()
                .enumerate()
                .map(|(index, snapshot)| WorkerStatus {
                    index,
                    alive: alive.get(index).copied().unwrap_or_default(),
                    sessions: placed.get(index).copied().unwrap_or_default(),
                    peer_connections: snapshot.pcs.len(),
                    received: snapshot.counters.received,
                    sent: snapshot.counters.sent,
                })
                .collect(),
            sessions: self.sessions(&snapshots),
            engine: self.engine_status(),
            totals: totals(&self.app, &snapshots),
        }
    }

    fn readiness(&self) -> Readiness {
        let state = |good: bool| {
            if good {
                CheckState::Ok
            } else {
                CheckState::Failed
            }
        };
        let upstream = self.probed.down();
        let dead = self.media.alive().iter().position(|alive| !alive);
        let alive = dead.is_none();
        let failed = self.live.state().failed;
        Readiness {
            draining: self.draining.load(Ordering::Relaxed),
            checks: vec![
                Check {
                    name: "upstream",
                    state: state(upstream.is_none()),
                    detail: upstream.unwrap_or_default(),
                },
                Check {
                    name: "workers",
                    state: state(alive),
                    detail: dead.map_or_else(String::new, |worker| {
                        format!("media worker {worker} has ended; the process ends")
                    }),
                },
                self.tasks_check(),
                Check {
                    name: "config",
                    state: if failed.is_some() {
                        CheckState::Warning
                    } else {
                        CheckState::Ok
                    },
                    detail: failed.map_or_else(String::new, |(_, problems)| {
                        format!("last reload failed: {problems}")
                    }),
                },
                self.engine_status().check(),
            ]
            .into_iter()
            .chain(self.tls_check())
            .collect(),
        }
    }
}

impl From<FlowStats> for Traffic {
    fn from(stats: FlowStats) -> Self {
        Self {
            rtp_packets: stats.rtp_packets,
            rtcp_packets: stats.rtcp_packets,
            data_packets: stats.data_packets,
            bytes: stats.bytes,
            bytes_native: stats.native_bytes,
            shed_packets: stats.shed_packets,
            wrapped_packets: stats.wrapped_packets,
        }
    }
}

impl From<&Traffic> for crate::admin::rooms::RoomBytes {
    fn from(traffic: &Traffic) -> Self {
        Self {
            wire: traffic.bytes,
            native: traffic.bytes_native,
        }
    }
}
