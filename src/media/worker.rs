//! One media worker: a thread, an epoll set, and the peer connections pinned to it.
//!
//! Every turn: commands, sockets that are ready, timers, each for a bounded number, so that none keeps the others waiting.
//! Nothing here blocks but the poll itself. A panic while a peer connection is handled ends that one (`State::guarded`).

mod codecs;
mod handshakes;
mod pcs;
mod streams;
#[cfg(test)]
mod tests;

use super::mailbox::Mailbox;
use super::sender::{Batch, Udp};
use super::tcp::{Connection, Sent};
use super::{Command, Consent, MediaEvent, SessionId, Snapshot, WorkerCounters};
use arc_swap::ArcSwap;
use auralink_engine::{Engine, Port};
use auralink_proto::aic::ntp_middle;
use auralink_proto::coding::{EngineRungs, HopStats};
use auralink_proto::description::Target;
use auralink_proto::dtls::Identity;
use auralink_proto::flow::FlowStats;
use auralink_proto::leg::LegState;
use auralink_proto::packet::{Kind, classify};
use auralink_proto::relay::{Now, Relay, RelayEvent, Scratch, Side, Transmit};
use auralink_proto::stun::{Path, addressed_ufrag};
use foldhash::{HashMap, HashMapExt};
use handshakes::{Handshakes, Waiting};
use mio::{Events, Interest, Poll, Token, Waker};
use quinn_udp::{BATCH_SIZE, RecvMeta, UdpSockRef};
use slab::Slab;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use thread_priority::{
    RealtimeThreadSchedulePolicy, ThreadPriority, ThreadSchedulePolicy,
    set_thread_priority_and_policy, thread_native_id,
};

const WAKER: Token = Token(usize::MAX);

/// Bit of a token that marks a TCP connection; the rest is its slab key.
const TCP: usize = 1 << 40;

/// A socket is read at most so many batches a turn, then the others have theirs: 4 × 32 datagrams
/// are a fifth of a millisecond of work.
const BATCHES_A_TURN: usize = 4;

/// And no further batch once it has brought so many, because GRO puts up to 64 into one slot.
const DATAGRAMS_A_TURN: usize = BATCHES_A_TURN * BATCH_SIZE;

/// Commands of a turn: a description makes or updates both legs of a peer connection, up to a tenth of a millisecond.
const COMMANDS_A_TURN: usize = 32;

/// Peer connections whose time has come that a turn sees to.
const TIMERS_A_TURN: usize = 256;

/// Slots of a read from a server leg, which has one sender: the kernel and quinn-udp look at each slot,
/// and there is seldom more than one datagram a turn.
const SERVER_SLOTS: usize = 4;

/// A turn begins no sooner after the one before than this: under load, datagrams of several peers
/// share the turn's system calls, and nobody waits who comes after a pause. Well under the
/// millisecond that the sidecar may add.
const TURN: Duration = Duration::from_micros(250);

/// Receive buffer of one batch slot: GRO merges up to 64 KiB.
const SLOT: usize = 64 * 1024;

/// How often a snapshot is published.
const SNAPSHOT_EVERY: Duration = Duration::from_secs(1);

pub(super) struct Setup {
    pub(super) index: usize,
    pub(super) sockets: Vec<(SocketAddr, std::net::UdpSocket)>,
    pub(super) identity: Identity,
    pub(super) realtime: bool,
    /// Of the peer connections that it makes.
    pub(super) consent: Arc<Consent>,
    pub(super) engine: Arc<Engine>,
    pub(super) commands: mpsc::Receiver<Command>,
    pub(super) mailbox: Arc<Mailbox>,
    pub(super) events: tokio::sync::mpsc::UnboundedSender<MediaEvent>,
    pub(super) snapshot: Arc<ArcSwap<Snapshot>>,
    /// Why the worker has ended, if nobody told it to.
    pub(super) ended: tokio::sync::watch::Sender<Option<String>>,
}

/// Who a socket serves.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Owner {
    /// Clients of any session.
    Clients,
    /// The server leg of one peer connection.
    Pc(usize),
}

