//! The configuration: YAML text → [`Settings`], every value checked before anything is bound.
//!
//! [`Settings::parse`] is pure. [`load`] reads a file, [`Live`] holds the settings in force and
//! replaces them on reload. `config/auralink.yaml` is the reference of all keys; tests keep it equal
//! to this module. Mistakes are collected, not just the first, each with line and column.

mod addresses;
mod files;
mod live;
mod parse;
mod reach;
mod show;
#[cfg(test)]
mod tests;
mod values;
mod yaml;

pub use files::Material;
pub use live::{Live, ReloadState, Reloaded};
pub use show::show_room;

use auralink_proto::policy::Rules;
use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

/// A configuration file larger than this is refused, in bytes.
pub const MAX_FILE: usize = 1 << 20;

/// Longest query that can be allowed, in bytes: the `http` crate holds a request target of 65,534, and
/// the path needs room.
pub const MAX_QUERY: usize = 65_000;

/// Most media workers, each with a UDP port of its own.
pub const MAX_WORKERS: usize = 64;

/// Everything the process goes by, resolved: no option is left to be defaulted by its user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// `listen`: HTTP and WebSocket that clients dial. Port 0 lets the system choose (tests).
    pub listen: SocketAddr,
    /// `tls`: certificate and key for `listen`; none: plain HTTP.
    pub tls: Option<TlsFiles>,
    /// `upstream`: the LiveKit server.
    pub upstream: Upstream,
    /// `media`.
    pub media: Media,
    /// `admin`.
    pub admin: Admin,
    /// `limits`: what strangers may cost.
    pub limits: Limits,
    /// `session`: how long a session outlives what it needs.
    pub session: Session,
    /// `log`.
    pub log: Log,
    /// `metrics`.
    pub metrics: Metrics,
    /// `engine`: the codecs of the hop between two AuraLinks, of `enhance` and `recode`.
    pub engine: Engine,
    /// `audit.log`: who was processed by which models, as JSON lines; none: not written.
    pub audit: Option<PathBuf>,
    /// `defaults` and `rooms`, with the generation of this configuration.
    pub rules: Rules,
}

/// PEM files of the listener.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// `tls.cert`: the certificate chain, leaf first.
    pub cert: PathBuf,
    /// `tls.key`: its private key.
    pub key: PathBuf,
}

/// Where LiveKit is dialled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upstream {
    /// TLS: the URL said `https` or `wss`.
    pub https: bool,
    /// Host name or IP address, an IPv6 one without brackets.
    pub host: String,
    /// From the URL, or 80 and 443.
    pub port: u16,
    /// Put before every path; empty, or with a leading and without a trailing `/`.
    pub base_path: String,
}

impl Upstream {
    /// `host:port` as a `Host` header or a dialler takes it, IPv6 in brackets.
    #[must_use]
    pub fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }
}

impl fmt::Display for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.https { "https" } else { "http" };
        write!(f, "{scheme}://{}{}", self.authority(), self.base_path)
    }
}

/// Addresses and ports of the media path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Media {
    /// `media.ip`: advertised to clients and to LiveKit; none twice. At least one, but with `use_external_ip` where the key is left
    /// out: then it is the one that leads to the STUN servers.
    pub ips: Vec<IpAddr>,
    /// `media.use_external_ip`: clients are told the address that STUN servers see in place of an IPv4 address of `ips`.
    pub use_external_ip: bool,
    /// `media.stun_servers`: `host:port`; at least one with `use_external_ip`.
    pub stun_servers: Vec<String>,
    /// `media.udp_port`: of the first worker; worker n has `udp_port + n`.
    pub udp_port: u16,
    /// `media.tcp_port`: passive ICE-TCP (RFC 6544); none: not offered.
    pub tcp_port: Option<u16>,
    /// `media.workers`: threads, 1 to [`MAX_WORKERS`].
    pub workers: usize,
    /// `media.scheduling`: when these threads get a core.
    pub scheduling: Scheduling,
}

/// How the kernel schedules media threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheduling {
    /// As everything else (`SCHED_OTHER`).
    Normal,
    /// Before everything else (`SCHED_RR`); needs CAP_SYS_NICE.
    Realtime,
}

