//! Two ends, the sidecar's own session and relay between them, and the networks that join them,
//! all on one virtual clock.

use crate::net::{Netem, Rng};
use crate::peer::Peer;
use crate::sdp::{
    self, CLIENT_AUDIO_SSRC, CLIENT_CID, CLIENT_VIDEO_SSRC, Content, Described, OTHER_SID,
    SERVER_AUDIO_SSRC, SERVER_VIDEO_SSRC,
};
use auralink_proto::coding::{EngineRungs, Job, Outcome};
use auralink_proto::description::{HostCandidate, PcDescription, Target};
use auralink_proto::dtls::Identity;
use auralink_proto::leg::LegState;
use auralink_proto::policy::Policy;
use auralink_proto::relay::{Now, Relay, RelayEvent, Scratch, Side, Transmit};
use auralink_proto::session::{Env, Session, SessionConfig};
use auralink_proto::signal::wire::{Fields, Value, write_bytes, write_uint};
use auralink_proto::signal::{Frame, Verdict};
use auralink_proto::stun::Path;
use rtc_dtls::extension::extension_use_srtp::SrtpProtectionProfile;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashSet};
use std::fmt::Write;
use std::net::SocketAddr;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

/// One certificate for every world, as a process has one.
static IDENTITY: LazyLock<Identity> = LazyLock::new(|| Identity::generate().expect("certificate"));

pub(crate) const GCM: SrtpProtectionProfile = SrtpProtectionProfile::Srtp_Aead_Aes_128_Gcm;
pub(crate) const CM: SrtpProtectionProfile = SrtpProtectionProfile::Srtp_Aes128_Cm_Hmac_Sha1_80;