struct Socket {
    udp: Udp,
    owner: Owner,
    queued: bool,
    /// What waits to be sent on it.
    batch: Batch,
}

struct Pc {
    /// Of its coding's tracks.
    id: u64,
    session: SessionId,
    relay: Relay,
    sockets: Vec<usize>,
    paths: Vec<Path>,
    ufrags: Vec<String>,
    due: Option<Instant>,
}

/// The worker's sending half: what a relay may use while it is being called.
struct Out {
    sockets: Slab<Socket>,
    /// By the address that peers know.
    by_local: HashMap<SocketAddr, usize>,
    tcp: Slab<(Path, Connection)>,
    tcp_by_path: HashMap<Path, usize>,
    broken_tcp: Vec<usize>,
    /// Sockets whose batch is not empty.
    unsent: Vec<usize>,
    counters: WorkerCounters,
}

impl Out {
    /// Sends what all sockets have waiting.
    fn flush(&mut self) {
        while let Some(key) = self.unsent.pop() {
            self.flush_one(key);
        }
    }

    fn flush_one(&mut self, key: usize) {
        if let Some(socket) = self.sockets.get_mut(key) {
            let (sent, dropped) = socket.batch.flush(&socket.udp);
            self.counters.sent += sent;
            self.counters.dropped_send += dropped;
        }
    }
}

impl Transmit for Out {
    fn transmit(&mut self, _side: Side, path: Path, datagram: &[u8]) {
        self.counters.sent_bytes += datagram.len() as u64;
        if path.tcp {
            let Some(key) = self.tcp_by_path.get(&path).copied() else {
                self.counters.dropped_send += 1;
                return;
            };
            if let Some((_, connection)) = self.tcp.get_mut(key) {
                match connection.send(Instant::now(), datagram) {
                    Ok(Sent::Taken) => self.counters.sent += 1,
                    Ok(Sent::Dropped) => self.counters.dropped_send += 1,
                    Err(_) => self.broken_tcp.push(key),
                }
            }
            return;
        }
        let Some(key) = self.by_local.get(&path.local).copied() else {
            self.counters.dropped_send += 1;
            return;
        };
        let Some(socket) = self.sockets.get_mut(key) else {
            return;
        };
        let max = socket.udp.max_segments();
        if socket.batch.is_empty() {
            self.unsent.push(key);
        }
        if !socket.batch.push(&path, datagram, max) {
            self.flush_one(key);
            if let Some(socket) = self.sockets.get_mut(key) {
                socket.batch.push(&path, datagram, max);
            }
        }
    }
}

struct State {
    poll: Poll,
    out: Out,
    pcs: Slab<Pc>,
    by_session: HashMap<(SessionId, Target), usize>,
    by_ufrag: HashMap<String, usize>,
    by_path: HashMap<Path, usize>,
    by_id: HashMap<u64, usize>,
    codecs: Port,
    /// What it is still to forget.
    closes: codecs::Closes,
    /// What the codecs could do at the last look.
    rungs: EngineRungs,
    timers: BinaryHeap<Reverse<(Instant, usize)>>,
    ready: VecDeque<usize>,
    /// TCP connections that can be read.
    tcp_ready: VecDeque<usize>,
    handshakes: Handshakes,
    /// The last turn left commands or outcomes for the next.
    more: bool,
    /// The peer connection that is being handled.
    at: Option<usize>,
    scratch: Scratch,
    setup: Setup,
    next_snapshot: Instant,
    /// What peer connections that have ended carried: up, down.
    ended: [FlowStats; 2],
    /// And what their hops did.
    ended_hop: HopStats,
    next_id: u64,
}

