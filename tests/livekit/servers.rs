//! The stock server and the sidecar, each with a configuration of its own, and the pair that most tests share.

use crate::harness::{Process, Trial, free_ports, logs_dir, root, setting, string, wait_for};
use crate::http;
use crate::sabotage;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

/// A stock livekit-server with livekit/livekit.yaml on ports of its own.
pub(crate) struct LiveKit {
    pub(crate) process: Process,
    /// HTTP and WebSocket.
    pub(crate) port: u16,
    /// Its muxed UDP port and its ICE-TCP port.
    pub(crate) udp_port: u16,
    pub(crate) tcp_port: u16,
}

impl LiveKit {
    pub(crate) fn start(dir: &Path) -> Self {
        let base = free_ports(3);
        let (port, udp_port, tcp_port) = (base, base + 1, base + 2);
        let reference = root().join("livekit/livekit.yaml");
        let mut text = fs::read_to_string(&reference).expect("livekit/livekit.yaml");
        for (key, old, new) in [
            ("port", 7880, port),
            ("udp_port", 7882, udp_port),
            ("tcp_port", 7881, tcp_port),
        ] {
            let line = format!("{key}: {old}");
            assert!(text.contains(&line), "livekit/livekit.yaml has no '{line}'");
            text = text.replacen(&line, &format!("{key}: {new}"), 1);
        }
        sabotage::ice_tcp(tcp_port);
        fs::create_dir_all(dir).unwrap();
        let config = dir.join("livekit.yaml");
        fs::write(&config, text).unwrap();
        let mut command = Command::new(setting("AURALINK_LIVEKIT_SERVER"));
        command.arg("--config").arg(config);
        let process = Process::spawn(dir, "livekit", &mut command, false);
        wait_for("livekit-server to listen", Duration::from_secs(30), || {
            http::get(port, "/")
                .ok()
                .filter(|answer| answer.status == 200)
        });
        Self {
            process,
            port,
            udp_port,
            tcp_port,
        }
    }

    pub(crate) fn url(&self) -> String {
        format!("ws://127.0.0.1:{}", self.port)
    }
}

/// What a test wants of its sidecar.
#[derive(Clone)]
pub(crate) struct Options {
    /// `media.ip`; the first is listened on too.
    pub(crate) ips: Vec<String>,
    /// Where the server is.
    pub(crate) upstream_ip: String,
    pub(crate) workers: u16,
    pub(crate) resume_grace: &'static str,
    pub(crate) consent_timeout: &'static str,
    pub(crate) drain_grace: &'static str,
    /// `rooms:` and what else a test adds, as YAML.
    pub(crate) rules: String,
}

/// Rooms `lean-*` are lean, all others off. In rooms `mixed-*` only participants `lean-*` are lean.
pub(crate) const RULES: &str = r#"
rooms:
  - match: "lean-*"
    mode: lean
    audio: { max_bitrate: 12k, packet: 40ms, red: auto }
  - match: "mixed-*"
    identities: "lean-*"
    mode: lean
    audio: { max_bitrate: 12k, packet: 40ms, red: auto }
"#;

impl Default for Options {
    fn default() -> Self {
        Self {
            ips: vec!["127.0.0.1".to_owned()],
            upstream_ip: "127.0.0.1".to_owned(),
            workers: 2,
            resume_grace: "10s",
            consent_timeout: "15s",
            drain_grace: "1s",
            rules: RULES.to_owned(),
        }
    }
}

impl Options {
    /// Media on this host's own address instead of 127.0.0.1: Firefox pairs no loopback candidate of its peer with its own
    /// ones, so that it would never send to an ICE-lite peer there. The kernel carries it over loopback all the same.
    pub(crate) fn off_loopback() -> Self {
        Self {
            ips: vec![host_address()],
            ..Self::default()
        }
    }
}

