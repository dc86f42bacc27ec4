//! The ICE-lite side of a client leg (RFC 8445 section 2.5): answers connectivity checks, learns
//! the client's addresses from them and follows its nominations. Of itself it sends one check on
//! each new path, see [`LiteAgent::nudge`].

use crate::description::Creds;
use is::Sha1HmacProvider;
use is::stun::{StunMessage, TransId};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// A way between one of our sockets and a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Path {
    /// Our address.
    pub local: SocketAddr,
    /// The peer's.
    pub remote: SocketAddr,
    /// ICE-TCP (RFC 6544) instead of UDP.
    pub tcp: bool,
}

/// An agent remembers so many paths of a client; more evict the one unheard of for longest.
/// A client has a path per interface and address family, and one more per NAT rebinding.
const MAX_PATHS: usize = 16;

/// A nomination of lower priority is followed only when the selected path has been without checks
/// for so long. Browsers check a good path every 2.5 s at the least.
const STALE_PATH: Duration = Duration::from_secs(3);

/// Bytes of a check or answer at the most. ICE's have 100 to 200; USERNAME may have 512 (RFC 8489 section 14.3), and nothing that comes
/// unasked for should need more than an IPv6 packet of the smallest MTU.
const MAX_MESSAGE: usize = 1232;

/// Attributes of a check or answer at the most. Browsers and Pion send six to nine.
const MAX_ATTRIBUTES: usize = 24;

/// STUN's magic cookie (RFC 8489 section 5).
const COOKIE: [u8; 4] = [0x21, 0x12, 0xa4, 0x42];

/// Types of attributes (RFC 8489 section 18.3, RFC 8445 section 20.1).
mod attribute {
    pub(super) const MAPPED_ADDRESS: u16 = 0x0001;
    pub(super) const USERNAME: u16 = 0x0006;
    pub(super) const MESSAGE_INTEGRITY: u16 = 0x0008;
    pub(super) const UNKNOWN_ATTRIBUTES: u16 = 0x000a;
    pub(super) const ALTERNATE_SERVER: u16 = 0x8023;
    pub(super) const FINGERPRINT: u16 = 0x8028;
    pub(super) const NETWORK_COST: u16 = 0xc057;
}

/// What is read of a STUN message before anything of it is believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Glance<'a> {
    username: Option<&'a [u8]>,
    /// A MESSAGE-INTEGRITY is where it has to be.
    signed: bool,
}

impl<'a> Glance<'a> {
    /// Looks at a datagram as a stranger's: lengths that add up, attributes that are whole and few.
    /// Nothing is allocated and nothing hashed. `None`: it is no check or answer of ICE, and no parser need see it.
    pub(crate) fn of(datagram: &'a [u8]) -> Option<Self> {
        let (header, mut rest) = datagram.split_first_chunk::<20>()?;
        if datagram.len() > MAX_MESSAGE || header[0] > 3 || header[4..8] != COOKIE {
            return None;
        }
        let len = usize::from(u16::from_be_bytes([header[2], header[3]]));
        if len != rest.len() || len % 4 != 0 {
            return None;
        }
        let mut glance = Self {
            username: None,
            signed: false,
        };
        for _ in 0..MAX_ATTRIBUTES {
            let Some((&[t1, t0, l1, l0], tail)) = rest.split_first_chunk() else {
                return Some(glance);
            };
            let len = usize::from(u16::from_be_bytes([l1, l0]));
            let value = tail.get(..len)?;
            rest = tail.get(len.next_multiple_of(4)..)?;
            match u16::from_be_bytes([t1, t0]) {
                attribute::FINGERPRINT if len == 4 => {}
                attribute::FINGERPRINT => return None,
                // What stands behind the signature isn't signed, and nobody reads it (RFC 8489 section 14.5).
                _ if glance.signed => {}
                attribute::MESSAGE_INTEGRITY if len == 20 => glance.signed = true,
                attribute::USERNAME if glance.username.is_none() => glance.username = Some(value),
                // Not of ICE; of these `is` would write a line into the log for each.
                attribute::MAPPED_ADDRESS
                | attribute::UNKNOWN_ATTRIBUTES
                | attribute::ALTERNATE_SERVER
                | attribute::MESSAGE_INTEGRITY
                | attribute::USERNAME => return None,
                attribute::NETWORK_COST if len != 4 => return None,
                _ => {}
            }
        }
        rest.is_empty().then_some(glance)
    }

