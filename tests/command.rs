//! The command as an operator meets it: arguments, `--check`, exit codes, and that nothing is bound
//! by a configuration that cannot be used.

#![allow(clippy::panic, clippy::unwrap_used)]

use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::time::{Duration, Instant};

fn auralink(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_auralink"))
        .args(args)
        .env_remove("RUST_LOG")
        .output()
        .unwrap()
}

/// Exit code, standard output, standard error.
fn said(output: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (
        output.status.code().unwrap(),
        text(&output.stdout),
        text(&output.stderr),
    )
}

fn check(text: &str, more: &[&str]) -> (i32, String, String) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a.yaml");
    fs::write(&file, text).unwrap();
    let path = file.to_str().unwrap();
    let (code, out, err) = said(&auralink(&[&["--check", "--config", path], more].concat()));
    (
        code,
        out.replace(path, "a.yaml"),
        but_descriptors(&err).replace(path, "a.yaml"),
    )
}

/// Without what this machine's hard limit of file descriptors has to say to the default limits.
fn but_descriptors(said: &str) -> String {
    let of_the_default =
        "limits.connections: 20000 connections can't be reached: with 10000 sessions";
    let lines = said.lines().filter(|line| !line.contains(of_the_default));
    lines.map(|line| format!("{line}\n")).collect()
}

#[test]
fn version_help_and_wrong_arguments() {
    let (code, out, err) = said(&auralink(&["--version"]));
    assert_eq!((code, err.as_str()), (0, ""));
    assert_eq!(out, format!("auralink {}\n", auralink::VERSION));
    let named = concat!("auralink ", env!("CARGO_PKG_VERSION"), " (");
    assert!(
        out.starts_with(named) && out.len() > named.len() + 2,
        "{out}"
    );
    let (code, out, _) = said(&auralink(&["--help"]));
    assert_eq!(code, 0);
    for flag in [
        "--config",
        "--check",
        "--room",
        "--identity",
        "--api-key",
        "Exit codes",
    ] {
        assert!(out.contains(flag), "{flag}: {out}");
    }
    assert!(out.lines().count() < 30, "{out}");
    for args in [
        &[][..],
        &["--check"],
        &["--confg", "x"],
        &["--config", "x", "--room", "r"],
    ] {
        let (code, out, err) = said(&auralink(args));
        assert_eq!((code, out.as_str()), (2, ""), "{args:?}");
        assert!(err.contains("Usage"), "{err}");
    }
}

#[test]
fn check_says_every_mistake_with_its_place() {
    let text =
        "listen: 127.0.0.1:7980\nmedia:\n  udp_prot: 1\nrooms:\n  - match: \"[\"\n    mode: auto\n";
    let (code, out, err) = check(text, &[]);
    assert_eq!((code, out.as_str()), (2, ""));
    let lines: Vec<_> = err.lines().collect();
    assert_eq!(
        lines,
        [
            "a.yaml:3:3: error: media.udp_prot: unknown key (did you mean `udp_port`?); allowed here: ip, use_external_ip, stun_servers, udp_port, tcp_port, workers, scheduling",
            "a.yaml:5:12: error: rooms[0].match: \"[\": '[' is not allowed in a pattern (`*` matches any run of characters and `?` any one; there are no classes, alternatives or escapes)",
            "a.yaml:6:11: error: rooms[0].mode: `auto` comes with a later version; allowed now: off, lean, neural",
        ]
    );
    let (code, _, err) = said(&auralink(&["--check", "--config", "/nowhere/x.yaml"]));
    assert_eq!(code, 2);
    assert_eq!(
        err,
        "/nowhere/x.yaml: error: cannot be read: No such file or directory (os error 2)\n"
    );
}

