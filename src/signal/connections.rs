//! Who is connected and who waits for whom: what bounds connections, all together and of one address.
//!
//! A connection is either waited for (its client has to send or to take something) or at work (the upstream has to). One that is
//! waited for has a deadline, and may have to go before it when another one needs its place: of those the one that has kept us
//! waiting longest. So somebody who opens connections and leaves them takes nothing from others. What is at work, and sessions,
//! are never ended for others.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use super::{HTTP_EVICTED, Limits};

/// Bytes of an unfinished request that every connection may have in memory: the first buffer of hyper has this size in any case.
const SMALL: usize = 8 << 10;

/// Bytes beyond [`SMALL`] of all unfinished requests together. A client's head of 30 kB is complete a round trip after it began, so
/// that this is room for some 700 joins in one round trip.
const HELD: usize = 16 << 20;

/// Connections that had to go and are still open, at most, before another one is accepted: a few of the descriptors that the
/// listener leaves to the rest of the process.
const MOST_GOING: usize = 8;

/// A client that takes nothing of its answer for this time is gone: TCP alone would hold on for a quarter of an hour.
const STALL: Duration = Duration::from_secs(30);

/// For the answer to a client that has ended its side of the connection: whether it only has nothing more to send or is gone, TCP
/// doesn't tell. Whoever half-closes waits for an answer that comes at once; who is gone must not keep the upstream at work.
const HALF_CLOSED: Duration = Duration::from_secs(5);

/// For what is on its way inside of the process, once the client has ended its side in the middle of a body.
const BROKEN_OFF: Duration = Duration::from_millis(500);

/// Where a connection is on its way through a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Phase {
    /// Between requests: its client owes nothing.
    Idle,
    /// A request has begun to arrive.
    Head,
    /// Its head is here and it wants another protocol: the end of what the client sends is the end of it.
    Switching,
    /// Its head is here and its body may be on the way.
    Working,
    /// All of it is here.
    Asked,
    /// It is no HTTP any more.
    Upgraded,
}

/// Why the deadline of a connection matters now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Due {
    /// It has been idle for so long that a kept upstream connection is of no use to it any more.
    Rest,
    /// Its time is over, or its place went to another one.
    Over,
}

/// The addresses that count as one: an IPv4 address, or the /64 that one IPv6 host or home has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Block(IpAddr);

impl Block {
    pub(super) fn of(ip: IpAddr) -> Block {
        Block(match ip.to_canonical() {
            IpAddr::V4(ip) => ip.into(),
            IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() & !u128::from(u64::MAX)).into(),
        })
    }
}

#[derive(Default)]
struct Address {
    /// Connections that are no sessions.
    open: usize,
    handshakes: usize,
    /// Tickets of those that are waited for.
    waiting: BTreeSet<u64>,
}

struct At {
    block: Block,
    changed: Arc<Notify>,
    /// Since when its client keeps us waiting, as a number that only grows.
    ticket: u64,
    waiting: bool,
    deadline: Option<Instant>,
    /// Since when it rests, until its upstream connection has been given up for that.
    resting: Option<Instant>,
    held: usize,
    /// Counts among those of its address.
    counted: bool,
}

#[derive(Default)]
struct Inner {
    next: u64,
    open: HashMap<u64, At>,
    addresses: HashMap<Block, Address>,
    /// Ticket to connection, of those that are waited for.
    waiting: BTreeMap<u64, u64>,
    /// The same of those that hold more than [`SMALL`].
    large: BTreeMap<u64, u64>,
    /// Bytes beyond [`SMALL`] of all.
    held: usize,
    /// Connections that had to go and whose tasks have not ended yet: their descriptors are still open.
    going: usize,
}

/// All connections of a listener.
pub(super) struct Connections {
    inner: Mutex<Inner>,
    bounds: ArcSwap<Bounds>,
    /// Bytes beyond [`SMALL`] that may be held.
    memory: usize,
    /// See [`Due::Rest`].
    rest: Duration,
    freed: Notify,
    gone: Notify,
}

/// What the limits in force allow.
struct Bounds {
    most: usize,
    /// 0: no bound.
    per_address: usize,
    handshakes_per_address: usize,
    header: Duration,
    keep_alive: Duration,
    rest: Duration,
}

impl Bounds {
    fn of(limits: &Limits, most: usize, rest: Duration) -> Self {
        Self {
            most: most.max(1),
            per_address: limits.connections_per_address,
            // A quarter of one kind and a quarter of the other is what one address may take; with two places it is one.
            handshakes_per_address: limits.handshakes.div_ceil(2),
            header: limits.header_timeout,
            keep_alive: limits.keep_alive_timeout,
            rest: rest.min(limits.keep_alive_timeout),
        }
    }
}

