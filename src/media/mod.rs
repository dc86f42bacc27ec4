//! Media I/O: worker threads that carry datagrams between sockets and [`auralink_proto::relay`].
//!
//! A session is pinned to one worker, which alone owns its sockets, keys and state. Signalling
//! talks to a worker through [`Media::send`], and hears of it through [`MediaEvent`]s and a
//! [`Snapshot`] a second; nothing is shared on the way of a packet.

mod arrivals;
pub mod external;
mod load;
mod mailbox;
mod mtu;
mod sender;
mod socket;
mod tcp;
#[cfg(test)]
mod tests;
mod worker;

pub use load::Place;

use arc_swap::ArcSwap;
use auralink_engine::Engine;
use auralink_proto::coding::HopStats;
use auralink_proto::description::{HostCandidate, PcDescription, Target};
use auralink_proto::dtls::Identity;
use auralink_proto::flow::FlowStats;
use auralink_proto::ladder::{Rung, Rungs};
use auralink_proto::leg::{CloseReason, LegState};
use auralink_proto::relay::Side;
use load::Load;
use mailbox::{Mailbox, Wanted};
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

/// Where media is spoken.
#[derive(Debug, Clone)]
pub struct MediaConfig {
    /// Addresses advertised to clients and to LiveKit; every server leg has a socket on each.
    pub ips: Vec<IpAddr>,
    /// How clients are told of those that a NAT maps, local and external; of the others as they are.
    pub external: Vec<(IpAddr, IpAddr)>,
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

/// How long consent lasts, which a reload may change for the peer connections that come.
pub(crate) struct Consent(AtomicU64);

impl Consent {
    fn new(timeout: Duration) -> Arc<Self> {
        let consent = Self(AtomicU64::new(0));
        consent.set(timeout);
        Arc::new(consent)
    }

    fn set(&self, timeout: Duration) {
        let ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        self.0.store(ms, Ordering::Relaxed);
    }

    fn timeout(&self) -> Duration {
        Duration::from_millis(self.0.load(Ordering::Relaxed))
    }
}

/// Identifies a session in this process.
pub type SessionId = u64;

/// What a worker is told.
pub(crate) enum Command {
    /// Make or update a peer connection: how, lies in the mailbox.
    Describe { session: SessionId, target: Target },
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
    /// Panic: in the name of a session's peer connections, or of nobody.
    #[cfg(test)]
    Fall(Option<SessionId>),
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
    /// Dropped: more DTLS handshakes than there was time for.
    pub dropped_handshake: u64,
    /// Peer connections that were ended because handling them panicked.
    pub panics: u64,
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
    mailbox: Arc<Mailbox>,
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
    arrivals: tcp::Waiting,
    load: Load,
    consent: Arc<Consent>,
    /// Why a worker has ended that was not told to.
    ended: tokio::sync::watch::Receiver<Option<String>>,
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
        let consent = Consent::new(config.consent_timeout);
        let (ends, ended) = tokio::sync::watch::channel(None);
        for (index, sockets) in bound.into_iter().enumerate() {
            let (commands, receiver) = mpsc::channel();
            let mailbox = Arc::new(Mailbox::default());
            let snapshot = Arc::new(ArcSwap::from_pointee(Snapshot::default()));
            let udp = sockets.iter().map(|(addr, _)| *addr).collect();
            let (waker, thread) = worker::spawn(worker::Setup {
                index,
                sockets,
                identity: identity.clone(),
                realtime: config.realtime,
                consent: consent.clone(),
                engine: engine.clone(),
                commands: receiver,
                mailbox: mailbox.clone(),
                events: events.clone(),
                snapshot: snapshot.clone(),
                ended: ends.clone(),
            })?;
            workers.push(Worker {
                udp,
                commands,
                mailbox,
                waker,
                snapshot,
                thread: Some(thread),
            });
        }
        Ok(Self {
            load: Load::new(workers.len()),
            consent,
            workers,
            config,
            engine,
            tcp,
            arrivals: tcp::Waiting::default(),
            ended,
        })
    }

    /// How many workers there are.
    #[must_use]
    pub fn workers(&self) -> usize {
        self.workers.len()
    }

    /// A leg of the peer connections that come from now on ends without consent for so long.
    pub fn set_consent_timeout(&self, timeout: Duration) {
        self.consent.set(timeout);
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

    /// A place for a new session, on the worker that has given the fewest.
    #[must_use]
    pub fn place(&self) -> Place {
        self.load.place()
    }

    /// Places given, by worker.
    #[must_use]
    pub fn placed(&self) -> Vec<usize> {
        self.load.given()
    }

    /// What clients of a worker may dial.
    #[must_use]
    pub fn client_candidates(&self, worker: usize) -> Vec<HostCandidate> {
        let udp = self.workers.get(worker).map_or(&[][..], |w| &w.udp);
        let told = |addr: &SocketAddr| {
            let mut external = self.config.external.iter();
            let external = external.find(|(local, _)| *local == addr.ip());
            SocketAddr::new(external.map_or(addr.ip(), |(_, ip)| *ip), addr.port())
        };
        let udp = udp.iter().map(|addr| HostCandidate {
            addr: told(addr),
            tcp: false,
        });
        let tcp = self.tcp.iter().map(|(addr, _)| HostCandidate {
            addr: told(addr),
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
        let wanted = Wanted {
            description: Box::new(description),
            sockets,
        };
        let command = self
            .workers
            .get(worker)
            .and_then(|worker| worker.mailbox.describe(session, wanted));
        if let Some(command) = command {
            self.send(worker, command);
        }
    }

    /// Gives a worker an ICE-TCP connection to look at; it is dropped where too many wait for that.
    fn hand_over(&self, worker: usize, connection: Command) -> Result<(), ()> {
        let admitted = self
            .workers
            .get(worker)
            .is_some_and(|worker| worker.mailbox.admit());
        if !admitted {
            return Err(());
        }
        self.send(worker, connection);
        Ok(())
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

    /// Whether each worker's thread still runs.
    #[must_use]
    pub fn alive(&self) -> Vec<bool> {
        self.workers
            .iter()
            .map(|worker| worker.thread.as_ref().is_some_and(|t| !t.is_finished()))
            .collect()
    }

    /// Waits until a worker has ended that was not told to, and says why. Its sessions have ended with it.
    pub async fn ended(&self) -> String {
        let mut ended = self.ended.clone();
        loop {
            if let Some(why) = ended.borrow_and_update().clone() {
                return why;
            }
            if ended.changed().await.is_err() {
                // Every worker has been told to end.
                return std::future::pending().await;
            }
        }
    }

    /// Accepts ICE-TCP connections until cancelled.
    ///
    /// # Errors
    /// When a listener cannot be used any more.
    pub async fn accept_tcp(self: Arc<Self>) -> io::Result<()> {
        if self.tcp.is_empty() {
            return std::future::pending().await;
        }
        let mut tasks = tokio::task::JoinSet::new();
        for (addr, listener) in &self.tcp {
            let addr = *addr;
            let listener = tokio::net::TcpListener::from_std(listener.try_clone()?)?;
            let media = self.clone();
            tasks.spawn(async move { tcp::accept(&listener, addr, &media).await });
        }
        // None of them ends by itself; the others end with the set.
        match tasks.join_next().await {
            Some(Err(error)) => Err(io::Error::other(error)),
            Some(Ok(())) | None => Ok(()),
        }
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