pub(super) fn spawn(setup: Setup) -> io::Result<(Arc<Waker>, JoinHandle<()>)> {
    let name = format!("media-{}", setup.index);
    let (state, waker) = State::new(setup)?;
    let thread = std::thread::Builder::new().name(name).spawn(move || {
        if state.setup.realtime {
            take_precedence(state.setup.index);
        }
        let (index, ended) = (state.setup.index, state.setup.ended.clone());
        let why = match catch_unwind(AssertUnwindSafe(|| state.run())) {
            Ok(Ok(())) => return,
            Ok(Err(error)) => format!("media worker {index} cannot wait for its sockets: {error}"),
            Err(_) => format!("media worker {index} panicked"),
        };
        tracing::error!(why, "a media worker has ended, and all of its sessions");
        ended.send_replace(Some(why));
    })?;
    Ok((waker, thread))
}

/// Has the kernel run this thread before every thread that isn't real-time itself. Of these it keeps 5 % of each second for the
/// others (`kernel.sched_rt_runtime_us`), and a worker sleeps between turns.
fn take_precedence(index: usize) {
    let lowest = ThreadSchedulePolicy::Realtime(RealtimeThreadSchedulePolicy::RoundRobin);
    if let Err(error) =
        set_thread_priority_and_policy(thread_native_id(), ThreadPriority::Min, lowest)
    {
        tracing::warn!(
            worker = index,
            ?error,
            "media.scheduling: realtime: the kernel refuses it (CAP_SYS_NICE is needed); scheduled normally"
        );
    }
}

/// Whether a leg is over and its relay hasn't taken that up yet.
fn is_ending(relay: &Relay) -> bool {
    let over = |side| relay.leg(side).state() == LegState::Closed;
    !relay.is_closed() && (over(Side::Client) || over(Side::Server))
}

fn now() -> Now {
    let ntp = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, ntp_middle);
    Now {
        instant: Instant::now(),
        ntp,
    }
}

impl State {
    fn new(mut setup: Setup) -> io::Result<(Self, Arc<Waker>)> {
        let poll = Poll::new()?;
        let waker = Arc::new(Waker::new(poll.registry(), WAKER)?);
        let sockets = std::mem::take(&mut setup.sockets);
        let wake = waker.clone();
        // A wake that fails has nobody left to wake.
        let codecs = setup.engine.port(Arc::new(move || drop(wake.wake())));
        let mut state = Self {
            poll,
            out: Out {
                sockets: Slab::new(),
                by_local: HashMap::new(),
                tcp: Slab::new(),
                tcp_by_path: HashMap::new(),
                broken_tcp: Vec::new(),
                unsent: Vec::new(),
                counters: WorkerCounters::default(),
            },
            pcs: Slab::new(),
            by_session: HashMap::new(),
            by_ufrag: HashMap::new(),
            by_path: HashMap::new(),
            by_id: HashMap::new(),
            rungs: codecs::rungs(&codecs),
            codecs,
            closes: codecs::Closes::default(),
            timers: BinaryHeap::new(),
            ready: VecDeque::new(),
            tcp_ready: VecDeque::new(),
            handshakes: Handshakes::default(),
            more: false,
            at: None,
            scratch: Scratch::default(),
            setup,
            next_snapshot: Instant::now() + SNAPSHOT_EVERY,
            ended: [FlowStats::default(); 2],
            ended_hop: HopStats::default(),
            next_id: 0,
        };
        for (local, socket) in sockets {
            state.add_socket(Owner::Clients, local, socket)?;
        }
        Ok((state, waker))
    }