#[test]
fn check_shows_what_a_room_gets() {
    let text =
        "rooms:\n  - match: \"support-*\"\n    mode: lean\n    audio: { max_bitrate: 16k }\n";
    let (code, out, err) = check(text, &[]);
    assert_eq!((code, err.as_str()), (0, ""));
    assert_eq!(
        out,
        "a.yaml: ok: 127.0.0.1:7980 → http://127.0.0.1:7880, 1 room rules\n"
    );
    let (code, out, _) = check(text, &["--room", "support-1", "--identity", "ann"]);
    let expected = "# room \"support-1\": rooms[0]\nmode: lean\naudio: { max_bitrate: 16k, packet: 40ms, red: auto }\nrung: L4\ndisclose: false\n# no video: left alone\n";
    assert_eq!((code, out.as_str()), (0, expected));
    let warned = check("rooms: [{match: '*'}, {match: a}]", &[]);
    assert_eq!(warned.0, 0);
    assert!(
        warned
            .2
            .starts_with("a.yaml:1:23: warning: rooms[1]: is never reached"),
        "{}",
        warned.2
    );
}

/// PEM files of a certificate for these names, and of another one's key.
fn certify(dir: &Path, names: &[&str]) -> [PathBuf; 3] {
    let made = |name: &str| {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let own = rcgen::generate_simple_self_signed(names).unwrap();
        let [cert, key] = ["crt", "key"].map(|kind| dir.join(format!("{name}.{kind}")));
        fs::write(&cert, own.cert.pem()).unwrap();
        fs::write(&key, own.signing_key.serialize_pem()).unwrap();
        (cert, key)
    };
    let ((cert, key), (_, other)) = (made("a"), made("b"));
    [cert, key, other]
}

#[test]
fn check_looks_at_what_the_file_names_and_at_the_machine() {
    let dir = tempfile::tempdir().unwrap();
    let [cert, key, other] = certify(dir.path(), &["localhost"]);
    let tls = |cert: &Path, key: &Path| {
        format!(
            "tls: {{ cert: {}, key: {} }}\n",
            cert.display(),
            key.display()
        )
    };
    let (code, _, err) = check(&tls(&cert, &key), &[]);
    assert_eq!((code, err.as_str()), (0, ""));

    // What would fail at the start is an error.
    let garbage = dir.path().join("garbage.pem");
    fs::write(&garbage, "garbage").unwrap();
    for (text, start, part) in [
        (tls(&cert, &other), "a.yaml:1:", "error: tls.key: "),
        (
            tls(&garbage, &key),
            "a.yaml:1:14: error: tls.cert: ",
            "holds no certificate",
        ),
        (
            tls(&cert, Path::new("/nowhere")),
            "a.yaml:1:",
            "/nowhere cannot be read",
        ),
        (
            "audit: { log: /nowhere/audit.jsonl }\n".to_owned(),
            "a.yaml:1:15: error: audit.log: cannot be opened",
            "its folder does not exist",
        ),
    ] {
        let (code, out, err) = check(&text, &[]);
        assert_eq!((code, out.as_str()), (2, ""), "{text}: {err}");
        assert!(
            err.starts_with(start) && err.contains(part),
            "{text}: {err}"
        );
    }

    // What can't be right is a warning.
    let empty = dir.path().display();
    for (text, start) in [
        (
            format!(
                "listen: 0.0.0.0:7980\nmedia: {{ ip: 192.168.0.2 }}\n{}",
                tls(&cert, &key)
            ),
            "a.yaml:3:14: warning: tls.cert: the certificate is for localhost alone",
        ),
        (
            "listen: 0.0.0.0:7980\n".to_owned(),
            "a.yaml:1:9: warning: media.ip: clients that dial listen",
        ),
        (
            format!("engine:\n  runtime: {empty}\n"),
            "a.yaml:2:12: warning: engine.runtime: ",
        ),
        (
            format!(
                "engine: {{ runtime: {}, models: {empty} }}\n",
                cert.display()
            ),
            "a.yaml:1:",
        ),
        (
            "limits: { sessions: 200000, connections: 400000 }\n".to_owned(),
            "a.yaml:1:",
        ),
        (
            "rooms:\n  - { match: 'a*', mode: lean }\n  - { match: ab, mode: lean }\n".to_owned(),
            "a.yaml:3:5: warning: rooms[1]: is never reached: rooms[0]",
        ),
        (
            "rooms: [{ match: a, mode: neural }]\n".to_owned(),
            "a.yaml:1:27: warning: rooms[0]: asks for rung L2, which needs models",
        ),
    ] {
        let (code, _, err) = check(&text, &[]);
        assert_eq!(code, 0, "{text}: {err}");
        assert!(
            err.starts_with(start) && err.contains("warning: "),
            "{text}: {err}"
        );
    }
    let (_, _, err) = check(
        &format!(
            "engine: {{ runtime: {}, models: {empty} }}\n",
            cert.display()
        ),
        &[],
    );
    assert!(err.contains("silero-vad") && err.contains("lyra2"), "{err}");
}