/// The admin listener.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Admin {
    /// `admin.listen`: health, metrics, status.
    pub listen: SocketAddr,
}

/// What strangers may cost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// `limits.max_header_bytes`: request line without its query, and header fields.
    pub max_header_bytes: usize,
    /// `limits.max_query_bytes`: the query, at most [`MAX_QUERY`]; LiveKit clients send a whole SDP in
    /// it.
    pub max_query_bytes: usize,
    /// `limits.max_frame_bytes`: one WebSocket message from a client.
    pub max_frame_bytes: usize,
    /// `limits.max_upstream_frame_bytes`: one from LiveKit, at most [`MAX_FRAME`](auralink_proto::signal::MAX_FRAME).
    pub max_upstream_frame_bytes: usize,
    /// `limits.header_timeout`: until a request's headers must be complete, and between two parts of its body.
    pub header_timeout: Duration,
    /// `limits.keep_alive_timeout`: how long a connection may rest between two requests.
    pub keep_alive_timeout: Duration,
    /// `limits.dial_timeout`: for a connection to LiveKit, TLS included.
    pub dial_timeout: Duration,
    /// `limits.idle_timeout`: a WebSocket without a frame in either direction.
    pub idle_timeout: Duration,
    /// `limits.handshakes`: at a time, further ones get 503.
    pub handshakes: usize,
    /// `limits.sessions`: at a time, further ones get 503.
    pub sessions: usize,
    /// `limits.connections`: of clients at a time, those of sessions included.
    pub connections: usize,
    /// `limits.connections_per_address`: of these, those of one address that are no sessions; 0: no bound.
    pub connections_per_address: usize,
}

/// How long a session outlives what it needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Session {
    /// `session.resume_grace`: after signalling closed without a leave, for the client's resume.
    pub resume_grace: Duration,
    /// `session.consent_timeout`: without an authenticated STUN request (RFC 7675).
    pub consent_timeout: Duration,
    /// `session.drain_grace`: from SIGTERM to the leave that ends running sessions.
    pub drain_grace: Duration,
}

/// What is logged and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Log {
    /// `log.level`: a level or tracing's directives; `RUST_LOG` goes before it.
    pub level: String,
    /// `log.format`.
    pub format: LogFormat,
}

/// How a log line is written, to standard error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One object a line.
    Json,
}

/// What is measured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Metrics {
    /// `metrics.rooms`: rooms that have a label of their own at a time; the rest are `other`.
    pub rooms: usize,
}

/// The codecs of the hop between two AuraLinks, and of one that codes anew.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Engine {
    /// `engine.threads`: codec threads, 1 to [`MAX_WORKERS`].
    pub threads: usize,
    /// `engine.models`: the folder with the bundles of the codec and `silero-vad` (docs/models.md);
    /// none: only the Opus rungs.
    pub models: Option<PathBuf>,
    /// `engine.codec`: the codec's bundle, a folder in `models`.
    pub codec: String,
    /// `engine.runtime`: `libonnxruntime.so`; none: only the Opus rungs.
    pub runtime: Option<PathBuf>,
    /// `engine.local_bitrate`: Opus towards clients and LiveKit after the hop, bits a second.
    pub local_bitrate: u32,
}

/// CPU cores when the process first asked. A container that is resized later keeps the threads that it has, and a file that leaves
/// their number out still says what is in force.
fn cores() -> usize {
    static CORES: OnceLock<usize> = OnceLock::new();
    *CORES.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from))
}

