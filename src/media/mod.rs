//! Media I/O: worker threads that carry datagrams between sockets and [`auralink_proto::relay`].
//!
//! A session is pinned to one worker, which alone owns its sockets, keys and state. Signalling
//! talks to a worker through [`Media::send`], and hears of it through [`MediaEvent`]s and a
//! [`Snapshot`] a second; nothing is shared on the way of a packet.

mod sender;
mod socket;
mod tcp;
mod worker;

use arc_swap::ArcSwap;
use auralink_engine::Engine;
use auralink_proto::coding::HopStats;
use auralink_proto::description::{HostCandidate, PcDescription, Target};
use auralink_proto::dtls::Identity;
use auralink_proto::flow::FlowStats;
use auralink_proto::ladder::{Rung, Rungs};
use auralink_proto::leg::{CloseReason, LegState};
use auralink_proto::relay::Side;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

/// Where media is spoken.
#[derive(Debug, Clone)]
pub struct MediaConfig {
    /// Addresses advertised to clients and to LiveKit; every server leg has a socket on each.
    pub ips: Vec<IpAddr>,
    /// First client-side UDP port; worker `n` has this one plus `n`. 0: the system chooses each.
    pub udp_port: u16,
    /// Passive ICE-TCP.
    pub tcp_port: Option<u16>,
    /// Threads.
    pub workers: usize,
    /// They get a core before everything else, where the kernel allows it.
    pub realtime: bool,
    /// A leg without consent for so long ends (RFC 7675).
    pub consent_timeout: Duration,
}

/// Identifies a session in this process.
pub type SessionId = u64;

/// What a worker is told.
pub(crate) enum Command {
    /// Make or update a peer connection.
    Describe {
        session: SessionId,
        description: Box<PcDescription>,
        /// Server-leg sockets, with the first description of a peer connection.
        sockets: Vec<UdpSocket>,
    },
    /// End all peer connections of a session.
    Close { session: SessionId },
    /// An ICE-TCP connection whose first frame names a session of this worker.
    Tcp {
        stream: std::net::TcpStream,
        local: SocketAddr,
        remote: SocketAddr,
        /// What has been read of it, framing included.
        received: Vec<u8>,
    },
    /// End everything, then the thread.
    Stop,
}

/// What a worker reports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MediaEvent {
    /// A leg is up.
    Established {
        /// Whose.
        session: SessionId,
        /// Which peer connection.
        target: Target,
        /// Which leg.
        side: Side,
        /// How long it took.
        took: Duration,
    },
    /// A peer connection is over.
    Closed {
        /// Whose.
        session: SessionId,
        /// Which peer connection.
        target: Target,
        /// Which leg ended first.
        side: Side,
        /// Why.
        reason: CloseReason,
        /// What its hop has done, client to server and server to client.
        hop: Box<[HopSnapshot; 2]>,
    },
}

/// One leg on the status page.
#[derive(Debug, Clone)]
pub struct LegSnapshot {
    /// How far it has come.
    pub state: LegState,
    /// Where it sends; `true` for TCP.
    pub remote: Option<(SocketAddr, bool)>,
    /// SRTP profile.
    pub srtp: Option<&'static str>,
}

/// One peer connection on the status page.
#[derive(Debug, Clone)]
pub struct PcSnapshot {
    /// Whose.
    pub session: SessionId,
    /// Which.
    pub target: Target,
    /// Client leg.
    pub client: LegSnapshot,
    /// Server leg.
    pub server: LegSnapshot,
    /// Client to server.
    pub up: FlowStats,
    /// Server to client.
    pub down: FlowStats,
    /// Streams whose redundancy is being shed.
    pub shedding: usize,
    /// The AIC hop, client to server and server to client.
    pub hop: [HopSnapshot; 2],
}

/// The AIC hop of one direction on the status page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HopSnapshot {
    /// The cheapest rung that speech is packed with.
    pub rung: Option<Rung>,
    /// Streams that are packed or restored.
    pub streams: usize,
    /// Counters.
    pub stats: HopStats,
}