/// The IPv4 address that this host would reach others from; nothing is sent to find it.
fn host_address() -> String {
    let socket = std::net::UdpSocket::bind(("0.0.0.0", 0)).unwrap();
    socket
        .connect("198.51.100.1:9")
        .and_then(|()| socket.local_addr())
        .map(|address| address.ip().to_string())
        .expect("a host with a network interface and a route; `ip link add type dummy` makes one")
}

/// The sidecar under test.
pub(crate) struct Sidecar {
    pub(crate) process: Process,
    pub(crate) config: PathBuf,
    pub(crate) port: u16,
    pub(crate) admin_port: u16,
    pub(crate) udp_port: u16,
    pub(crate) tcp_port: u16,
    pub(crate) options: Options,
    upstream: u16,
}

impl Sidecar {
    /// Starts it in front of a server on port `upstream`.
    pub(crate) fn start(dir: &Path, upstream: u16, options: Options) -> Self {
        let base = free_ports(3 + options.workers);
        let (port, admin_port, tcp_port, udp_port) = (base, base + 1, base + 2, base + 3);
        sabotage::ice_tcp(tcp_port);
        fs::create_dir_all(dir).unwrap();
        let config = dir.join("auralink.yaml");
        let mut command = Command::new(env!("CARGO_BIN_EXE_auralink"));
        command.arg("--config").arg(&config).env_remove("RUST_LOG");
        let text = Self::yaml(&options, port, admin_port, tcp_port, udp_port, upstream);
        fs::write(&config, text).unwrap();
        let mut process = Process::spawn(dir, "auralink", &mut command, false);
        let ip = options.ips[0].clone();
        wait_for("auralink to listen", Duration::from_secs(20), || {
            assert!(
                process.running(),
                "auralink ended at its start:\n{}",
                fs::read_to_string(&process.log).unwrap_or_default()
            );
            std::net::TcpStream::connect(http::join(&ip, port)).ok()
        });
        Self {
            process,
            config,
            port,
            admin_port,
            udp_port,
            tcp_port,
            options,
            upstream,
        }
    }

    fn yaml(o: &Options, port: u16, admin: u16, tcp: u16, udp: u16, upstream: u16) -> String {
        let ips: Vec<_> = o.ips.iter().map(|ip| format!("\"{ip}\"")).collect();
        format!(
            "listen: \"{listen}\"\nupstream: http://{to}\n\
             media: {{ ip: [{ips}], udp_port: {udp}, tcp_port: {tcp}, workers: {workers} }}\n\
             admin: {{ listen: 127.0.0.1:{admin} }}\n\
             session: {{ resume_grace: {grace}, consent_timeout: {consent}, drain_grace: {drain} }}\n\
             log: {{ level: \"info,auralink=debug\", format: json }}\n{rules}",
            listen = http::join(&o.ips[0], port),
            to = http::join(&o.upstream_ip, upstream),
            ips = ips.join(", "),
            workers = o.workers,
            grace = o.resume_grace,
            consent = o.consent_timeout,
            drain = o.drain_grace,
            rules = o.rules,
        )
    }

    /// Writes the configuration anew with other rules; the sidecar finds it by itself.
    pub(crate) fn write_rules(&self, rules: &str) {
        let options = Options {
            rules: rules.to_owned(),
            ..self.options.clone()
        };
        let text = Self::yaml(
            &options,
            self.port,
            self.admin_port,
            self.tcp_port,
            self.udp_port,
            self.upstream,
        );
        fs::write(&self.config, text).unwrap();
    }

    pub(crate) fn url(&self) -> String {
        format!("ws://{}", http::join(&self.options.ips[0], self.port))
    }

    /// Every address that it may give to a client as a candidate.
    pub(crate) fn candidates(&self) -> Vec<String> {
        let mut all = Vec::new();
        for ip in &self.options.ips {
            all.push(http::join(ip, self.tcp_port));
            for worker in 0..self.options.workers {
                all.push(http::join(ip, self.udp_port + worker));
            }
        }
        all
    }

    pub(crate) fn is_candidate(&self, address: &str) -> bool {
        let plain = address.replace(['[', ']'], "");
        self.candidates()
            .iter()
            .any(|own| own.replace(['[', ']'], "") == plain)
    }