impl Default for Settings {
    fn default() -> Self {
        let loopback = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let cores = cores();
        Self {
            listen: loopback(7980),
            tls: None,
            upstream: Upstream {
                https: false,
                host: "127.0.0.1".into(),
                port: 7880,
                base_path: String::new(),
            },
            media: Media {
                ips: vec![Ipv4Addr::LOCALHOST.into()],
                use_external_ip: false,
                stun_servers: Vec::new(),
                udp_port: 7982,
                tcp_port: None,
                workers: cores.min(MAX_WORKERS),
                scheduling: Scheduling::Normal,
            },
            admin: Admin {
                listen: loopback(7990),
            },
            limits: Limits {
                max_header_bytes: 64 << 10,
                max_query_bytes: MAX_QUERY,
                max_frame_bytes: 1 << 20,
                max_upstream_frame_bytes: auralink_proto::signal::MAX_FRAME,
                header_timeout: Duration::from_secs(10),
                keep_alive_timeout: Duration::from_secs(75),
                dial_timeout: Duration::from_secs(5),
                idle_timeout: Duration::from_secs(120),
                handshakes: 256,
                sessions: 10_000,
                connections: 20_000,
                connections_per_address: 512,
            },
            session: Session {
                resume_grace: Duration::from_secs(30),
                consent_timeout: Duration::from_secs(30),
                drain_grace: Duration::from_secs(20),
            },
            log: Log {
                level: "info".into(),
                format: LogFormat::Text,
            },
            metrics: Metrics { rooms: 50 },
            engine: Engine {
                threads: cores.div_ceil(2).min(MAX_WORKERS),
                models: None,
                codec: "lyra2".into(),
                runtime: None,
                local_bitrate: 64_000,
            },
            audit: None,
            rules: Rules::default().with_generation(1),
        }
    }
}

/// A place in the text, both from 1; columns count characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// From 1.
    pub line: usize,
    /// From 1.
    pub column: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.line, self.column)
    }
}

/// One mistake, or one thing that is surely not meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Where it stands; none for what concerns the file as a whole.
    pub place: Option<Place>,
    /// The key with its path, `rooms[2].audio.packet`; empty for the file as a whole.
    pub key: String,
    /// What is wrong, and what is allowed.
    pub message: String,
}

impl Problem {
    pub(crate) fn of_file(message: impl Into<String>) -> Self {
        Self {
            place: None,
            key: String::new(),
            message: message.into(),
        }
    }

    /// One line for people: `auralink.yaml:3:7: error: media.udp_port: …`.
    #[must_use]
    pub fn line(&self, file: &str, severity: &str) -> String {
        let place = self
            .place
            .map_or_else(|| file.to_owned(), |p| format!("{file}:{p}"));
        format!("{place}: {severity}: {self}")
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        f.write_str(&self.message)
    }
}

/// Why a configuration cannot be used: at least one mistake, in the file's order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problems(pub Vec<Problem>);

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str("; ")?;
            }
            if let Some(place) = problem.place {
                write!(f, "{place}: ")?;
            }
            write!(f, "{problem}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}

/// A configuration that can be used.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// What it says.
    pub settings: Settings,
    /// What it says that has no effect.
    pub warnings: Vec<Problem>,
    /// What the files hold that it names; nothing where only its text was read.
    pub material: Material,
    /// Places of the values that stand in it.
    places: Places,
}

#[derive(Debug, Clone)]
struct Places {
    text: String,
    given: BTreeMap<String, yaml::Id>,
}

impl Loaded {
    /// Where the key's value stands, if the file has the key.
    #[must_use]
    pub fn place(&self, key: &str) -> Option<Place> {
        yaml::place(&self.places.text, *self.places.given.get(key)?)
    }
}

impl Settings {
    /// Reads a configuration. Looks at nothing but the text.
    ///
    /// # Errors
    /// Every mistake in it: malformed YAML, unknown and repeated keys, values that are not allowed,
    /// addresses that collide.
    pub fn parse(text: &str) -> Result<Loaded, Problems> {
        parse::parse(text)
    }