#[test]
fn the_reference_is_good() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/auralink.yaml");
    let (code, out, err) = said(&auralink(&["--check", "--config", file.to_str().unwrap()]));
    assert_eq!((code, &*but_descriptors(&err)), (0, ""), "{out}");
}

#[test]
fn check_binds_nothing_and_a_bad_file_ends_before_binding() {
    // Ports that are taken: were they bound, it would be said.
    let listen = TcpListener::bind("127.0.0.1:0").unwrap();
    let media = UdpSocket::bind("127.0.0.1:0").unwrap();
    let (l, m) = (
        listen.local_addr().unwrap(),
        media.local_addr().unwrap().port(),
    );
    let text = format!("listen: {l}\nmedia: {{ udp_port: {m}, workers: 1 }}\n");
    let (code, _, err) = check(&text, &[]);
    // A port that the system chose is one that it may give to others, and that is said.
    assert!(code == 0 && !err.contains("error"), "{err}");

    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a.yaml");
    fs::write(&file, format!("{text}unknown: 1\n")).unwrap();
    let (code, _, err) = said(&auralink(&["--config", file.to_str().unwrap()]));
    assert_eq!(code, 2, "{err}");
    assert!(
        err.contains(":3:1: error: unknown: unknown key") && !err.contains("in use"),
        "{err}"
    );

    fs::write(&file, &text).unwrap();
    let (code, _, err) = said(&auralink(&["--config", file.to_str().unwrap()]));
    assert_eq!(code, 1, "a port in use is no mistake of the file: {err}");
    assert!(err.contains(&l.to_string()), "{err}");
}

/// What `make models` made: the variable, or its place in the cache.
fn made(variable: &str, place: &str) -> PathBuf {
    let path = std::env::var_os(variable).map_or_else(
        || {
            let cache = std::env::var_os("XDG_CACHE_HOME").map_or_else(
                || PathBuf::from(std::env::var_os("HOME").unwrap()).join(".cache"),
                PathBuf::from,
            );
            cache.join("auralink").join(place)
        },
        PathBuf::from,
    );
    assert!(
        path.exists(),
        "{} is missing: run `make models`",
        path.display()
    );
    path
}

/// `models verify` with these arguments, and this or no library named by the environment.
fn verify(args: &[&str], variable: Option<&str>) -> (i32, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_auralink"));
    command
        .args(["models", "verify"])
        .args(args)
        .env_remove("RUST_LOG")
        .env_remove("AURALINK_ONNXRUNTIME");
    if let Some(library) = variable {
        command.env("AURALINK_ONNXRUNTIME", library);
    }
    said(&command.output().unwrap())
}

