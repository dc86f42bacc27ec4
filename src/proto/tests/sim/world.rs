//! Two ends, the sidecar's own session and relay between them, and the networks that join them,
//! all on one virtual clock.

// The fuzz target takes this file in by its path, and would look for these beside it.
#[path = "world/network.rs"]
mod network;
#[path = "world/signalling.rs"]
mod signalling;

use crate::net::{Netem, Rng};
use crate::peer::Peer;
use auralink_proto::description::{HostCandidate, PcDescription, Target};
use auralink_proto::dtls::Identity;
use auralink_proto::leg::LegState;
use auralink_proto::policy::Policy;
use auralink_proto::relay::{Relay, RelayEvent, Scratch, Side};
use auralink_proto::session::{Env, Session, SessionConfig};
use auralink_proto::signal::wire::{Fields, Value, write_bytes, write_uint};
use auralink_proto::stun::Path;
use network::Due;
use rtc_dtls::extension::extension_use_srtp::SrtpProtectionProfile;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashSet};
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
    /// What the client's and the server's `a=fmtp` of Opus end with.
    pub(crate) fmtp: [&'static str; 2],
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
            fmtp: [""; 2],
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