    fn run(mut self) -> io::Result<()> {
        let mut events = Events::with_capacity(1024);
        let mut buffers = vec![vec![0u8; SLOT]; BATCH_SIZE];
        let mut metas = vec![RecvMeta::default(); BATCH_SIZE];
        let mut turn = now().instant;
        loop {
            let since = now().instant.duration_since(turn);
            if since < TURN {
                std::thread::sleep(TURN - since);
            }
            let idle = self.ready.is_empty() && self.tcp_ready.is_empty();
            let timeout = if idle && !self.more && !self.handshakes.any() {
                let due = self.timers.peek().map(|Reverse((due, _))| *due);
                let due = due.map_or(self.next_snapshot, |due| due.min(self.next_snapshot));
                let wait = due.saturating_duration_since(now().instant);
                // Closes that wait go on without a packet too.
                if self.closes.is_empty() {
                    wait
                } else {
                    wait.min(codecs::CLOSES_AGAIN)
                }
            } else {
                Duration::ZERO
            };
            if let Err(error) = self.poll.poll(&mut events, Some(timeout))
                && error.kind() != io::ErrorKind::Interrupted
            {
                return Err(error);
            }
            self.out.counters.turns += 1;
            turn = now().instant;
            for event in &events {
                let Token(token) = event.token();
                if event.token() == WAKER {
                } else if token & TCP != 0 {
                    self.tcp_event(token & !TCP, turn, event.is_writable());
                } else if let Some(socket) = self.out.sockets.get_mut(token)
                    && !socket.queued
                {
                    socket.queued = true;
                    self.ready.push_back(token);
                }
            }
            self.more = false;
            self.handshakes.turn();
            let mut left = COMMANDS_A_TURN;
            let mut goes_on = true;
            self.guarded(|state| goes_on = state.commands(&mut left));
            if !goes_on {
                self.stop();
                return Ok(());
            }
            let mut left = codecs::OUTCOMES_A_TURN;
            self.guarded(|state| state.outcomes(&mut left));
            self.guarded(Self::deferred_handshakes);
            for _ in 0..self.ready.len() {
                if let Some(socket) = self.ready.pop_front() {
                    self.read(socket, &mut buffers, &mut metas);
                }
            }
            for _ in 0..self.tcp_ready.len() {
                if let Some(connection) = self.tcp_ready.pop_front() {
                    self.read_tcp(connection);
                }
            }
            let mut left = TIMERS_A_TURN;
            self.guarded(|state| state.timers(&mut left));
            self.guarded(Self::drop_broken_tcp);
            self.out.flush();
            if now().instant >= self.next_snapshot {
                self.publish();
            }
        }
    }

    /// Runs `work`, again where it panicked: what it has taken up by then isn't there any more. A panic costs the peer
    /// connection that was being handled, and nobody else. While nobody panics this costs nothing: the way out is found in
    /// tables, and there is one catch for a batch of datagrams.
    fn guarded(&mut self, mut work: impl FnMut(&mut Self)) {
        loop {
            self.at = None;
            let Err(panic) = catch_unwind(AssertUnwindSafe(|| work(self))) else {
                self.at = None;
                return;
            };
            match self.at.take() {
                Some(key) => self.fell(key),
                // In nobody's name: what is wrong is the worker's own state. The thread ends, and the process with it.
                None => resume_unwind(panic),
            }
        }
    }

    fn add_socket(
        &mut self,
        owner: Owner,
        local: SocketAddr,
        socket: std::net::UdpSocket,
    ) -> io::Result<usize> {
        let mut udp = Udp::new(socket, local)?;
        let entry = self.out.sockets.vacant_entry();
        let key = entry.key();
        self.poll
            .registry()
            .register(&mut udp.socket, Token(key), Interest::READABLE)?;
        self.out.by_local.insert(local, key);
        entry.insert(Socket {
            udp,
            owner,
            queued: false,
            batch: Batch::default(),
        });
        Ok(key)
    }