    /// The fragment in front of the colon: of a request, of whom it is for.
    fn addressed(&self) -> Option<&'a str> {
        let username = std::str::from_utf8(self.username?).ok()?;
        username.split_once(':').map(|(local, _)| local)
    }

    /// Whether it can be authentic.
    pub(crate) fn is_signed(&self) -> bool {
        self.signed
    }
}

#[derive(Debug)]
struct Seen {
    path: Path,
    /// Of the credentials of the last check: they count up.
    generation: u64,
    priority: u32,
    last_check: Instant,
    /// In that generation.
    nominated: bool,
    nudged: bool,
}

/// What a check led to.
#[derive(Debug, PartialEq, Eq)]
pub enum Checked {
    /// Not for us, or not authentic: nothing was answered.
    Ignored,
    /// Answered; the response is in the buffer given.
    Answered {
        /// The path was heard of for the first time.
        new_path: bool,
        /// The path to send on changed to this one.
        selected: Option<Path>,
        /// There was no room to remember the new path without forgetting this one.
        forgotten: Option<Path>,
    },
}

/// An ICE-lite agent over any number of paths.
#[derive(Debug, Default)]
pub struct LiteAgent {
    /// Current generation first; the one before it stays valid until the client has used the
    /// current one, because its checks cross our answer on the way.
    generations: Vec<Creds>,
    /// How often the client has begun to use new ones.
    generation: u64,
    seen: Vec<Seen>,
    remote: Option<Creds>,
    selected: Option<Path>,
    last_check: Option<Instant>,
}

/// PRIORITY of the check that a lite agent sends: a peer-reflexive candidate's (RFC 8445 section
/// 5.1.2.1), which is what its path would be to the client if it did not know our candidate.
const NUDGE_PRIORITY: u32 = (110 << 24) + (65535 << 8) + 255;

impl LiteAgent {
    /// Takes the client's credentials.
    pub fn set_remote(&mut self, creds: &Creds) {
        self.remote = Some(creds.clone());
    }

    /// A check of our own for a path that the client has just used. A lite agent need not send
    /// any, but Pion nominates a pair only when it receives a check on it, or on a timer of 200 ms
    /// (pion/ice `controllingSelector`), and a join waits for that. The answer tells nothing that
    /// the client's own check has not told, so it is ignored, as are losses.
    ///
    /// Writes it to `request` and returns its path; call until there is none. Checks may come before
    /// the client's answer with its credentials: their paths wait for it.
    pub fn nudge(&mut self, request: &mut Vec<u8>) -> Option<Path> {
        let (Some(local), Some(remote)) = (self.generations.first(), &self.remote) else {
            return None;
        };
        let seen = self.seen.iter_mut().find(|seen| !seen.nudged)?;
        seen.nudged = true;
        let path = seen.path;
        let hmac = |key: &[u8], parts: &[&[u8]]| is::DefaultSha1HmacProvider.sha1_hmac(key, parts);
        let username = format!("{}:{}", remote.ufrag, local.ufrag);
        // The tie-breaker decides nothing: a lite agent is never in a role conflict that it wins.
        let check = StunMessage::binding_request(
            &username,
            TransId::new(),
            false,
            u64::from(path.remote.port()),
            NUDGE_PRIORITY,
            false,
        );
        // 20 header, USERNAME of at most 516, four attributes of at most 24, FINGERPRINT 8.
        request.resize(1024, 0);
        let len = check
            .to_bytes(Some(remote.pwd.as_bytes()), request, hmac)
            .ok()?;
        request.truncate(len);
        Some(path)
    }

    /// Takes new local credentials: the start of the session, or an ICE restart.
    pub fn set_local(&mut self, creds: &Creds) {
        if self.generations.first() != Some(creds) {
            self.generations.retain(|old| old != creds);
            self.generations.insert(0, creds.clone());
            self.generations.truncate(2);
        }
    }

    /// Local username fragments under which checks may come.
    pub fn ufrags(&self) -> impl Iterator<Item = &str> {
        self.generations.iter().map(|creds| creds.ufrag.as_str())
    }

    /// Where to send.
    #[must_use]
    pub fn selected(&self) -> Option<Path> {
        self.selected
    }

    /// When the client last proved its consent (RFC 7675) with a check.
    #[must_use]
    pub fn last_check(&self) -> Option<Instant> {
        self.last_check
    }

