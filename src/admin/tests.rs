#![allow(clippy::unwrap_used)]

use super::metrics::tests::recorder;
use super::status::{
    LegStatus, PcStatus, SessionStatus, Signalling, Totals, Traffic, WorkerStatus,
};
use super::*;
use ::metrics::counter;
use std::collections::BTreeMap;
use std::sync::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

struct Source(Mutex<Readiness>);

impl StatusSource for Source {
    fn snapshot(&self) -> Status {
        let leg = |state, remote: &str| LegStatus {
            state,
            remote: Some(remote.into()),
            protocol: Some("udp"),
            srtp: Some("AEAD_AES_128_GCM"),
        };
        let up = Traffic {
            rtp_packets: 9,
            bytes: 20,
            bytes_native: 100,
            ..Traffic::default()
        };
        let pc = PcStatus {
            target: "publisher",
            client_leg: leg("established", "198.51.x.x"),
            server_leg: leg("handshaking", "127.0.0.1:7882"),
            up,
            ..PcStatus::default()
        };
        Status {
            version: "1.2.3",
            uptime_s: 5,
            generation: 2,
            workers: vec![WorkerStatus {
                alive: true,
                ..WorkerStatus::default()
            }],
            sessions: vec![SessionStatus {
                id: 1,
                room: "<b>".into(),
                mode: "lean",
                signalling: Signalling::Open,
                pcs: vec![pc],
                ..SessionStatus::default()
            }],
            totals: Totals {
                sessions: BTreeMap::from([("lean", 3)]),
                up,
                drops: BTreeMap::from([("unauthentic", 4)]),
                ..Totals::default()
            },
            ..Status::default()
        }
    }

    fn readiness(&self) -> Readiness {
        self.0.lock().unwrap().clone()
    }
}

fn check(state: CheckState, detail: &str) -> Check {
    Check {
        name: "config",
        state,
        detail: detail.into(),
    }
}

/// What one connection answers to `request`, until it is closed.
async fn ask(address: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    String::from_utf8(answer).unwrap()
}

async fn get(address: SocketAddr, path: &str) -> String {
    ask(
        address,
        &format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"),
    )
    .await
}