#[test]
fn a_bundle_is_verified_with_the_library_that_is_found() {
    let models = made("AURALINK_MODELS", "models");
    let library = made("AURALINK_ONNXRUNTIME", "onnxruntime/libonnxruntime.so");
    // The bundle and the library side by side, as `make models` has them.
    let dir = tempfile::tempdir().unwrap();
    let bundle = dir.path().join("models/lyra2");
    let runtime = dir.path().join("onnxruntime");
    fs::create_dir_all(&bundle).unwrap();
    fs::create_dir_all(&runtime).unwrap();
    for entry in fs::read_dir(models.join("lyra2")).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), bundle.join(entry.file_name())).unwrap();
    }
    let beside = runtime.join("libonnxruntime.so");
    std::os::unix::fs::symlink(fs::canonicalize(library).unwrap(), &beside).unwrap();
    let folder = bundle.to_str().unwrap();

    let (code, out, err) = verify(&[folder], None);
    assert_eq!(code, 0, "{err}");
    assert!(
        out.starts_with("lyra2 ") && out.contains("encoder.onnx: "),
        "{out}"
    );
    for part in ["encode in batches of 1: ", "decode in batches of 8: "] {
        let line = out.lines().find(|line| line.trim().starts_with(part));
        let factor = line.and_then(|line| line.split_once(", real-time factor "));
        let factor = factor.and_then(|(_, factor)| factor.parse::<f64>().ok());
        assert!(factor.is_some_and(|factor| factor > 0.0), "{part}: {out}");
    }

    // What is given goes before what is found.
    let given = ["/given/libonnxruntime.so", "/variable/libonnxruntime.so"];
    for (args, path) in [
        (&[folder, "--runtime", given[0]][..], given[0]),
        (&[folder][..], given[1]),
    ] {
        let (code, out, err) = verify(args, Some(given[1]));
        assert_eq!((code, out.as_str()), (1, ""), "{args:?}");
        assert!(err.contains(path) && err.contains("make models"), "{err}");
    }

    // A byte of a model is another.
    let model = bundle.join("encoder.onnx");
    let whole = fs::read(&model).unwrap();
    let mut bytes = whole.clone();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&model, bytes).unwrap();
    let (code, out, err) = verify(&[folder], None);
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(
        err.contains("encoder.onnx: its sha256 is ") && err.contains("make models"),
        "{err}"
    );

    fs::write(&model, whole).unwrap();
    fs::remove_file(&beside).unwrap();
    let (code, out, err) = verify(&[folder], None);
    assert_eq!((code, out.as_str()), (2, ""));
    for part in ["--runtime", "AURALINK_ONNXRUNTIME", "make models"] {
        assert!(err.contains(part), "{part}: {err}");
    }
}

/// A running sidecar of the test's own; killed when it is dropped.
struct Sidecar {
    child: std::process::Child,
    file: std::path::PathBuf,
    fixed: String,
    listen: SocketAddr,
    admin: std::net::SocketAddr,
    _dir: tempfile::TempDir,
}

/// Answers HTTP as LiveKit does to who knocks, and takes WebSockets; gone when dropped.
struct Upstream {
    at: SocketAddr,
    /// The status that it answers with.
    says: Arc<AtomicU16>,
    stop: Arc<AtomicBool>,
    answering: Option<std::thread::JoinHandle<()>>,
}

impl Upstream {
    fn start() -> Self {
        use std::io::{Read, Write};
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let says = Arc::new(AtomicU16::new(200));
        let said = says.clone();
        let answering = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stopped.load(Ordering::SeqCst) {
                    return;
                }
                let mut stream = stream.unwrap();
                let mut request = [0; 8192];
                let len = stream.read(&mut request).unwrap_or(0);
                let text = String::from_utf8_lossy(&request[..len]).to_ascii_lowercase();
                // Who has the status line may hang up.
                if text.contains("upgrade: websocket") {
                    let _ = stream.write_all(
                        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
                    );
                    std::thread::spawn(move || std::io::copy(&mut stream, &mut std::io::sink()));
                } else if len > 0 {
                    let status = said.load(Ordering::SeqCst);
                    let answer = format!("HTTP/1.1 {status} So\r\nContent-Length: 2\r\n\r\nOK");
                    let _ = stream.write_all(answer.as_bytes());
                }
            }
        });
        Self {
            at,
            says,
            stop,
            answering: Some(answering),
        }
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // Wakes it from waiting for somebody.
        let woken = TcpStream::connect(self.at);
        if let (Ok(_), Some(answering)) = (woken, self.answering.take()) {
            let _ = answering.join();
        }
    }
}