    /// Whether `path` has passed a check.
    #[must_use]
    pub fn knows(&self, path: &Path) -> bool {
        self.seen.iter().any(|seen| seen.path == *path)
    }

    /// Answers a STUN datagram that came over `path`, writing the response to `response`. Only
    /// binding requests with one of our username fragments and a matching MESSAGE-INTEGRITY are
    /// answered.
    pub fn handle(
        &mut self,
        now: Instant,
        path: Path,
        datagram: &[u8],
        response: &mut Vec<u8>,
    ) -> Checked {
        let Some(glance) = Glance::of(datagram).filter(Glance::is_signed) else {
            return Checked::Ignored;
        };
        let Some(generation) = glance.addressed().and_then(|local| {
            let is_ours = |creds: &Creds| creds.ufrag == local;
            self.generations.iter().position(is_ours)
        }) else {
            return Checked::Ignored;
        };
        let Ok(message) = StunMessage::parse(datagram) else {
            return Checked::Ignored;
        };
        if !message.is_binding_request() {
            return Checked::Ignored;
        }
        let hmac = |key: &[u8], parts: &[&[u8]]| is::DefaultSha1HmacProvider.sha1_hmac(key, parts);
        let pwd = self.generations[generation].pwd.as_bytes();
        if !message.verify(pwd, hmac) {
            return Checked::Ignored;
        }
        // 20 header + 24 XOR-MAPPED-ADDRESS (IPv6) + 24 MESSAGE-INTEGRITY + 8 FINGERPRINT.
        response.resize(128, 0);
        let reply = StunMessage::binding_reply(message.trans_id(), path.remote);
        match reply.to_bytes(Some(pwd), response, hmac) {
            Ok(len) => response.truncate(len),
            Err(_) => return Checked::Ignored,
        }
        if generation == 0 && self.generations.len() > 1 {
            self.generations.truncate(1);
            self.generation += 1;
        }
        self.last_check = Some(now);
        let (new_path, forgotten) = self.note(
            now,
            path,
            message.prio().unwrap_or(0),
            message.use_candidate(),
        );
        let before = self.selected;
        if message.use_candidate() {
            self.nominate(now, path);
        } else if self.selected.is_none() {
            // Nothing nominated yet: media that is ready goes back the way the first check came.
            self.selected = Some(path);
        }
        Checked::Answered {
            new_path,
            selected: (self.selected != before).then_some(self.selected).flatten(),
            forgotten,
        }
    }

    fn note(
        &mut self,
        now: Instant,
        path: Path,
        priority: u32,
        nominated: bool,
    ) -> (bool, Option<Path>) {
        if let Some(seen) = self.seen.iter_mut().find(|seen| seen.path == path) {
            seen.last_check = now;
            seen.priority = priority;
            seen.nominated = nominated || seen.nominated && seen.generation == self.generation;
            seen.generation = self.generation;
            return (false, None);
        }
        let mut forgotten = None;
        if self.seen.len() >= MAX_PATHS {
            let selected = self.selected;
            if let Some(oldest) = self
                .seen
                .iter()
                .enumerate()
                .filter(|(_, seen)| Some(seen.path) != selected)
                .min_by_key(|(_, seen)| seen.last_check)
                .map(|(index, _)| index)
            {
                forgotten = Some(self.seen.swap_remove(oldest).path);
            }
        }
        self.seen.push(Seen {
            path,
            generation: self.generation,
            priority,
            last_check: now,
            nominated,
            nudged: false,
        });
        (true, forgotten)
    }

    /// Firefox nominates every pair that works, again and again, so priority decides among live
    /// paths (RFC 8445 section 8.1.1 for aggressive nomination); Chromium nominates one and moves
    /// by nominating another, so a path without checks gives way. An ICE restart begins anew (RFC 8445 section 9): its first
    /// nomination is followed at once, however good the path was that the client may just have lost.
    fn nominate(&mut self, now: Instant, path: Path) {
        let find = |path: &Path| self.seen.iter().find(|seen| seen.path == *path);
        let follow = match (self.selected.as_ref().and_then(find), find(&path)) {
            (None, _) => true,
            (Some(_), None) => false,
            (Some(current), Some(new)) if new.generation != current.generation => {
                new.generation > current.generation
            }
            (Some(current), Some(new)) => {
                !current.nominated
                    || now.duration_since(current.last_check) >= STALE_PATH
                    || new.priority >= current.priority
            }
        };
        if follow {
            self.selected = Some(path);
        }
    }