    /// Reads a ready socket; it stays in line while there is more.
    fn read(&mut self, key: usize, buffers: &mut [Vec<u8>], metas: &mut [RecvMeta]) {
        let before = self.out.counters.received;
        for _ in 0..BATCHES_A_TURN {
            if self.out.counters.received - before >= DATAGRAMS_A_TURN as u64 {
                break;
            }
            let Some(socket) = self.out.sockets.get_mut(key) else {
                return;
            };
            let (owner, local) = (socket.owner, socket.udp.local);
            let slots = match owner {
                Owner::Clients => BATCH_SIZE,
                Owner::Pc(_) => SERVER_SLOTS,
            };
            let count = {
                let mut slices: [IoSliceMut<'_>; BATCH_SIZE] = {
                    let mut buffers = buffers.iter_mut();
                    std::array::from_fn(|_| {
                        IoSliceMut::new(buffers.next().map_or(&mut [], |buffer| &mut buffer[..]))
                    })
                };
                socket.udp.state.recv(
                    UdpSockRef::from(&socket.udp.socket),
                    &mut slices[..slots],
                    metas,
                )
            };
            let count = match count {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    socket.queued = false;
                    return;
                }
                // An ICMP error of an earlier send (ECONNREFUSED): the next read goes on.
                Err(_) => continue,
            };
            let now = now();
            let mut datagrams =
                buffers
                    .iter()
                    .zip(metas.iter())
                    .take(count)
                    .flat_map(|(buffer, meta)| {
                        let path = Path {
                            local,
                            remote: meta.addr,
                            tcp: false,
                        };
                        let read = buffer.get(..meta.len).unwrap_or_default();
                        read.chunks(meta.stride.max(1))
                            .map(move |datagram| (path, datagram))
                    });
            self.guarded(|state| {
                for (path, datagram) in datagrams.by_ref() {
                    state.datagram(now, owner, path, datagram);
                }
            });
            // The socket was empty then; what came since has raised a new event (epoll is
            // edge-triggered here), so there is no need to be told so by a second system call.
            if count < slots {
                if let Some(socket) = self.out.sockets.get_mut(key) {
                    socket.queued = false;
                }
                return;
            }
        }
        self.ready.push_back(key);
    }

    fn datagram(&mut self, now: Now, owner: Owner, path: Path, datagram: &[u8]) {
        // Whoever the datagram before was for has no part in a panic while this one's owner is looked for.
        self.at = None;
        self.out.counters.received += 1;
        self.out.counters.received_bytes += datagram.len() as u64;
        let (key, side) = match owner {
            Owner::Pc(key) => (Some(key), Side::Server),
            Owner::Clients => (self.client_pc(path, datagram), Side::Client),
        };
        let Some((key, pc)) = key.and_then(|key| Some((key, self.pcs.get(key)?))) else {
            return;
        };
        if Handshakes::is_one(pc.relay.leg(side), &path, datagram) && !self.handshakes.admit() {
            let kept = self.handshakes.defer(Waiting {
                key,
                id: pc.id,
                side,
                path,
                datagram: datagram.to_vec(),
            });
            self.out.counters.dropped_handshake += u64::from(!kept);
            return;
        }
        self.receive(now, key, side, path, datagram);
    }

    /// Handshakes that had to wait.
    fn deferred_handshakes(&mut self) {
        let now = now();
        while let Some(waiting) = self.handshakes.next() {
            self.at = None;
            let owner = self.pcs.get(waiting.key).map(|pc| pc.id);
            if owner == Some(waiting.id) {
                self.receive(
                    now,
                    waiting.key,
                    waiting.side,
                    waiting.path,
                    &waiting.datagram,
                );
            }
        }
    }

    fn receive(&mut self, now: Now, key: usize, side: Side, path: Path, datagram: &[u8]) {
        let Some(pc) = self.pcs.get_mut(key) else {
            return;
        };
        self.at = Some(key);
        let taken = pc
            .relay
            .receive(now, side, path, datagram, &mut self.scratch, &mut self.out);
        if !taken {
            return;
        }
        // Of media only what is coded changes timers or raises events, and what ends a leg: it used up the keys of the other.
        match classify(datagram) {
            Kind::Rtp | Kind::Rtcp => {
                if pc.relay.is_coding() || is_ending(&pc.relay) {
                    self.after(key);
                }
            }
            kind => {
                // Whoever proved an address last has it: a participant who takes another's (a
                // forged source) loses it to that one's next check. Only what was authentic is taken.
                if kind == Kind::Stun && side == Side::Client && pc.relay.client_knows(&path) {
                    self.by_path.insert(path, key);
                }
                self.after(key);
            }
        }
    }

    fn client_pc(&mut self, path: Path, datagram: &[u8]) -> Option<usize> {
        // A check is for whom it names, wherever it comes from; everything else is for whom the
        // address was proved by a check.
        if classify(datagram) == Kind::Stun {
            let key = addressed_ufrag(datagram).and_then(|ufrag| self.by_ufrag.get(ufrag));
            if key.is_none() {
                self.out.counters.dropped_unknown_ufrag += 1;
            }
            return key.copied();
        }
        let key = self.by_path.get(&path).copied();
        if key.is_none() {
            self.out.counters.dropped_unknown_address += 1;
        }
        key
    }

    /// Follows up on a relay that was called: events, timer, end.
    fn after(&mut self, key: usize) {
        let Some(pc) = self.pcs.get_mut(key) else {
            return;
        };
        // A relay looks after its legs when it is given time, and not while it passes media on.
        if is_ending(&pc.relay) {
            pc.relay
                .handle_timeout(now(), &mut self.scratch, &mut self.out);
        }
        if pc.relay.is_coding() {
            codecs::jobs(
                pc,
                &self.codecs,
                &mut self.closes,
                &mut self.scratch,
                &mut self.out,
            );
        }
        let (session, target) = (pc.session, pc.relay.target());
        while let Some(event) = pc.relay.poll_event() {
            let report = match event {
                RelayEvent::PathSeen(path) => {
                    self.by_path.insert(path, key);
                    pc.paths.push(path);
                    continue;
                }
                RelayEvent::PathForgotten(path) => {
                    pc.paths.retain(|known| *known != path);
                    if self.by_path.get(&path) == Some(&key) {
                        self.by_path.remove(&path);
                    }
                    if let Some(tcp) = self.out.tcp_by_path.get(&path) {
                        self.out.broken_tcp.push(*tcp);
                    }
                    continue;
                }
                RelayEvent::Established(side, took) => MediaEvent::Established {
                    session,
                    target,
                    side,
                    took,
                },
                RelayEvent::Closed(side, reason) => MediaEvent::Closed {
                    session,
                    target,
                    side,
                    reason,
                    hop: Box::new(pcs::hop(&pc.relay)),
                },
            };
            // The receiver goes only when the process does.
            let _ = self.setup.events.send(report);
        }
        if pc.relay.is_closed() {
            self.remove(key);
            return;
        }
        let due = pc.relay.poll_timeout();
        if let Some(due) = due
            && pc.due.is_none_or(|known| due < known)
        {
            pc.due = Some(due);
            self.timers.push(Reverse((due, key)));
        }
    }

    fn timers(&mut self, left: &mut usize) {
        let now = now();
        // What is left is due in the next turn, which begins at once because of it.
        while *left > 0
            && let Some(Reverse((due, key))) = self.timers.peek().copied()
        {
            self.at = None;
            if due > now.instant {
                break;
            }
            self.timers.pop();
            let Some(pc) = self.pcs.get_mut(key) else {
                continue;
            };
            // An entry that a sooner one, or another peer connection in this slot, has outdated.
            if pc.due != Some(due) {
                continue;
            }
            pc.due = None;
            *left -= 1;
            self.at = Some(key);
            pc.relay
                .handle_timeout(now, &mut self.scratch, &mut self.out);
            self.after(key);
        }
    }

    /// Takes commands; `false`: the thread is to end.
    fn commands(&mut self, left: &mut usize) -> bool {
        while *left > 0 {
            *left -= 1;
            match self.setup.commands.try_recv() {
                Ok(Command::Describe { session, target }) => {
                    if let Some(wanted) = self.setup.mailbox.fetch(session, target) {
                        self.describe(session, &wanted.description, wanted.sockets);
                    }
                }
                Ok(Command::Close { session }) => {
                    for target in [Target::Publisher, Target::Subscriber] {
                        if let Some(key) = self.by_session.get(&(session, target)).copied() {
                            self.close(key);
                        }
                    }
                }
                Ok(Command::Tcp {
                    stream,
                    local,
                    remote,
                    received,
                }) => {
                    self.setup.mailbox.looked_at();
                    self.add_tcp(stream, local, remote, received);
                }
                Ok(Command::Stop) | Err(mpsc::TryRecvError::Disconnected) => return false,
                Err(mpsc::TryRecvError::Empty) => return true,
                #[cfg(test)]
                Ok(Command::Fall(session)) => self.fall(session),
            }
            self.at = None;
        }
        self.more = true;
        true
    }
}