    /// The keys that differ and that only a restart can change. What is not among them takes effect
    /// on reload.
    #[must_use]
    pub fn restart_only(&self, new: &Self) -> Vec<&'static str> {
        // Taken apart in full, so that a new field does not compile until it is decided here.
        let Self {
            listen,
            tls,
            upstream,
            media,
            admin,
            limits: _,
            session: _,
            log,
            metrics: _,
            engine,
            audit,
            rules: _,
        } = self;
        let Media {
            ips,
            use_external_ip,
            stun_servers,
            udp_port,
            tcp_port,
            workers,
            scheduling,
        } = media;
        let Admin {
            listen: admin_listen,
        } = admin;
        let Log { level: _, format } = log;
        let Engine {
            threads,
            models,
            codec,
            runtime,
            local_bitrate,
        } = engine;
        let same = [
            ("listen", *listen == new.listen),
            // Clients dial with one scheme or the other.
            ("tls", tls.is_some() == new.tls.is_some()),
            ("upstream", *upstream == new.upstream),
            ("media.ip", *ips == new.media.ips),
            (
                "media.use_external_ip",
                *use_external_ip == new.media.use_external_ip,
            ),
            (
                "media.stun_servers",
                *stun_servers == new.media.stun_servers,
            ),
            ("media.udp_port", *udp_port == new.media.udp_port),
            ("media.tcp_port", *tcp_port == new.media.tcp_port),
            ("media.workers", *workers == new.media.workers),
            ("media.scheduling", *scheduling == new.media.scheduling),
            ("engine.threads", *threads == new.engine.threads),
            ("engine.models", *models == new.engine.models),
            ("engine.codec", *codec == new.engine.codec),
            ("engine.runtime", *runtime == new.engine.runtime),
            (
                "engine.local_bitrate",
                *local_bitrate == new.engine.local_bitrate,
            ),
            ("audit.log", *audit == new.audit),
            ("admin.listen", *admin_listen == new.admin.listen),
            ("log.format", *format == new.log.format),
        ];
        same.into_iter()
            .filter(|(_, same)| !same)
            .map(|(key, _)| key)
            .collect()
    }

    /// The parts that differ and that a reload changes.
    #[must_use]
    pub fn reloadable(&self, new: &Self) -> Vec<&'static str> {
        let rules = new.rules.clone().with_generation(self.rules.generation());
        let same = [
            ("defaults", self.rules.defaults() == rules.defaults()),
            ("rooms", self.rules.rules() == rules.rules()),
            ("log.level", self.log.level == new.log.level),
            ("metrics.rooms", self.metrics == new.metrics),
            (
                "tls",
                self.tls == new.tls || self.tls.is_some() != new.tls.is_some(),
            ),
            ("limits", self.limits == new.limits),
            ("session", self.session == new.session),
        ];
        same.into_iter()
            .filter(|(_, same)| !same)
            .map(|(key, _)| key)
            .collect()
    }
}

/// Reads a file and all it names.
///
/// # Errors
/// As [`Settings::parse`], and when the file or one it names cannot be read or holds what can't be used.
pub fn load(path: &Path) -> Result<Loaded, Problems> {
    let bytes = read_file(path).map_err(|p| Problems(vec![p]))?;
    with_files(load_bytes(&bytes)?)
}

/// The file's bytes, refusing what is surely no configuration before reading it.
pub(crate) fn read_file(path: &Path) -> Result<Vec<u8>, Problem> {
    use std::io::Read;
    let cannot = |e: std::io::Error| Problem::of_file(format!("cannot be read: {e}"));
    let file = std::fs::File::open(path).map_err(cannot)?;
    let mut bytes = Vec::new();
    file.take(MAX_FILE as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(cannot)?;
    if bytes.len() > MAX_FILE {
        return Err(Problem::of_file(format!(
            "is larger than {MAX_FILE} bytes, the most allowed"
        )));
    }
    Ok(bytes)
}

/// As [`load`], the file being read already, and without those that it names.
pub(crate) fn load_bytes(bytes: &[u8]) -> Result<Loaded, Problems> {
    let text = std::str::from_utf8(bytes).map_err(|e| {
        let good = String::from_utf8_lossy(&bytes[..e.valid_up_to()]);
        let line = good.matches('\n').count() + 1;
        let column = good.rsplit('\n').next().map_or(0, |l| l.chars().count()) + 1;
        let place = Some(Place { line, column });
        let message = "is not UTF-8 text here".to_owned();
        Problems(vec![Problem {
            place,
            key: String::new(),
            message,
        }])
    })?;
    Settings::parse(text)
}

/// Reads what the configuration names.
fn with_files(mut loaded: Loaded) -> Result<Loaded, Problems> {
    let settings = &loaded.settings;
    match files::Files::read(settings).material(settings.upstream.https) {
        Ok(material) => {
            loaded.material = material;
            Ok(loaded)
        }
        Err(wrong) => {
            let problem = |(key, message): (&str, String)| Problem {
                place: loaded.place(key),
                key: key.to_owned(),
                message,
            };
            Err(Problems(wrong.into_iter().map(problem).collect()))
        }
    }
}