/// One connection's place.
pub(super) struct Seat {
    id: u64,
    /// Written under the lock of all, read without.
    phase: AtomicU8,
    /// Number of the request that is under way: its body may outlive its answer. Written under the lock.
    request: AtomicU64,
    /// The client has ended its side.
    half_closed: AtomicBool,
    all: Arc<Connections>,
    changed: Arc<Notify>,
}

/// Why there is no place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Full {
    /// Everywhere: nobody can be asked to go.
    All,
    /// For this address.
    Address,
}

impl Connections {
    /// `most` is at most what the process has descriptors for; `rest`: see [`Due::Rest`].
    pub(super) fn new(limits: &Limits, most: usize, rest: Duration) -> Arc<Connections> {
        Arc::new(Connections {
            inner: Mutex::default(),
            bounds: ArcSwap::from_pointee(Bounds::of(limits, most, rest)),
            memory: HELD,
            rest,
            freed: Notify::new(),
            gone: Notify::new(),
        })
    }

    /// Other limits, for what comes from now on: a connection keeps its deadline until its next step, and none goes because fewer
    /// are allowed than there are.
    pub(super) fn set(&self, limits: &Limits, most: usize) {
        let bounds = Bounds::of(limits, most, self.rest);
        self.bounds.store(Arc::new(bounds));
        // There may be room now.
        self.freed.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Every change below is whole before anything can panic.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a new connection, for which another one may have to go.
    pub(super) fn admit(self: &Arc<Self>, ip: IpAddr) -> Result<Arc<Seat>, Full> {
        let block = Block::of(ip);
        let bounds = self.bounds.load();
        let mut inner = self.lock();
        let of_address = inner.addresses.get(&block).map_or(0, |a| a.open);
        if bounds.per_address > 0 && of_address >= bounds.per_address {
            let oldest = inner.addresses.get(&block).and_then(|a| a.waiting.first());
            let Some(id) = oldest.and_then(|t| inner.waiting.get(t)).copied() else {
                return Err(Full::Address);
            };
            inner.evict(id, "address");
        }
        if inner.open.len() >= bounds.most {
            let Some((_, &id)) = inner.waiting.first_key_value() else {
                return Err(Full::All);
            };
            inner.evict(id, "full");
        }
        let id = inner.next();
        let changed = Arc::new(Notify::new());
        let at = At {
            block,
            changed: changed.clone(),
            ticket: id,
            waiting: false,
            deadline: Some(Instant::now() + bounds.header),
            resting: None,
            held: 0,
            counted: true,
        };
        inner.open.insert(id, at);
        inner.addresses.entry(block).or_default().open += 1;
        inner.wait(id);
        Ok(Arc::new(Seat {
            id,
            phase: AtomicU8::new(Phase::Idle as u8),
            request: AtomicU64::new(0),
            half_closed: AtomicBool::new(false),
            all: self.clone(),
            changed,
        }))
    }

    /// Returns once few of the connections that had to go are still open, so that a burst of new ones doesn't take the descriptors
    /// of everybody.
    pub(super) async fn settled(&self) {
        while self.lock().going > MOST_GOING {
            self.gone.notified().await;
        }
    }

    /// Returns once a connection has ended or can be asked to go, since the last call.
    pub(super) async fn freed(&self) {
        self.freed.notified().await;
    }
}

impl Inner {
    fn next(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// From here on its client is waited for.
    fn wait(&mut self, id: u64) {
        let Some(at) = self.open.get_mut(&id) else {
            return;
        };
        at.waiting = true;
        self.waiting.insert(at.ticket, id);
        if let Some(address) = self.addresses.get_mut(&at.block) {
            address.waiting.insert(at.ticket);
        }
        if at.held > SMALL {
            self.large.insert(at.ticket, id);
        }
    }

    /// It is not.
    fn stop_waiting(&mut self, id: u64) {
        let Some(at) = self.open.get_mut(&id) else {
            return;
        };
        at.waiting = false;
        self.waiting.remove(&at.ticket);
        self.large.remove(&at.ticket);
        if let Some(address) = self.addresses.get_mut(&at.block) {
            address.waiting.remove(&at.ticket);
        }
    }

    /// Its client has done its part: if it is waited for again, it is at the end of the queue.
    fn renew(&mut self, id: u64) {
        let waiting = self.open.get(&id).is_some_and(|at| at.waiting);
        self.stop_waiting(id);
        let ticket = self.next();
        if let Some(at) = self.open.get_mut(&id) {
            at.ticket = ticket;
        }
        if waiting {
            self.wait(id);
        }
    }

    fn hold(&mut self, id: u64, held: usize) {
        let Some(at) = self.open.get_mut(&id) else {
            return;
        };
        self.held -= at.held.saturating_sub(SMALL);
        at.held = held;
        self.held += held.saturating_sub(SMALL);
        if held > SMALL && at.waiting {
            self.large.insert(at.ticket, id);
        } else {
            self.large.remove(&at.ticket);
        }
    }

    fn remove(&mut self, id: u64) {
        self.hold(id, 0);
        self.stop_waiting(id);
        self.uncount(id);
        self.open.remove(&id);
    }

    fn uncount(&mut self, id: u64) {
        let Some(at) = self.open.get_mut(&id) else {
            return;
        };
        if std::mem::take(&mut at.counted)
            && let Some(address) = self.addresses.get_mut(&at.block)
        {
            address.open -= 1;
            if address.open == 0 && address.handshakes == 0 {
                self.addresses.remove(&at.block);
            }
        }
    }

    /// Takes its place away; its task ends it as soon as it runs.
    fn evict(&mut self, id: u64, why: &'static str) {
        if let Some(at) = self.open.get(&id) {
            at.changed.notify_one();
            self.going += 1;
        }
        self.remove(id);
        metrics::counter!(HTTP_EVICTED, "why" => why).increment(1);
    }
}

impl Seat {
    pub(super) fn phase(&self) -> Phase {
        match self.phase.load(Ordering::Relaxed) {
            0 => Phase::Idle,
            1 => Phase::Head,
            2 => Phase::Switching,
            3 => Phase::Working,
            4 => Phase::Asked,
            _ => Phase::Upgraded,
        }
    }