impl Sidecar {
    /// On free ports, with LiveKit at `upstream`.
    fn start(upstream: SocketAddr, more: &str) -> Self {
        // A port that was free may be somebody else's when the sidecar takes it: then others.
        for _ in 0..5 {
            let mut sidecar = Self::spawn(upstream, more);
            let end = Instant::now() + Duration::from_secs(20);
            while Instant::now() < end && sidecar.child.try_wait().unwrap().is_none() {
                if TcpStream::connect(sidecar.admin).is_ok() {
                    return sidecar;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        panic!("the sidecar did not start, on five sets of ports");
    }

    fn spawn(upstream: SocketAddr, more: &str) -> Self {
        // Held together, so that they differ; free again when the sidecar takes them.
        let free: Vec<_> = (0..2)
            .map(|_| TcpListener::bind("127.0.0.1:0").unwrap())
            .collect();
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        let [listen, admin] = [0, 1].map(|i: usize| free[i].local_addr().unwrap());
        let fixed = format!(
            "listen: {listen}\nadmin: {{ listen: {admin} }}\nupstream: http://{}\nmedia: {{ udp_port: {}, workers: 1 }}\n",
            upstream,
            udp.local_addr().unwrap().port(),
        );
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("auralink.yaml");
        fs::write(&file, format!("{fixed}{more}")).unwrap();
        drop((free, udp));
        let child = Command::new(env!("CARGO_BIN_EXE_auralink"))
            .args(["--config", file.to_str().unwrap()])
            .env_remove("RUST_LOG")
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        Self {
            child,
            file,
            fixed,
            listen,
            admin,
            _dir: dir,
        }
    }

    fn get(&self, path: &str) -> std::io::Result<String> {
        use std::io::{Read, Write};
        let mut stream = std::net::TcpStream::connect(self.admin)?;
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    }

    /// Asks until the answer holds `part`.
    fn wait_for(&self, path: &str, part: &str) -> String {
        let end = Instant::now() + Duration::from_secs(30);
        loop {
            let answer = self.get(path).unwrap_or_else(|e| e.to_string());
            if answer.contains(part) {
                return answer;
            }
            assert!(Instant::now() < end, "{part} is not in {path}:\n{answer}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Whether a client that trusts this certificate alone gets a connection.
    fn serves_with(&self, pem: &[u8]) -> bool {
        use tokio_rustls::rustls::pki_types::{CertificateDer, pem::PemObject};
        use tokio_rustls::rustls::{ClientConfig, ClientConnection, RootCertStore, crypto::ring};
        let mut roots = RootCertStore::empty();
        roots
            .add(CertificateDer::from_pem_slice(pem).unwrap())
            .unwrap();
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = "localhost".try_into().unwrap();
        let mut tls = ClientConnection::new(Arc::new(config), name).unwrap();
        let mut stream = TcpStream::connect(self.listen).unwrap();
        while tls.is_handshaking() {
            if tls.complete_io(&mut stream).is_err() {
                return false;
            }
        }
        true
    }

    fn write(&self, more: &str) {
        fs::write(&self.file, format!("{}{more}", self.fixed)).unwrap();
    }

    fn signal(&self, name: &str) {
        let done = Command::new("kill")
            .args([name, &self.child.id().to_string()])
            .status();
        assert!(done.unwrap().success());
    }
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_running_sidecar_reloads_tells_of_it_and_drains() {
    let upstream = Upstream::start();
    let mut sidecar = Sidecar::start(upstream.at, "rooms: [{match: a}]\n");
    let ready = sidecar.wait_for("/readyz", "\"ready\":true");
    assert!(ready.starts_with("HTTP/1.1 200"), "{ready}");
    assert!(
        sidecar
            .get("/status.json")
            .unwrap()
            .contains("\"generation\":1")
    );

    // By the changed file alone.
    sidecar.write("rooms: [{match: a, mode: lean}]\n");
    sidecar.wait_for("/status.json", "\"generation\":2");
    sidecar.wait_for("/metrics", "auralink_config_reloads_total{result=\"ok\"} 1");

    // Refused by name, by SIGHUP; calls go on, so it stays ready.
    sidecar.write("limits: { sessions: 5 }\nengine: { threads: 63 }\n");
    sidecar.signal("-HUP");
    let ready = sidecar.wait_for("/readyz", "last reload failed");
    assert!(
        ready.contains("engine.threads: only a restart can change it")
            && !ready.contains("limits.sessions"),
        "{ready}"
    );
    assert!(ready.starts_with("HTTP/1.1 200"), "{ready}");
    sidecar.wait_for("/metrics", "auralink_config_last_reload_failed 1");
    assert!(
        sidecar
            .get("/status.json")
            .unwrap()
            .contains("\"generation\":2")
    );

    sidecar.write("rooms: []\nlog: { level: warn }\n");
    sidecar.wait_for(
        "/status.json",
        "\"generation\":3,\"draining\":false,\"config_error\":null",
    );

    sidecar.signal("-TERM");
    assert_eq!(ended(&mut sidecar.child), Some(0));
}

/// Waits for the process to end by itself; its exit code.
fn ended(child: &mut std::process::Child) -> Option<i32> {
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        assert!(Instant::now() < end, "it does not end");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_second_signal_ends_the_drain() {
    use base64::Engine as _;
    use std::io::{Read, Write};
    let part = |json: &str| base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(json);
    let claims = r#"{"iss":"key","sub":"ann","video":{"roomJoin":true,"room":"drained"}}"#;
    let token = format!("{}.{}.c2ln", part(r#"{"alg":"HS256"}"#), part(claims));
    for second in ["-TERM", "-INT"] {
        let upstream = Upstream::start();
        let mut sidecar = Sidecar::start(upstream.at, "session: { drain_grace: 1h }\n");
        sidecar.wait_for("/readyz", "\"ready\":true");
        let listen = sidecar.fixed.lines().next().unwrap();
        let mut client = TcpStream::connect(listen.strip_prefix("listen: ").unwrap()).unwrap();
        write!(
            client,
            "GET /rtc?access_token={token} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        .unwrap();
        sidecar.wait_for("/status.json", "\"room\":\"drained\"");
        sidecar.signal("-TERM");
        sidecar.wait_for("/readyz", "\"draining\":true");
        std::thread::sleep(Duration::from_secs(1));
        let waits = sidecar.child.try_wait().unwrap();
        assert_eq!(waits, None, "there is a session");
        sidecar.signal(second);
        assert_eq!(ended(&mut sidecar.child), Some(0), "{second}");
        let mut said = Vec::new();
        client.read_to_end(&mut said).unwrap();
        let text = String::from_utf8_lossy(&said);
        assert!(text.starts_with("HTTP/1.1 101"), "{text}");
        let close = [0x03, 0xe9];
        assert!(
            said.windows(2).any(|two| two == close),
            "the client is told with 1001: {said:?}"
        );
    }
}

#[test]
fn a_sidecar_whose_livekit_says_that_it_is_not_well_is_not_ready() {
    let upstream = Upstream::start();
    let sidecar = Sidecar::start(upstream.at, "");
    sidecar.wait_for("/readyz", "\"ready\":true");
    sidecar.wait_for("/metrics", "auralink_upstream_up 1");
    // LiveKit's `Not Ready`.
    upstream.says.store(406, Ordering::SeqCst);
    let ready = sidecar.wait_for("/readyz", "\"ready\":false");
    assert!(ready.starts_with("HTTP/1.1 503"), "{ready}");
    assert!(ready.contains("says 406: LiveKit itself"), "{ready}");
    let metrics = sidecar.wait_for("/metrics", "auralink_upstream_up 0");
    for part in [
        "auralink_upstream_probes_total{result=\"up\"} ",
        "auralink_upstream_probes_total{result=\"unhealthy\"} ",
        "auralink_upstream_probe_seconds_count ",
        "auralink_upstream_last_success_timestamp_seconds 1",
        "auralink_build_info{version=\"",
        ",revision=\"",
        "process_cpu_seconds_total ",
        "process_open_fds ",
    ] {
        assert!(metrics.contains(part), "{part} is not in\n{metrics}");
    }
    upstream.says.store(200, Ordering::SeqCst);
    sidecar.wait_for("/readyz", "\"ready\":true");
}

/// Models that nobody wants are not missing.
#[test]
fn a_lean_sidecar_without_models_does_not_warn() {
    let upstream = Upstream::start();
    let sidecar = Sidecar::start(upstream.at, "defaults: { mode: lean }\n");
    sidecar.wait_for("/readyz", "{\"name\":\"engine\",\"state\":\"ok\"}");
    sidecar.wait_for("/metrics", "auralink_engine_complete 1");
    sidecar.write("defaults: { mode: lean }\nrooms: [{match: a, mode: neural}]\n");
    let ready = sidecar.wait_for("/readyz", "\"name\":\"engine\",\"state\":\"warning\"");
    assert!(ready.contains("no ONNX Runtime is configured"), "{ready}");
    sidecar.wait_for("/metrics", "auralink_engine_complete 0");
}

/// The address that a STUN server sees is told, and no start without one.
#[test]
fn an_external_address_is_asked_for() {
    use std::io::Read;
    let stun = UdpSocket::bind("127.0.0.1:0").unwrap();
    let at = stun.local_addr().unwrap();
    let answering = std::thread::spawn(move || {
        let mut request = [0; 1500];
        // One process asks, and then none for as long as this test runs.
        let (len, from) = stun.recv_from(&mut request).unwrap();
        assert_eq!((len, &request[..2]), (20, &[0, 1][..]), "a binding request");
        let port = from.port().to_be_bytes();
        let mut answer = vec![1, 1, 0, 12];
        answer.extend_from_slice(&request[4..20]);
        answer.extend_from_slice(&[0, 0x20, 0, 8, 0, 1, port[0] ^ 0x21, port[1] ^ 0x12]);
        // 203.0.113.7 under the cookie.
        answer.extend_from_slice(&[203 ^ 0x21, 0x12, 113 ^ 0xa4, 7 ^ 0x42]);
        stun.send_to(&answer, from).unwrap();
        // Silent from now on.
        stun
    });
    let upstream = Upstream::start();
    let port = || {
        let free = UdpSocket::bind("127.0.0.1:0").unwrap();
        free.local_addr().unwrap().port()
    };
    let run = |stun: SocketAddr| {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("auralink.yaml");
        let text = format!(
            "listen: 127.0.0.1:0\nadmin: {{ listen: 127.0.0.1:0 }}\nupstream: http://{}\n\
             media: {{ use_external_ip: true, stun_servers: [\"{stun}\"], udp_port: {}, workers: 1 }}\n",
            upstream.at,
            port(),
        );
        fs::write(&file, text).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_auralink"))
            .args(["--config", file.to_str().unwrap()])
            .env_remove("RUST_LOG")
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        (child, dir)
    };
    let (mut child, _dir) = run(at);
    let mut said = String::new();
    let mut err = child.stderr.take().unwrap();
    while !said.contains("serving") {
        let mut some = [0; 1024];
        let len = err.read(&mut some).unwrap();
        assert!(len > 0, "{said}");
        said.push_str(&String::from_utf8_lossy(&some[..len]));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(said.contains("external=203.0.113.7"), "{said}");
    assert!(
        said.contains("local=127.0.0.1"),
        "by the way to the server: {said}"
    );
    assert!(said.contains("does not come back"), "{said}");

    let _silent = answering.join().unwrap();
    let (mut child, _dir) = run(at);
    assert_eq!(ended(&mut child), Some(1));
    let mut said = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut said)
        .unwrap();
    assert!(
        said.contains("media.use_external_ip: no STUN server told"),
        "{said}"
    );
    assert!(said.contains(&format!("no answer from {at}")), "{said}");
}

/// A warning of `--check` stands once in the log of a start, as a line of the log.
#[test]
fn a_start_warns_as_the_check_does() {
    let upstream = Upstream::start();
    let more =
        "log: { format: json }\nrooms: [{ match: a }, { match: a }, { match: b, mode: neural }]\n";
    let mut sidecar = Sidecar::start(upstream.at, more);
    sidecar.wait_for("/readyz", "\"ready\":true");
    sidecar.signal("-TERM");
    let mut log = String::new();
    let stderr = sidecar.child.stderr.take();
    std::io::Read::read_to_string(&mut stderr.unwrap(), &mut log).unwrap();
    for warning in ["rooms[1]: is never reached", "rooms[2]: asks for rung L2"] {
        let lines: Vec<_> = log.lines().filter(|line| line.contains(warning)).collect();
        assert!(
            lines.len() == 1 && lines[0].starts_with('{'),
            "{warning}: {log}"
        );
    }
}

/// Over TLS, as LiveKit's clients come: whose certificate the sidecar shows.
#[test]
fn a_renewed_certificate_is_served_without_a_restart() {
    let upstream = Upstream::start();
    let dir = tempfile::tempdir().unwrap();
    let [cert, key, other] = certify(dir.path(), &["localhost"]);
    let tls = format!(
        "tls: {{ cert: {}, key: {} }}\n",
        cert.display(),
        key.display()
    );
    let sidecar = Sidecar::start(upstream.at, &tls);
    let ready = sidecar.wait_for("/readyz", "\"ready\":true");
    assert!(
        ready.contains("\"name\":\"tls\",\"state\":\"ok\""),
        "{ready}"
    );
    sidecar.wait_for(
        "/metrics",
        "auralink_tls_certificate_not_after_timestamp_seconds ",
    );

    // The key of another one: the old certificate stays, and that is said.
    let [old, new] = [&cert, &dir.path().join("b.crt")].map(|file| fs::read(file).unwrap());
    fs::copy(&other, &key).unwrap();
    let ready = sidecar.wait_for("/readyz", "does not fit the certificate");
    assert!(ready.starts_with("HTTP/1.1 200") && ready.contains("\"state\":\"warning\""));
    sidecar.wait_for("/metrics", "auralink_tls_last_reload_failed 1");
    assert!(sidecar.serves_with(&old) && !sidecar.serves_with(&new));
    // The pair that belongs together.
    fs::write(&cert, &new).unwrap();
    sidecar.wait_for("/metrics", "auralink_tls_last_reload_failed 0");
    sidecar.wait_for("/metrics", "auralink_tls_reloads_total{result=\"ok\"} 1");
    let end = Instant::now() + Duration::from_secs(30);
    while !sidecar.serves_with(&new) {
        assert!(Instant::now() < end, "still the old certificate");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(!sidecar.serves_with(&old));
}

#[test]
fn a_sidecar_whose_upstream_is_gone_is_not_ready() {
    let upstream = Upstream::start();
    let sidecar = Sidecar::start(upstream.at, "");
    sidecar.wait_for("/readyz", "\"ready\":true");
    drop(upstream);
    let ready = sidecar.wait_for("/readyz", "\"ready\":false");
    assert!(ready.starts_with("HTTP/1.1 503"), "{ready}");
    assert!(
        ready.contains("\"name\":\"upstream\",\"state\":\"failed\",\"detail\":\"http://127.0.0.1:"),
        "{ready}"
    );
    assert!(
        sidecar.get("/healthz").unwrap().starts_with("HTTP/1.1 200"),
        "the process itself is well"
    );
}

#[test]
fn a_sidecar_whose_upstream_accepts_and_hangs_is_not_ready() {
    let upstream = TcpListener::bind("127.0.0.1:0").unwrap();
    let sidecar = Sidecar::start(upstream.local_addr().unwrap(), "");
    sidecar.wait_for("/readyz", "does not answer");
    // For two rounds of knocking and more.
    let end = Instant::now() + Duration::from_secs(5);
    while Instant::now() < end {
        let ready = sidecar.get("/readyz").unwrap();
        assert!(ready.starts_with("HTTP/1.1 503"), "{ready}");
        std::thread::sleep(Duration::from_millis(200));
    }
}