    /// Media that the peer's keys authenticated came over `path`: a nominated path that the peer
    /// really sends on beats the selected one once that is silent.
    pub fn media_on(&mut self, now: Instant, path: Path) {
        if self.selected == Some(path) {
            return;
        }
        if self
            .seen
            .iter()
            .any(|seen| seen.path == path && seen.nominated)
        {
            self.nominate(now, path);
        }
    }

    /// Forgets a path whose transport is gone (a closed ICE-TCP connection). Was it the selected one, media goes on the one that was
    /// nominated and checked last since the last ICE restart, or else on the one checked last: a client that has restarted may have
    /// checked its paths and nominated none anew, and until it does there is nothing better.
    pub fn forget(&mut self, path: &Path) {
        self.seen.retain(|seen| seen.path != *path);
        if self.selected == Some(*path) {
            let nominated = |seen: &Seen| seen.nominated && seen.generation == self.generation;
            self.selected = self
                .seen
                .iter()
                .max_by_key(|seen| (nominated(seen), seen.last_check, seen.priority))
                .map(|seen| seen.path);
        }
    }
}

/// The local username fragment that a binding request is addressed to, read without checking
/// anything else: what tells sessions apart on a muxed port.
#[must_use]
pub fn addressed_ufrag(datagram: &[u8]) -> Option<&str> {
    if datagram.get(..2) != Some(&[0, 1]) {
        return None;
    }
    Glance::of(datagram)?.addressed()
}

#[cfg(test)]
mod tests {
    // A starting point for the virtual clock, nothing is measured by it.
    #![allow(clippy::unwrap_used, clippy::disallowed_methods)]
    use super::*;
    use is::stun::TransId;
    use proptest::prelude::*;

    fn creds(n: u8) -> Creds {
        Creds {
            ufrag: format!("ufrag{n}"),
            pwd: format!("password-password-pass{n}"),
        }
    }

    fn path(port: u16) -> Path {
        Path {
            local: "127.0.0.1:7982".parse().unwrap(),
            remote: ([127, 0, 0, 1], port).into(),
            tcp: false,
        }
    }

    fn check(creds: &Creds, priority: u32, nominate: bool) -> Vec<u8> {
        let username = format!("{}:peer", creds.ufrag);
        let message =
            StunMessage::binding_request(&username, TransId::new(), true, 7, priority, nominate);
        let mut bytes = vec![0; 256];
        let len = message
            .to_bytes(Some(creds.pwd.as_bytes()), &mut bytes, |key, parts| {
                is::DefaultSha1HmacProvider.sha1_hmac(key, parts)
            })
            .unwrap();
        bytes.truncate(len);
        bytes
    }

    fn agent() -> LiteAgent {
        let mut agent = LiteAgent::default();
        agent.set_local(&creds(1));
        agent
    }

    #[test]
    fn only_authentic_checks_are_answered() {
        let (mut agent, mut out, now) = (agent(), vec![], Instant::now());
        let mut forged = creds(1);
        forged.pwd.push('x');
        for request in [
            check(&creds(2), 1, true),
            check(&forged, 1, true),
            vec![0; 20],
        ] {
            assert_eq!(
                agent.handle(now, path(1), &request, &mut out),
                Checked::Ignored
            );
        }
        assert_eq!(agent.selected(), None);
        let request = check(&creds(1), 1, true);
        assert_eq!(addressed_ufrag(&request), Some("ufrag1"));
        assert_eq!(
            agent.handle(now, path(1), &request, &mut out),
            Checked::Answered {
                new_path: true,
                selected: Some(path(1)),
                forgotten: None
            }
        );
        let reply = StunMessage::parse(&out).unwrap();
        assert_eq!(reply.mapped_address(), Some(path(1).remote));
    }

    #[test]
    fn repeated_nominations_of_all_pairs_settle_on_the_best() {
        let (mut agent, mut out, now) = (agent(), vec![], Instant::now());
        for _ in 0..3 {
            agent.handle(now, path(1), &check(&creds(1), 50, true), &mut out);
            agent.handle(now, path(2), &check(&creds(1), 90, true), &mut out);
            agent.handle(now, path(3), &check(&creds(1), 10, true), &mut out);
        }
        assert_eq!(agent.selected(), Some(path(2)));
    }