    /// Number of the request that is under way.
    fn request(&self) -> u64 {
        self.request.load(Ordering::Relaxed)
    }

    fn change(&self, phase: Phase, change: impl FnOnce(&mut Inner, u64)) {
        self.change_in(self.request(), phase, change);
    }

    /// A change that the request of this number brings about.
    fn change_in(&self, request: u64, phase: Phase, change: impl FnOnce(&mut Inner, u64)) {
        {
            let mut inner = self.all.lock();
            if self.phase() == Phase::Upgraded || self.request() != request {
                return;
            }
            self.phase.store(phase as u8, Ordering::Relaxed);
            change(&mut inner, self.id);
        }
        // Its task looks at its deadline again.
        self.changed.notify_one();
    }

    fn deadline(inner: &mut Inner, id: u64, after: Option<Duration>) {
        if let Some(at) = inner.open.get_mut(&id) {
            at.deadline = after.map(|after| Instant::now() + after);
            at.resting = None;
        }
    }

    /// The TLS handshake is done: the first request has its own time.
    pub(super) fn secured(&self) {
        let header = self.all.bounds.load().header;
        self.change(Phase::Idle, |inner, id| {
            Self::deadline(inner, id, Some(header));
        });
    }

    /// Bytes came in that nobody has made a request of yet.
    pub(super) fn received(&self, bytes: usize) {
        let header = self.all.bounds.load().header;
        match self.phase() {
            Phase::Idle => self.change(Phase::Head, |inner, id| {
                inner.renew(id);
                inner.hold(id, bytes);
                Self::deadline(inner, id, Some(header));
            }),
            Phase::Head => self.hold_more(bytes),
            Phase::Switching | Phase::Working | Phase::Asked | Phase::Upgraded => {}
        }
    }

    /// So many more bytes of an unfinished request are in memory. Where that is too much, whoever has kept us waiting longest with
    /// a large one goes, which may be this one.
    pub(super) fn hold_more(&self, bytes: usize) {
        let mut inner = self.all.lock();
        let held = inner.open.get(&self.id).map_or(0, |at| at.held);
        inner.hold(self.id, held + bytes);
        while inner.held > self.all.memory {
            let Some((_, &id)) = inner.large.first_key_value() else {
                return;
            };
            inner.evict(id, "memory");
        }
    }

    /// A request's head is complete. Returns whether it is a large one.
    pub(super) fn working(&self, plain: bool) -> bool {
        let mut large = false;
        let phase = if plain {
            Phase::Working
        } else {
            Phase::Switching
        };
        self.change(phase, |inner, id| {
            large = inner.open.get(&id).is_some_and(|at| at.held > SMALL);
            inner.hold(id, 0);
            inner.stop_waiting(id);
            Self::deadline(inner, id, None);
        });
        large
    }

    /// More of the body of this request came.
    fn came(&self, request: u64) {
        self.change_in(request, Phase::Working, |inner, id| {
            inner.stop_waiting(id);
            Self::deadline(inner, id, None);
        });
    }

    /// More of the body of this request is waited for.
    fn waits(&self, request: u64) {
        let time = if self.half_closed.load(Ordering::Relaxed) {
            BROKEN_OFF
        } else {
            self.all.bounds.load().header
        };
        self.change_in(request, Phase::Working, |inner, id| {
            inner.wait(id);
            Self::deadline(inner, id, Some(time));
        });
        self.all.freed.notify_one();
    }