/// Counters of a worker since its start.
#[derive(Debug, Clone, Copy, Default)]
pub struct WorkerCounters {
    /// Datagrams received.
    pub received: u64,
    /// Their bytes.
    pub received_bytes: u64,
    /// Datagrams sent.
    pub sent: u64,
    /// Their bytes.
    pub sent_bytes: u64,
    /// Dropped: STUN for no session of ours.
    pub dropped_unknown_ufrag: u64,
    /// Dropped: from an address that no session has proved.
    pub dropped_unknown_address: u64,
    /// Dropped: the socket would not take it.
    pub dropped_send: u64,
    /// Turns of the loop.
    pub turns: u64,
}

/// What a worker publishes once a second.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// Counters.
    pub counters: WorkerCounters,
    /// Live peer connections.
    pub pcs: Vec<PcSnapshot>,
    /// What peer connections that have ended carried, client to server.
    pub ended_up: FlowStats,
    /// And server to client.
    pub ended_down: FlowStats,
    /// What their hops did.
    pub ended_hop: HopStats,
}

struct Worker {
    /// Client-side UDP addresses as peers know them.
    udp: Vec<SocketAddr>,
    commands: mpsc::Sender<Command>,
    waker: Arc<mio::Waker>,
    snapshot: Arc<ArcSwap<Snapshot>>,
    thread: Option<JoinHandle<()>>,
}

/// All workers.
pub struct Media {
    workers: Vec<Worker>,
    config: MediaConfig,
    engine: Arc<Engine>,
    tcp: Vec<(SocketAddr, std::net::TcpListener)>,
}

impl Media {
    /// Binds the client-side ports and starts the workers.
    ///
    /// # Errors
    /// A port that cannot be bound, by name.
    pub fn start(
        config: MediaConfig,
        identity: &Identity,
        engine: Arc<Engine>,
        events: tokio::sync::mpsc::UnboundedSender<MediaEvent>,
    ) -> io::Result<Self> {
        let mut tcp = Vec::new();
        if let Some(port) = config.tcp_port {
            for ip in &config.ips {
                let listener = socket::bind_tcp(SocketAddr::new(*ip, port))?;
                let port = listener.local_addr()?.port();
                tcp.push((SocketAddr::new(*ip, port), listener));
            }
        }
        // Bind everything before a thread runs: a taken port must leave nothing behind.
        let mut bound = Vec::new();
        for index in 0..config.workers {
            let offset = u16::try_from(index).map_err(io::Error::other)?;
            let offset = if config.udp_port == 0 { 0 } else { offset };
            let port = config.udp_port.checked_add(offset).ok_or_else(|| {
                io::Error::other(format!(
                    "media.udp_port {} leaves no room for {} workers below 65536",
                    config.udp_port, config.workers
                ))
            })?;
            let mut sockets = Vec::new();
            for ip in &config.ips {
                let socket = socket::bind_udp(SocketAddr::new(*ip, port))?;
                let port = socket.local_addr()?.port();
                sockets.push((SocketAddr::new(*ip, port), socket));
            }
            bound.push(sockets);
        }
        let mut workers = Vec::new();
        for (index, sockets) in bound.into_iter().enumerate() {
            let (commands, receiver) = mpsc::channel();
            let snapshot = Arc::new(ArcSwap::from_pointee(Snapshot::default()));
            let udp = sockets.iter().map(|(addr, _)| *addr).collect();
            let (waker, thread) = worker::spawn(worker::Setup {
                index,
                sockets,
                identity: identity.clone(),
                realtime: config.realtime,
                consent_timeout: config.consent_timeout,
                engine: engine.clone(),
                commands: receiver,
                events: events.clone(),
                snapshot: snapshot.clone(),
            })?;
            workers.push(Worker {
                udp,
                commands,
                waker,
                snapshot,
                thread: Some(thread),
            });
        }
        Ok(Self {
            workers,
            config,
            engine,
            tcp,
        })
    }

    /// How many workers there are.
    #[must_use]
    pub fn workers(&self) -> usize {
        self.workers.len()
    }

    /// Rungs that our engine decodes.
    #[must_use]
    pub fn rungs(&self) -> Rungs {
        self.engine.decodable()
    }

    /// Models of the neural rungs, as signalling names them: the first 32 bits of the bundle's SHA-256.
    #[must_use]
    pub fn models(&self) -> Option<u32> {
        self.engine.models()
    }