    #[test]
    fn a_worse_path_takes_over_when_the_better_one_falls_silent() {
        let (mut agent, mut out, start) = (agent(), vec![], Instant::now());
        agent.handle(start, path(1), &check(&creds(1), 90, true), &mut out);
        let later = start + STALE_PATH;
        agent.handle(later, path(2), &check(&creds(1), 10, true), &mut out);
        assert_eq!(agent.selected(), Some(path(2)));
    }

    #[test]
    fn an_ice_restart_accepts_both_generations_until_the_new_one_is_used() {
        let (mut agent, mut out, now) = (agent(), vec![], Instant::now());
        agent.set_local(&creds(2));
        agent.set_local(&creds(2));
        let answered = |agent: &mut LiteAgent, n, out: &mut Vec<u8>| {
            agent.handle(now, path(1), &check(&creds(n), 1, true), out) != Checked::Ignored
        };
        assert!(answered(&mut agent, 1, &mut out));
        assert!(answered(&mut agent, 2, &mut out));
        assert!(!answered(&mut agent, 1, &mut out));
    }

    /// Wi-Fi is lost, the client restarts ICE and nominates its mobile path, of a lower priority.
    #[test]
    fn a_nomination_after_an_ice_restart_is_followed_at_once() {
        let (mut agent, mut out, start) = (agent(), vec![], Instant::now());
        agent.handle(start, path(1), &check(&creds(1), 90, true), &mut out);
        agent.set_local(&creds(2));
        let later = start + Duration::from_millis(1500);
        // A check alone changes nothing: media goes on where it went (RFC 8445 section 9).
        agent.handle(later, path(2), &check(&creds(2), 10, false), &mut out);
        assert_eq!(agent.selected(), Some(path(1)));
        agent.handle(later, path(2), &check(&creds(2), 10, true), &mut out);
        assert_eq!(agent.selected(), Some(path(2)));
        // What was still on its way on the old path doesn't take media back, nor when the new one has been silent.
        agent.media_on(later, path(1));
        agent.media_on(later + STALE_PATH, path(1));
        assert_eq!(agent.selected(), Some(path(2)));
        // Within the new generation it is by priority again.
        agent.handle(later, path(1), &check(&creds(2), 90, false), &mut out);
        assert_eq!(agent.selected(), Some(path(2)), "checked but not nominated");
        agent.handle(later, path(1), &check(&creds(2), 90, true), &mut out);
        assert_eq!(agent.selected(), Some(path(1)));
        agent.handle(later, path(2), &check(&creds(2), 10, true), &mut out);
        assert_eq!(agent.selected(), Some(path(1)));
    }