pub(crate) fn addr(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

/// Where clients reach the sidecar.
pub(crate) fn front() -> SocketAddr {
    addr("203.0.113.7:7982")
}

/// The socket of the server leg.
pub(crate) fn back() -> SocketAddr {
    addr("10.1.0.1:40000")
}

pub(crate) fn client_addr() -> SocketAddr {
    addr("198.51.100.2:5000")
}

pub(crate) fn server_addr() -> SocketAddr {
    addr("10.1.0.2:7882")
}

enum Event {
    Datagram(SocketAddr, SocketAddr, Vec<u8>),
    /// Signalling, and where it arrives.
    ProxyFromClient(Vec<u8>),
    Server(Vec<u8>),
    ProxyFromServer(Vec<u8>),
    Client(Vec<u8>),
}

struct Due {
    at: Instant,
    order: u64,
    event: Event,
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        self.order == other.order
    }
}
impl Eq for Due {}
impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Due {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

#[derive(Default)]
struct Out(Vec<(Side, Path, Vec<u8>)>);

impl Transmit for Out {
    fn transmit(&mut self, side: Side, path: Path, datagram: &[u8]) {
        self.0.push((side, path, datagram.to_vec()));
    }
}

pub(crate) struct TestEnv {
    pub(crate) rng: Rng,
    pub(crate) bound: Vec<Target>,
}

impl Env for TestEnv {
    fn random(&mut self, bytes: &mut [u8]) {
        let random = self.rng.bytes(bytes.len());
        bytes.copy_from_slice(&random);
    }

    fn bind_server_leg(&mut self, target: Target) -> Result<Vec<SocketAddr>, String> {
        self.bound.push(target);
        Ok(vec![back()])
    }
}

/// How a world is set up.
pub(crate) struct Options {
    pub(crate) policy: Policy,
    pub(crate) target: Target,
    /// The answerer is the DTLS client, as LiveKit and browsers have it.
    pub(crate) answer_active: bool,
    pub(crate) client_profiles: Vec<SrtpProtectionProfile>,
    pub(crate) server_profiles: Vec<SrtpProtectionProfile>,
    pub(crate) client_link: Netem,
    pub(crate) server_link: Netem,
    /// Way of a signalling message from the client to the sidecar, and back.
    pub(crate) client_signal: [Duration; 2],
    /// The same between sidecar and server.
    pub(crate) server_signal: [Duration; 2],
    pub(crate) consent_timeout: Duration,
    /// The server end answers with the AIC extension where it was offered.
    pub(crate) server_takes_aic: bool,
    pub(crate) client_locals: Vec<SocketAddr>,
    pub(crate) client_stereo: bool,
    /// AddTrack says that the client encrypts its media end to end.
    pub(crate) client_encrypts: bool,
    /// Each end writes this instead of its certificate's fingerprint.
    pub(crate) false_fingerprint: Option<Side>,
}

impl Default for Options {
    fn default() -> Self {
        let ms = Duration::from_millis;
        Self {
            policy: Policy::default(),
            target: Target::Publisher,
            answer_active: true,
            client_profiles: vec![GCM, CM],
            server_profiles: vec![GCM, CM],
            client_link: Netem::clean(20),
            server_link: Netem::clean(1),
            client_signal: [ms(20); 2],
            server_signal: [ms(1); 2],
            consent_timeout: Duration::from_secs(30),
            server_takes_aic: false,
            client_locals: vec![client_addr()],
            client_stereo: false,
            client_encrypts: false,
            false_fingerprint: None,
        }
    }
}

pub(crate) struct World {
    pub(crate) seed: u64,
    pub(crate) now: Instant,
    start: Instant,
    pub(crate) rng: Rng,
    pub(crate) options: Options,
    pub(crate) client: Peer,
    pub(crate) server: Peer,
    pub(crate) session: Session,
    pub(crate) env: TestEnv,
    pub(crate) relay: Option<Relay>,
    pub(crate) description: Option<PcDescription>,
    scratch: Scratch,
    queue: BinaryHeap<Reverse<Due>>,
    order: u64,
    pub(crate) events: Vec<(Duration, RelayEvent)>,
    /// SDPs as the ends got them, oldest first.
    pub(crate) at_client: Vec<String>,
    pub(crate) at_server: Vec<String>,
    /// Signalling frames that the ends got, whole.
    pub(crate) frames_at_client: Vec<Vec<u8>>,
    pub(crate) frames_at_server: Vec<Vec<u8>>,
    /// Datagrams that left the sidecar: time, side, path, contents.
    pub(crate) sent: Vec<(Instant, Side, Path, Vec<u8>)>,
    /// Addresses whose datagrams vanish.
    pub(crate) dead: HashSet<SocketAddr>,
}

impl World {
    pub(crate) fn new(seed: u64, options: Options) -> Self {
        // The only real time: everything after it is counted.
        #[allow(clippy::disallowed_methods)]
        let start = Instant::now();
        // Only a controlled answerer makes sense against ICE-lite: towards the sidecar a client
        // always controls; a server controls where it offers.
        let server_controls = options.target == Target::Subscriber;
        let client = Peer::new(
            "client",
            &options.client_locals,
            true,
            &options.client_profiles,
        );
        let server = Peer::new(
            "server",
            &[server_addr()],
            server_controls,
            &options.server_profiles,
        );
        let session = Session::new(SessionConfig {
            rungs: auralink_proto::ladder::Rungs::ALL,
            models: Some(1),
            policy: options.policy,
            fingerprint: IDENTITY.fingerprint().to_owned(),
            client_candidates: vec![HostCandidate {
                addr: front(),
                tcp: false,
            }],
            ufrag_prefix: "00".to_owned(),
        });
        Self {
            seed,
            now: start,
            start,
            rng: Rng::new(seed),
            options,
            client,
            server,
            session,
            env: TestEnv {
                rng: Rng::new(seed ^ 0x5eed),
                bound: Vec::new(),
            },
            relay: None,
            description: None,
            scratch: Scratch::default(),
            queue: BinaryHeap::new(),
            order: 0,
            events: Vec::new(),
            at_client: Vec::new(),
            at_server: Vec::new(),
            frames_at_client: Vec::new(),
            frames_at_server: Vec::new(),
            sent: Vec::new(),
            dead: HashSet::new(),
        }
    }

    /// A world whose call is up: both ends have keys.
    pub(crate) fn connected(seed: u64, options: Options) -> Self {
        let mut world = Self::new(seed, options);
        world.join();
        assert!(
            world.run_until(30, World::up),
            "no call:\n{}",
            world.report()
        );
        // Lets the last flights and nominations settle.
        world.run(Duration::from_millis(500));
        world
    }

    /// All four ends of the two associations have keys.
    pub(crate) fn up(&self) -> bool {
        let relay = |side| {
            let relay = self.relay.as_ref();
            relay.is_some_and(|relay| relay.leg(side).state() == LegState::Established)
        };
        self.client.established_at.is_some()
            && self.server.established_at.is_some()
            && relay(Side::Client)
            && relay(Side::Server)
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.now - self.start
    }

    pub(crate) fn report(&self) -> String {
        format!(
            "seed {} at {:?}: client {:?} {:?}, server {:?} {:?}, relay {:?} / {:?}, events {:?}",
            self.seed,
            self.elapsed(),
            self.client.ice_state,
            self.client.path,
            self.server.ice_state,
            self.server.path,
            self.relay.as_ref().map(|r| r.leg(Side::Client).state()),
            self.relay.as_ref().map(|r| r.leg(Side::Server).state()),
            self.events
        )
    }

    pub(crate) fn relay(&self) -> &Relay {
        self.relay.as_ref().expect("a relay")
    }

    // Signalling.

    fn content(&self, side: Side, offered: Option<&str>) -> Content {
        let client = side == Side::Client;
        let aic = offered
            .filter(|_| !client && self.options.server_takes_aic)
            .and_then(|sdp| sdp.lines().find(|line| line.contains("aic-hint")));
        Content {
            audio_ssrc: if client {
                CLIENT_AUDIO_SSRC
            } else {
                SERVER_AUDIO_SSRC
            },
            video_ssrc: if client {
                CLIENT_VIDEO_SSRC
            } else {
                SERVER_VIDEO_SSRC
            },
            audio_track: if client { CLIENT_CID } else { OTHER_SID },
            stereo: client && self.options.client_stereo,
            media_lines: aic.map(str::to_owned).into_iter().collect(),
        }
    }

    fn written(&self, side: Side, setup: &str, offered: Option<&str>) -> String {
        let peer = match side {
            Side::Client => &self.client,
            Side::Server => &self.server,
        };
        let sdp = sdp::write(peer, setup, &self.content(side, offered));
        if self.options.false_fingerprint == Some(side) {
            let lie = format!("sha-256 {}00", "00:".repeat(31));
            return sdp.replace(&peer.fingerprint, &lie);
        }
        sdp
    }

    /// The client announces its track, the server who else is there; then the offerer offers.
    pub(crate) fn join(&mut self) {
        let mut track = Vec::new();
        write_bytes(&mut track, 1, CLIENT_CID.as_bytes());
        write_uint(&mut track, 8, 2);
        if self.options.client_encrypts {
            write_uint(&mut track, 14, 1);
        }
        self.client_says(4, &track);
        self.server_says(5, &others(OTHER_SID, 2, false));
        self.offer();
    }

    pub(crate) fn offer(&mut self) {
        match self.options.target {
            Target::Publisher => {
                let sdp = self.written(Side::Client, "actpass", None);
                self.client_says(1, &description("offer", &sdp, &[]));
            }
            Target::Subscriber => {
                let sdp = self.written(Side::Server, "actpass", None);
                self.server_says(3, &description("offer", &sdp, &[]));
            }
        }
    }

    pub(crate) fn client_says(&mut self, field: u32, message: &[u8]) {
        let mut frame = Vec::new();
        write_bytes(&mut frame, field, message);
        self.schedule(self.options.client_signal[0], Event::ProxyFromClient(frame));
    }

    pub(crate) fn server_says(&mut self, field: u32, message: &[u8]) {
        let mut frame = Vec::new();
        write_bytes(&mut frame, field, message);
        self.schedule(self.options.server_signal[1], Event::ProxyFromServer(frame));
    }

    fn at_proxy(&mut self, from: Side, frame: Vec<u8>) {
        let verdict = match from {
            Side::Client => self
                .session
                .client_frame(&mut self.env, Frame::Binary(&frame)),
            Side::Server => self
                .session
                .server_frame(&mut self.env, Frame::Binary(&frame)),
        };
        let frame = match verdict.expect("a good frame") {
            Verdict::Keep => Some(frame),
            Verdict::Binary(new) => Some(new),
            Verdict::Drop => None,
            Verdict::Text(_) => panic!("text for binary"),
        };
        while let Some(description) = self.session.poll_update() {
            self.describe(&description);
        }
        let Some(frame) = frame else {
            return;
        };
        match from {
            Side::Client => self.schedule(self.options.server_signal[0], Event::Server(frame)),
            Side::Server => self.schedule(self.options.client_signal[1], Event::Client(frame)),
        }
    }

    pub(crate) fn describe(&mut self, description: &PcDescription) {
        let now = self.clock();
        self.description = Some(description.clone());
        let consent = self.options.consent_timeout;
        let relay = self.relay.get_or_insert_with(|| {
            Relay::new(
                1,
                EngineRungs::NONE,
                now.instant,
                &IDENTITY,
                consent,
                vec![back()],
                description,
            )
        });
        let mut out = Out::default();
        relay.describe(now, description, &mut self.scratch, &mut out);
        self.after_relay(out);
    }

    /// Lets the codecs be able to do this, and answers each job that waits.
    pub(crate) fn codecs(
        &mut self,
        able: EngineRungs,
        mut answer: impl FnMut(Job) -> Option<Outcome>,
    ) {
        let now = self.clock();
        let mut out = Out::default();
        let relay = self.relay.as_mut().expect("a relay");
        relay.set_engine(now.instant, able);
        while let Some(job) = relay.poll_job() {
            if let Some(outcome) = answer(job) {
                relay.outcome(now, outcome, &mut self.scratch, &mut out);
            }
        }
        self.after_relay(out);
    }

    fn at_end(&mut self, end: Side, frame: Vec<u8>) {
        // Requests: 1 offer, 2 answer. Responses: 3 offer, 2 answer.
        let offer_field = if end == Side::Server { 1 } else { 3 };
        for field in Fields::new(&frame).map_while(Result::ok) {
            let Value::Bytes(message) = field.value else {
                continue;
            };
            if field.number == offer_field || field.number == 2 {
                let sdp = sdp_of(message);
                self.take_sdp(end, &sdp, field.number == offer_field);
            }
        }
        match end {
            Side::Client => self.frames_at_client.push(frame),
            Side::Server => self.frames_at_server.push(frame),
        }
    }

    fn take_sdp(&mut self, end: Side, sdp: &str, is_offer: bool) {
        let described = Described::read(sdp);
        let (peer, log) = match end {
            Side::Client => (&mut self.client, &mut self.at_client),
            Side::Server => (&mut self.server, &mut self.at_server),
        };
        log.push(sdp.to_owned());
        let known = peer.remote.as_ref().map(|remote| remote.ufrag.clone());
        if is_offer && known.is_some_and(|known| known != described.ufrag) {
            peer.restart();
        }
        if is_offer {
            peer.active = Some(self.options.answer_active);
        } else {
            peer.active = Some(described.setup != "active");
        }
        peer.learn(self.now, described);
        if is_offer {
            let setup = if self.options.answer_active {
                "active"
            } else {
                "passive"
            };
            let answer = self.written(end, setup, Some(sdp));
            let mids = [("0", OTHER_SID)];
            match end {
                Side::Server => self.server_says(2, &self::description("answer", &answer, &mids)),
                Side::Client => self.client_says(2, &self::description("answer", &answer, &[])),
            }
        }
        self.flush_peers();
    }

    // Network and clock.

    fn schedule(&mut self, after: Duration, event: Event) {
        self.order += 1;
        self.queue.push(Reverse(Due {
            at: self.now + after,
            order: self.order,
            event,
        }));
    }

    /// A datagram enters the network.
    pub(crate) fn post(&mut self, from: SocketAddr, to: SocketAddr, bytes: Vec<u8>) {
        if self.dead.contains(&from) || self.dead.contains(&to) {
            return;
        }
        let trace = std::env::var_os("AURALINK_TRACE").is_some();
        let link = if from == back() || to == back() {
            self.options.server_link
        } else {
            self.options.client_link
        };
        let arrivals = link.arrivals(&mut self.rng);
        if trace && bytes.first().is_some_and(|b| (20..64).contains(b)) {
            eprintln!(
                "{:?} {from} -> {to}{}: {arrivals:?}",
                self.elapsed(),
                records(&bytes)
            );
        }
        for after in arrivals {
            self.schedule(after, Event::Datagram(from, to, bytes.clone()));
        }
    }

    fn clock(&self) -> Now {
        let elapsed = Duration::from_secs(1_700_000_000) + self.elapsed();
        Now {
            instant: self.now,
            ntp: auralink_proto::aic::ntp_middle(elapsed),
        }
    }

    /// Hands a datagram to the sidecar at once, past the network.
    pub(crate) fn inject(&mut self, side: Side, path: Path, bytes: &[u8]) {
        let now = self.clock();
        let mut out = Out::default();
        if let Some(relay) = &mut self.relay {
            relay.receive(now, side, path, bytes, &mut self.scratch, &mut out);
        }
        self.after_relay(out);
    }

    pub(crate) fn close_relay(&mut self) {
        let now = self.clock();
        let mut out = Out::default();
        if let Some(relay) = &mut self.relay {
            relay.close(now, &mut self.scratch, &mut out);
        }
        self.after_relay(out);
    }

    fn after_relay(&mut self, out: Out) {
        for (side, path, bytes) in out.0 {
            self.sent.push((self.now, side, path, bytes.clone()));
            self.post(path.local, path.remote, bytes);
        }
        let elapsed = self.elapsed();
        if let Some(relay) = &mut self.relay {
            while let Some(event) = relay.poll_event() {
                self.events.push((elapsed, event));
            }
        }
    }

    pub(crate) fn flush_peers(&mut self) {
        while let Some((from, to, bytes)) = self.client.poll_transmit() {
            self.post(from, to, bytes);
        }
        while let Some((from, to, bytes)) = self.server.poll_transmit() {
            self.post(from, to, bytes);
        }
    }

    fn deliver(&mut self, from: SocketAddr, to: SocketAddr, bytes: &[u8]) {
        if self.dead.contains(&to) {
            return;
        }
        let path = Path {
            local: to,
            remote: from,
            tcp: false,
        };
        if to == front() {
            self.inject(Side::Client, path, bytes);
        } else if to == back() {
            self.inject(Side::Server, path, bytes);
        } else if self.client.locals.contains(&to) {
            self.client.receive(self.now, from, to, bytes);
        } else if self.server.locals.contains(&to) {
            self.server.receive(self.now, from, to, bytes);
        }
    }

    /// Does what is next, if it is due until `end`; otherwise sets the clock to `end`.
    fn step(&mut self, end: Instant) -> bool {
        let queued = self.queue.peek().map(|Reverse(due)| due.at);
        let client = self.client.poll_timeout();
        let server = self.server.poll_timeout();
        let relay = self.relay.as_mut().and_then(Relay::poll_timeout);
        let next = [queued, client, server, relay].into_iter().flatten().min();
        let Some(next) = next.filter(|next| *next <= end) else {
            self.now = end;
            return false;
        };
        self.now = self.now.max(next);
        if queued == Some(next)
            && let Some(Reverse(due)) = self.queue.pop()
        {
            match due.event {
                Event::Datagram(from, to, bytes) => self.deliver(from, to, &bytes),
                Event::ProxyFromClient(frame) => self.at_proxy(Side::Client, frame),
                Event::ProxyFromServer(frame) => self.at_proxy(Side::Server, frame),
                Event::Client(frame) => self.at_end(Side::Client, frame),
                Event::Server(frame) => self.at_end(Side::Server, frame),
            }
        } else if relay == Some(next) {
            let now = self.clock();
            let mut out = Out::default();
            if let Some(relay) = &mut self.relay {
                relay.handle_timeout(now, &mut self.scratch, &mut out);
            }
            self.after_relay(out);
        } else if client == Some(next) {
            self.client.handle_timeout(self.now);
        } else {
            self.server.handle_timeout(self.now);
        }
        self.flush_peers();
        true
    }

    /// Lets so much time pass.
    pub(crate) fn run(&mut self, time: Duration) {
        self.flush_peers();
        let end = self.now + time;
        let mut at_once = 0;
        let mut last = self.now;
        while self.step(end) {
            at_once = if self.now == last { at_once + 1 } else { 0 };
            last = self.now;
            assert!(
                at_once < 100_000,
                "the clock stands still: {}",
                self.report()
            );
        }
    }

    /// Lets time pass until `condition` holds, at the most so many seconds; whether it does.
    pub(crate) fn run_until(&mut self, seconds: u64, condition: impl Fn(&Self) -> bool) -> bool {
        let end = self.now + Duration::from_secs(seconds);
        self.flush_peers();
        while self.now < end {
            if condition(self) {
                return true;
            }
            self.run(Duration::from_millis(5));
        }
        condition(self)
    }

    pub(crate) fn run_ms(&mut self, ms: u64) {
        self.run(Duration::from_millis(ms));
    }
}

/// Each DTLS record's content type, epoch, sequence number and, in the clear, handshake type.
fn records(datagram: &[u8]) -> String {
    let mut text = String::new();
    let mut rest = datagram;
    while let [
        kind,
        _,
        _,
        _,
        epoch,
        _,
        _,
        _,
        _,
        _,
        sequence,
        l1,
        l2,
        body @ ..,
    ] = rest
    {
        let len = usize::from(u16::from_be_bytes([*l1, *l2])).min(body.len());
        let _ = write!(text, " [{kind} e{epoch} s{sequence}");
        if *kind == 22 && *epoch == 0 && len > 5 {
            let _ = write!(text, " handshake {} #{}", body[0], body[5]);
        }
        let _ = write!(text, " {len}]");
        rest = &body[len..];
    }
    text
}

/// `SessionDescription`.
pub(crate) fn description(kind: &str, sdp: &str, mids: &[(&str, &str)]) -> Vec<u8> {
    let mut message = Vec::new();
    write_bytes(&mut message, 1, kind.as_bytes());
    write_bytes(&mut message, 2, sdp.as_bytes());
    for (mid, sid) in mids {
        let mut entry = Vec::new();
        write_bytes(&mut entry, 1, mid.as_bytes());
        write_bytes(&mut entry, 2, sid.as_bytes());
        write_bytes(&mut message, 4, &entry);
    }
    message
}

pub(crate) fn sdp_of(description: &[u8]) -> String {
    let field = Fields::new(description)
        .map_while(Result::ok)
        .find(|field| field.number == 2)
        .expect("sdp");
    let Value::Bytes(bytes) = field.value else {
        panic!("sdp is no string");
    };
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

/// `ParticipantUpdate` with one participant that publishes one audio track.
pub(crate) fn others(sid: &str, source: u64, stereo: bool) -> Vec<u8> {
    let mut track = Vec::new();
    write_bytes(&mut track, 1, sid.as_bytes());
    write_uint(&mut track, 9, source);
    write_uint(&mut track, 14, u64::from(stereo));
    let mut participant = Vec::new();
    write_bytes(&mut participant, 1, b"PA_other");
    write_bytes(&mut participant, 4, &track);
    let mut update = Vec::new();
    write_bytes(&mut update, 1, &participant);
    update
}