    /// Client-side UDP ports.
    pub(crate) fn udp_ports(&self) -> Vec<u16> {
        (0..self.options.workers)
            .map(|worker| self.udp_port + worker)
            .collect()
    }

    /// Its log, one JSON object a line.
    pub(crate) fn log(&self) -> Vec<Value> {
        let text = fs::read_to_string(&self.process.log).unwrap_or_default();
        text.lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect()
    }

    /// `fields` of all log lines with this message.
    pub(crate) fn logged(&self, message: &str) -> Vec<Value> {
        self.log()
            .into_iter()
            .filter(|line| string(line, "/fields/message") == message)
            .map(|line| line["fields"].clone())
            .collect()
    }

    /// `/status.json`.
    pub(crate) fn status(&self) -> Value {
        let answer =
            http::get(self.admin_port, "/status.json").expect("the admin listener answers");
        serde_json::from_slice(&answer.body).expect("/status.json is JSON")
    }

    /// Sessions that began and have not ended, by id, with the room of each.
    pub(crate) fn open_sessions(&self) -> BTreeMap<String, String> {
        let mut open = BTreeMap::new();
        for line in self.log() {
            let id = line["fields"]["session"].to_string();
            match string(&line, "/fields/message") {
                "session" => {
                    open.insert(id, string(&line, "/fields/room").to_owned());
                }
                "session ended" => {
                    open.remove(&id);
                }
                _ => {}
            }
        }
        open
    }

    /// Sessions of a room that are open now.
    pub(crate) fn sessions_in(&self, room: &str) -> usize {
        self.open_sessions()
            .values()
            .filter(|of| *of == room)
            .count()
    }

    /// `fields` of the lines that say that a session of the room began or was resumed.
    pub(crate) fn joins(&self, room: &str) -> Vec<Value> {
        let mut joins = self.logged("session");
        joins.retain(|fields| string(fields, "/room") == room);
        joins
    }

    /// Waits until the room's sessions have ended.
    pub(crate) fn wait_empty(&self, room: &str, limit: Duration) {
        wait_for(&format!("the sessions of {room} to end"), limit, || {
            (self.sessions_in(room) == 0).then_some(())
        });
    }

    /// Lines of level ERROR, and any that tell of a panic: a call that works leaves none.
    pub(crate) fn complaints(&self) -> Vec<String> {
        let text = fs::read_to_string(&self.process.log).unwrap_or_default();
        text.lines()
            .filter(|line| line.contains("\"level\":\"ERROR\"") || line.contains("panicked at"))
            .map(str::to_owned)
            .collect()
    }
}

/// Server and sidecar.
pub(crate) struct Stack {
    pub(crate) livekit: LiveKit,
    pub(crate) sidecar: Sidecar,
}

impl Stack {
    /// A pair for one test alone.
    pub(crate) fn own(trial: &Trial, options: Options) -> Self {
        let livekit = LiveKit::start(&trial.dir);
        let sidecar = Sidecar::start(&trial.dir, livekit.port, options);
        trial.watch(&livekit.process.log);
        trial.watch(&sidecar.process.log);
        Self { livekit, sidecar }
    }

    /// The pair that tests share while any of them runs.
    pub(crate) fn shared(trial: &Trial) -> Arc<Self> {
        static SHARED: Mutex<Weak<Stack>> = Mutex::new(Weak::new());
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        let stack = shared.upgrade().unwrap_or_else(|| {
            let count = COUNT.fetch_add(1, Ordering::Relaxed);
            let dir = logs_dir().join(format!("shared-{count}"));
            let livekit = LiveKit::start(&dir);
            let sidecar = Sidecar::start(&dir, livekit.port, Options::default());
            Arc::new(Self { livekit, sidecar })
        });
        *shared = Arc::downgrade(&stack);
        trial.watch(&stack.sidecar.process.log);
        stack
    }
}