#[tokio::test]
async fn every_page() {
    // The recorder of this thread, on which the whole test runs.
    let recorder = recorder();
    let _guard = ::metrics::set_default_local_recorder(&recorder);
    counter!("auralink_faults_total", "side" => "client", "what" => "malformed").increment(2);
    let source = Arc::new(Source(Mutex::default()));
    let rooms = Rooms::new(1);
    let _in_room = rooms.enter("r1");
    let admin = Admin {
        source: source.clone(),
        metrics: recorder.handle(),
        rooms,
    };
    let bound = bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = bound.local_addr().unwrap();
    let taken = bind(address).err().unwrap().to_string();
    assert!(
        taken.starts_with(&format!("admin.listen: {address} cannot be listened on")),
        "{taken}"
    );

    let serving = tokio::spawn(serve(bound, Arc::new(admin)));
    assert!(get(address, "/healthz").await.starts_with("HTTP/1.1 200"));
    assert!(get(address, "/nowhere").await.starts_with("HTTP/1.1 404"));
    let post = ask(
        address,
        "POST /status.json HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
    )
    .await;
    assert!(
        post.starts_with("HTTP/1.1 405") && post.contains("allow: GET, HEAD, OPTIONS"),
        "{post}"
    );
    let head = ask(
        address,
        "HEAD /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    )
    .await;
    assert!(
        head.contains("content-length: 3") && head.ends_with("\r\n\r\n"),
        "{head}"
    );

    let ready = get(address, "/readyz").await;
    assert!(
        ready.starts_with("HTTP/1.1 200") && ready.contains("\"ready\":true"),
        "{ready}"
    );
    source.0.lock().unwrap().checks = vec![check(CheckState::Warning, "last reload failed: x")];
    let ready = get(address, "/readyz").await;
    assert!(ready.starts_with("HTTP/1.1 200"), "calls go on: {ready}");
    assert!(
        ready.contains(r#""state":"warning","detail":"last reload failed: x""#),
        "{ready}"
    );
    source.0.lock().unwrap().checks = vec![check(CheckState::Failed, "")];
    assert!(get(address, "/readyz").await.starts_with("HTTP/1.1 503"));
    // HAProxy's own check, as it is sent where nothing is said of it; and one that asks for readiness.
    for (request, status) in [
        ("OPTIONS / HTTP/1.0\r\n\r\n", "HTTP/1.0 200"),
        ("OPTIONS /healthz HTTP/1.0\r\n\r\n", "HTTP/1.0 200"),
        ("OPTIONS /readyz HTTP/1.0\r\n\r\n", "HTTP/1.0 503"),
        ("OPTIONS /nowhere HTTP/1.0\r\n\r\n", "HTTP/1.0 404"),
    ] {
        let options = ask(address, request).await;
        assert!(options.starts_with(status), "{request}: {options}");
        assert!(options.contains("allow: GET, HEAD, OPTIONS"), "{options}");
        assert!(options.ends_with("\r\n\r\n"), "no body: {options}");
    }
    *source.0.lock().unwrap() = Readiness {
        draining: true,
        checks: vec![],
    };
    let ready = get(address, "/readyz").await;
    assert!(
        ready.starts_with("HTTP/1.1 503") && ready.contains("\"draining\":true"),
        "{ready}"
    );

    let status = get(address, "/status.json").await;
    let (_, body) = status.split_once("\r\n\r\n").unwrap();
    let json: serde_json::Value = serde_json::from_str(body).unwrap();
    assert_eq!(json["sessions"][0]["pcs"][0]["up"]["bytes_native"], 100);
    assert_eq!(json["sessions"][0]["signalling"], "open");
    assert_eq!(json["sessions"][0]["room"], "<b>");

    let metrics = get(address, "/metrics").await;
    for line in [
        "auralink_faults_total{side=\"client\",what=\"malformed\"} 2",
        "auralink_packets_total{direction=\"up\",kind=\"rtp\"} 9",
        "auralink_native_bytes_total{direction=\"up\"} 100",
        "auralink_legs{side=\"server\",state=\"handshaking\"} 1",
        "auralink_sessions{mode=\"lean\"} 1",
        "auralink_sessions{mode=\"off\"} 0",
        "auralink_sessions_total{mode=\"lean\"} 3",
        "auralink_drops_total{reason=\"unauthentic\"} 4",
        "auralink_room_sessions{room=\"r1\"} 1",
    ] {
        assert!(
            metrics.lines().any(|l| l == line),
            "{line} is not in\n{metrics}"
        );
    }
    assert!(metrics.contains("text/plain; version=0.0.4"), "{metrics}");
    let resident = metrics
        .lines()
        .find_map(|line| line.strip_prefix("process_resident_memory_bytes "))
        .and_then(|bytes| bytes.parse::<f64>().ok());
    assert!(resident.is_some_and(|bytes| bytes > 1e6), "{metrics}");

    let page = get(address, "/").await;
    assert!(
        page.contains("content-security-policy: default-src 'none'"),
        "{page}"
    );
    assert!(page.contains("status.json"));
    assert!(
        !page.contains("innerHTML"),
        "names are strangers': only textContent"
    );

    // A header that does not fit, and one that never comes whole, end their connection only.
    let long = format!(
        "GET / HTTP/1.1\r\nX: {}\r\n\r\n",
        "x".repeat(MAX_HEADER_BYTES)
    );
    assert!(ask(address, &long).await.starts_with("HTTP/1.1 431"));
    assert!(
        ask(address, "no http\r\n\r\n")
            .await
            .starts_with("HTTP/1.1 400")
    );
    let mut slow = TcpStream::connect(address).await.unwrap();
    slow.write_all(b"GET /healthz HT").await.unwrap();
    assert!(get(address, "/healthz").await.starts_with("HTTP/1.1 200"));
    serving.abort();
}

/// A source that answers when it is let.
struct Hanging(
    std::sync::mpsc::Sender<()>,
    Mutex<std::sync::mpsc::Receiver<()>>,
);

impl StatusSource for Hanging {
    fn snapshot(&self) -> Status {
        let _ = self.0.send(());
        let _ = self.1.lock().unwrap().recv();
        Status::default()
    }
    fn readiness(&self) -> Readiness {
        let _ = self.snapshot();
        Readiness::default()
    }
}

fn started(source: Arc<dyn StatusSource>) -> SocketAddr {
    let bound = bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = bound.local_addr().unwrap();
    let admin = Admin {
        source,
        metrics: recorder().handle(),
        rooms: Rooms::new(1),
    };
    let _serving = start(bound, Arc::new(admin)).unwrap();
    address
}

/// More silent connections than there is room for, some with half a request, take nothing from a probe; nor does what a snapshot
/// waits for. The test's own runtime has one thread, so that the listener's own is what answers.
#[tokio::test]
async fn health_is_answered_whatever_the_rest_does() {
    let (begun, asked) = std::sync::mpsc::channel();
    let (let_go, gate) = std::sync::mpsc::channel();
    let address = started(Arc::new(Hanging(begun, Mutex::new(gate))));
    let mut silent = Vec::new();
    for n in 0..2 * MAX_CONNECTIONS {
        let mut stream = TcpStream::connect(address).await.unwrap();
        if n % 2 == 0 {
            stream.write_all(b"GET /healthz HT").await.unwrap();
        }
        silent.push(stream);
    }
    // As many as there are threads for, and one more.
    let mut waiting = Vec::new();
    for _ in 0..=MAX_QUESTIONS {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream
            .write_all(b"GET /status.json HTTP/1.1\r\nHost: x\r\n\r\n")
            .await
            .unwrap();
        waiting.push(stream);
    }
    asked.recv().unwrap();
    for _ in 0..3 {
        assert!(get(address, "/healthz").await.starts_with("HTTP/1.1 200"));
    }
    let ready = get(address, "/readyz").await;
    assert!(ready.starts_with("HTTP/1.1 503"), "{ready}");
    // The oldest had to go, the youngest are there.
    let mut end = Vec::new();
    let gone = tokio::time::timeout(HEADER_TIMEOUT / 2, silent[0].read_to_end(&mut end));
    assert!(
        gone.await.is_ok(),
        "for others, and not because its own time was over"
    );
    assert!(end.is_empty());
    let last = silent.last_mut().unwrap();
    last.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        .await
        .unwrap();
    last.read_to_end(&mut end).await.unwrap();
    assert!(end.starts_with(b"HTTP/1.1 200"));
    drop(let_go);
}