    /// The worker with the fewest peer connections.
    #[must_use]
    pub fn least_loaded(&self) -> usize {
        (0..self.workers.len())
            .min_by_key(|index| self.workers[*index].snapshot.load().pcs.len())
            .unwrap_or(0)
    }

    /// What clients of a worker may dial.
    #[must_use]
    pub fn client_candidates(&self, worker: usize) -> Vec<HostCandidate> {
        let udp = self.workers.get(worker).map_or(&[][..], |w| &w.udp);
        let udp = udp.iter().map(|addr| HostCandidate {
            addr: *addr,
            tcp: false,
        });
        let tcp = self.tcp.iter().map(|(addr, _)| HostCandidate {
            addr: *addr,
            tcp: true,
        });
        udp.chain(tcp).collect()
    }

    /// Binds the sockets of a server leg: one per advertised address.
    ///
    /// # Errors
    /// Out of ports or file descriptors.
    pub fn bind_server_leg(&self) -> io::Result<Vec<(SocketAddr, UdpSocket)>> {
        self.config
            .ips
            .iter()
            .map(|ip| {
                let socket = socket::bind_udp(SocketAddr::new(*ip, 0))?;
                let port = socket.local_addr()?.port();
                Ok((SocketAddr::new(*ip, port), socket))
            })
            .collect()
    }

    /// Makes or updates a peer connection of a session that is pinned to `worker`.
    pub fn describe(
        &self,
        worker: usize,
        session: SessionId,
        description: PcDescription,
        sockets: Vec<UdpSocket>,
    ) {
        self.send(
            worker,
            Command::Describe {
                session,
                description: Box::new(description),
                sockets,
            },
        );
    }

    /// Ends a session's peer connections.
    pub fn close(&self, worker: usize, session: SessionId) {
        self.send(worker, Command::Close { session });
    }

    fn send(&self, worker: usize, command: Command) {
        if let Some(worker) = self.workers.get(worker) {
            // A worker that is gone has ended its sessions; there is nobody left to tell.
            if worker.commands.send(command).is_ok() {
                let _ = worker.waker.wake();
            }
        }
    }

    /// The latest snapshot of each worker.
    #[must_use]
    pub fn snapshots(&self) -> Vec<Arc<Snapshot>> {
        self.workers
            .iter()
            .map(|worker| worker.snapshot.load_full())
            .collect()
    }

    /// Whether every worker thread still runs.
    #[must_use]
    pub fn alive(&self) -> bool {
        self.workers
            .iter()
            .all(|worker| worker.thread.as_ref().is_some_and(|t| !t.is_finished()))
    }

    /// Accepts ICE-TCP connections until cancelled. Returns at once where there is no TCP port.
    ///
    /// # Errors
    /// When the listeners cannot be used.
    pub async fn accept_tcp(self: Arc<Self>) -> io::Result<()> {
        let mut tasks = tokio::task::JoinSet::new();
        for (addr, listener) in &self.tcp {
            let addr = *addr;
            let listener = tokio::net::TcpListener::from_std(listener.try_clone()?)?;
            let media = self.clone();
            tasks.spawn(async move { tcp::accept(&listener, addr, &media).await });
        }
        while tasks.join_next().await.is_some() {}
        Ok(())
    }

    /// Ends all sessions and joins the threads.
    pub fn stop(&mut self) {
        for index in 0..self.workers.len() {
            self.send(index, Command::Stop);
        }
        for worker in &mut self.workers {
            if let Some(thread) = worker.thread.take() {
                // A panic there has been reported by the panic hook already.
                let _ = thread.join();
            }
        }
    }
}

impl Drop for Media {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The worker that a local username fragment of ours belongs to: its first two characters are the
/// index in hexadecimal.
#[must_use]
pub fn worker_of_ufrag(ufrag: &str) -> Option<usize> {
    usize::from_str_radix(ufrag.get(..2)?, 16).ok()
}

/// The prefix that [`worker_of_ufrag`] reads.
#[must_use]
pub fn ufrag_prefix(worker: usize) -> String {
    format!("{worker:02x}")
}