    #[test]
    fn when_the_selected_path_closes_after_a_restart_media_goes_on_the_one_checked_last() {
        let (mut agent, mut out, start) = (agent(), vec![], Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        let tcp = Path {
            tcp: true,
            ..path(9)
        };
        agent.handle(start, path(1), &check(&creds(1), 50, true), &mut out);
        agent.handle(start, path(2), &check(&creds(1), 40, true), &mut out);
        agent.handle(start, tcp, &check(&creds(1), 90, true), &mut out);
        agent.set_local(&creds(2));
        // All are checked anew, the best is nominated first, and closes before the others are.
        agent.handle(at(10), tcp, &check(&creds(2), 90, true), &mut out);
        agent.handle(at(20), path(1), &check(&creds(2), 50, false), &mut out);
        agent.handle(at(30), path(2), &check(&creds(2), 40, false), &mut out);
        assert_eq!(agent.selected(), Some(tcp));
        agent.forget(&tcp);
        assert_eq!(agent.selected(), Some(path(2)));
        // The first nomination is followed, whatever its priority; and one that has it goes before one that has been checked.
        agent.handle(at(40), path(1), &check(&creds(2), 50, true), &mut out);
        assert_eq!(agent.selected(), Some(path(1)));
        agent.handle(at(50), tcp, &check(&creds(2), 90, true), &mut out);
        agent.handle(at(60), path(2), &check(&creds(2), 40, false), &mut out);
        agent.forget(&tcp);
        assert_eq!(agent.selected(), Some(path(1)));
        agent.forget(&path(1));
        agent.forget(&path(2));
        assert_eq!(agent.selected(), None);
    }

    #[test]
    fn a_nomination_on_the_same_path_after_a_restart_keeps_it() {
        let (mut agent, mut out, now) = (agent(), vec![], Instant::now());
        agent.handle(now, path(1), &check(&creds(1), 90, true), &mut out);
        for n in 2..5 {
            agent.set_local(&creds(n));
            // Checks that crossed the answer are of the generation before and decide nothing.
            agent.handle(now, path(2), &check(&creds(n - 1), 10, true), &mut out);
            assert_eq!(agent.selected(), Some(path(1)));
            agent.handle(now, path(1), &check(&creds(n), 90, true), &mut out);
            assert_eq!(agent.selected(), Some(path(1)));
        }
    }

    #[test]
    fn a_glance_tells_what_can_be_a_check() {
        let good = check(&creds(1), 1, true);
        let glance = Glance::of(&good).unwrap();
        assert!(glance.is_signed());
        assert_eq!(glance.addressed(), Some("ufrag1"));
        for len in 0..good.len() {
            assert_eq!(Glance::of(&good[..len]), None, "cut at {len}");
        }
        // Attributes of their own, in front of the signature.
        let with = |attributes: &[u8]| {
            let mut message = good[..20].to_vec();
            message.extend(attributes);
            message.extend(&good[20..]);
            let len = u16::try_from(message.len() - 20).unwrap();
            message[2..4].copy_from_slice(&len.to_be_bytes());
            message
        };
        assert!(Glance::of(&with(&[0x80, 0x22, 0, 3, b'p', b'i', b'o', 0])).is_some());
        // What is written into the log for each, longer than the message, a second signature or name, and too much.
        for odd in [
            &[0, 1, 0, 0][..],
            &[0, 0x0a, 0, 0],
            &[0x80, 0x23, 0, 0],
            &[0xc0, 0x57, 0, 0],
            &[0x80, 0x22, 0x10, 0],
            &[0, 6, 0, 0],
            &[0, 8, 0, 0],
            &[0xc0, 0x01, 0, 0].repeat(MAX_ATTRIBUTES),
            &[&[0xc0, 0x01, 0x04, 0xd0][..], &[0; 1232]].concat(),
        ] {
            assert_eq!(Glance::of(&with(odd)), None, "{odd:?}");
        }
        // Behind it nothing counts: nobody signed it.
        let mut message = good.clone();
        message.extend([0, 1, 0, 0]);
        let len = u16::try_from(message.len() - 20).unwrap();
        message[2..4].copy_from_slice(&len.to_be_bytes());
        assert!(Glance::of(&message).is_some());
    }

    #[test]
    fn each_path_is_nudged_once_and_waits_for_the_clients_credentials() {
        let (mut agent, mut out, now) = (agent(), vec![], Instant::now());
        agent.handle(now, path(1), &check(&creds(1), 1, false), &mut out);
        assert_eq!(agent.nudge(&mut out), None, "nobody to sign for yet");
        agent.set_remote(&creds(9));
        assert_eq!(agent.nudge(&mut out), Some(path(1)));
        let nudge = StunMessage::parse(&out).unwrap();
        assert_eq!(nudge.split_username(), Some(("ufrag9", "ufrag1")));
        assert!(!nudge.use_candidate());
        agent.handle(now, path(1), &check(&creds(1), 1, true), &mut out);
        assert_eq!(agent.nudge(&mut out), None);
        agent.handle(now, path(2), &check(&creds(1), 1, true), &mut out);
        assert_eq!(agent.nudge(&mut out), Some(path(2)));
    }

    #[test]
    fn paths_are_bounded() {
        let (mut agent, mut out, now) = (agent(), vec![], Instant::now());
        for port in 1..200 {
            agent.handle(now, path(port), &check(&creds(1), 1, port == 1), &mut out);
        }
        assert!(agent.seen.len() <= MAX_PATHS);
        assert_eq!(agent.selected(), Some(path(1)));
    }

    proptest! {
        #[test]
        fn garbage_is_ignored(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), shape in any::<bool>()) {
            if shape && bytes.len() >= 20 {
                bytes[..2].copy_from_slice(&[0, 1]);
                bytes[4..8].copy_from_slice(&[0x21, 0x12, 0xa4, 0x42]);
                let len = u16::try_from(bytes.len() - 20).unwrap();
                bytes[2..4].copy_from_slice(&len.to_be_bytes());
            }
            let _ = addressed_ufrag(&bytes);
            // No parser sees what a glance refuses, and what it admits doesn't end it.
            if Glance::of(&bytes).is_some() {
                let _ = StunMessage::parse(&bytes);
            }
            let mut out = vec![];
            prop_assert_eq!(agent().handle(Instant::now(), path(1), &bytes, &mut out), Checked::Ignored);
        }
    }
}