    /// All of this request, a plain one, is here.
    fn asked(&self, request: u64) {
        self.change_in(request, Phase::Asked, |inner, id| {
            inner.hold(id, 0);
            inner.stop_waiting(id);
            Self::deadline(inner, id, None);
        });
    }

    /// The body of this request is read into memory, in a time of the reader's own.
    pub(super) fn collects(&self) {
        self.change(Phase::Working, |inner, id| {
            inner.wait(id);
            Self::deadline(inner, id, None);
        });
        self.all.freed.notify_one();
    }

    /// All of it is here.
    pub(super) fn collected(&self) {
        self.asked(self.request());
    }

    /// The client has ended its side while it waits for its answer.
    fn half_closed(&self) {
        self.half_closed.store(true, Ordering::Relaxed);
        let mut inner = self.all.lock();
        if let Some(at) = inner.open.get_mut(&self.id)
            && at.deadline.is_none()
        {
            at.deadline = Some(Instant::now() + HALF_CLOSED);
            self.changed.notify_one();
        }
    }

    /// The client takes nothing of its answer (`true`), or goes on.
    fn stalled(&self, stalled: bool) {
        {
            let mut inner = self.all.lock();
            match (self.phase(), stalled) {
                (Phase::Working | Phase::Asked, true) => {
                    inner.wait(self.id);
                    Self::deadline(&mut inner, self.id, Some(STALL));
                }
                // Its own body may be waited for.
                (Phase::Working, false) => {
                    Self::deadline(&mut inner, self.id, Some(self.all.bounds.load().header));
                }
                (Phase::Asked, false) => {
                    inner.stop_waiting(self.id);
                    Self::deadline(&mut inner, self.id, None);
                }
                (Phase::Idle | Phase::Head | Phase::Switching | Phase::Upgraded, _) => return,
            }
        }
        self.changed.notify_one();
        self.all.freed.notify_one();
    }

    /// An answer is complete.
    pub(super) fn answered(&self) {
        let rest = self.all.bounds.load().rest;
        self.change(Phase::Idle, |inner, id| {
            inner.hold(id, 0);
            inner.stop_waiting(id);
            inner.renew(id);
            inner.wait(id);
            Self::deadline(inner, id, Some(rest));
            if let Some(at) = inner.open.get_mut(&id) {
                at.resting = Some(Instant::now());
            }
            self.request.fetch_add(1, Ordering::Relaxed);
        });
        self.all.freed.notify_one();
    }

    /// It has become a session or the like, which has limits of its own.
    pub(super) fn upgraded(&self) {
        self.change(Phase::Upgraded, |inner, id| {
            inner.hold(id, 0);
            inner.stop_waiting(id);
            inner.uncount(id);
            Self::deadline(inner, id, None);
        });
    }

    /// Waits until its client's time is over or its place is needed.
    pub(super) async fn due(&self) -> Due {
        loop {
            let deadline = {
                let mut inner = self.all.lock();
                let Some(at) = inner.open.get_mut(&self.id) else {
                    return Due::Over;
                };
                match at.deadline {
                    Some(deadline) if deadline <= Instant::now() => {
                        let Some(since) = at.resting.take() else {
                            return Due::Over;
                        };
                        at.deadline = Some(since + self.all.bounds.load().keep_alive);
                        return Due::Rest;
                    }
                    deadline => deadline,
                }
            };
            match deadline {
                Some(deadline) => tokio::select! {
                    () = sleep_until(deadline) => {}
                    () = self.changed.notified() => {}
                },
                None => self.changed.notified().await,
            }
        }
    }

    /// Whether its address may have one more handshake under way; it has as long as what is returned lives.
    pub(super) fn handshake(self: &Arc<Self>) -> Option<Share> {
        let bounds = self.all.bounds.load();
        let mut inner = self.all.lock();
        let block = inner.open.get(&self.id)?.block;
        let address = inner.addresses.entry(block).or_default();
        if bounds.per_address > 0 && address.handshakes >= bounds.handshakes_per_address {
            return None;
        }
        address.handshakes += 1;
        drop(inner);
        Some(Share {
            all: self.all.clone(),
            block,
        })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut inner = self.all.lock();
        // It had to go before.
        if !inner.open.contains_key(&self.id) {
            inner.going = inner.going.saturating_sub(1);
        }
        inner.remove(self.id);
        drop(inner);
        self.all.gone.notify_one();
        self.all.freed.notify_one();
    }
}

/// A handshake of an address.
pub(super) struct Share {
    all: Arc<Connections>,
    block: Block,
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut inner = self.all.lock();
        if let Some(address) = inner.addresses.get_mut(&self.block) {
            address.handshakes -= 1;
            if address.open == 0 && address.handshakes == 0 {
                inner.addresses.remove(&self.block);
            }
        }
    }
}

mod watched;
pub(super) use watched::{Answer, Upload, Watched};

#[cfg(test)]
mod tests;
