//! Against the stock LiveKit server: the same requests with and without the sidecar must be answered alike.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use super::*;
use serde_json::json;
use tokio_tungstenite::tungstenite::Error;

const KEY: &str = "devkey";
const SECRET: &str = "secret-of-at-least-32-chars-for-auralink-tests";

/// A stock server on free ports of its own.
struct LiveKit {
    process: Child,
    port: u16,
    _dir: tempfile::TempDir,
}

impl Drop for LiveKit {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A port that was free a moment ago.
fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

impl LiveKit {
    async fn start() -> LiveKit {
        let cache = std::env::var_os("XDG_CACHE_HOME")
            .map(PathBuf::from)
            .unwrap_or_else(|| PathBuf::from(std::env::var_os("HOME").unwrap()).join(".cache"));
        let server = cache.join("auralink/livekit-server-v1.13.5/livekit-server");
        assert!(
            server.is_file(),
            "{} is missing: scripts/setup.sh server builds it",
            server.display()
        );
        let config = concat!(env!("CARGO_MANIFEST_DIR"), "/livekit/livekit.yaml");
        let mut config: serde_yaml::Value =
            serde_yaml::from_str(&std::fs::read_to_string(config).unwrap()).unwrap();
        let port = free_port();
        config["port"] = port.into();
        config["rtc"]["udp_port"] = free_port().into();
        config["rtc"]["tcp_port"] = free_port().into();
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("livekit.yaml");
        std::fs::write(&file, serde_yaml::to_string(&config).unwrap()).unwrap();
        let log = std::fs::File::create(dir.path().join("log")).unwrap();
        let process = Command::new(server)
            .arg("--config")
            .arg(&file)
            .stdout(log.try_clone().unwrap())
            .stderr(Stdio::from(log))
            .spawn()
            .unwrap();
        let server = LiveKit {
            process,
            port,
            _dir: dir,
        };
        let up = async {
            while TcpStream::connect(("127.0.0.1", port)).await.is_err() {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        soon("livekit-server to start", up).await;
        server
    }

    fn at(&self) -> SocketAddr {
        ([127, 0, 0, 1], self.port).into()
    }
}

fn token(identity: &str, grant: serde_json::Value) -> String {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_secs();
    let claims =
        json!({"iss": KEY, "sub": identity, "nbf": now - 60, "exp": now + 600, "video": grant});
    let key = jsonwebtoken::EncodingKey::from_secret(SECRET.as_bytes());
    jsonwebtoken::encode(&jsonwebtoken::Header::default(), &claims, &key).unwrap()
}

fn join_token(identity: &str) -> String {
    token(identity, json!({"roomJoin": true, "room": "signal"}))
}

/// One request as it is written, its answer without what differs by the clock.
async fn ask(at: SocketAddr, request: &str) -> String {
    let mut tcp = TcpStream::connect(at).await.unwrap();
    tcp.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    soon("an answer", tcp.read_to_end(&mut answer))
        .await
        .unwrap();
    let answer = String::from_utf8(answer).unwrap();
    let timeless = |line: &&str| {
        let line = line.to_ascii_lowercase();
        !line.starts_with("date:") && !line.starts_with("connection:")
    };
    answer
        .split("\r\n")
        .filter(timeless)
        .collect::<Vec<_>>()
        .join("\r\n")
}

#[tokio::test]
async fn answers_are_the_same_with_and_without_the_sidecar() {
    let livekit = LiveKit::start().await;
    let sidecar = Sidecar::start(&format!("http://{}", livekit.at()), |_| {}).await;
    let good = join_token("alice");
    let upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                   Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
    let plain = "Connection: close\r\n";
    let body = r#"{"name":"a room of one's own"}"#;
    let create = token("", json!({"roomCreate": true}));
    let twirp = format!(
        "Authorization: Bearer {create}\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: {}\r\n",
        body.len()
    );
    let cors = "Origin: https://app.example\r\nConnection: close\r\n";
    let preflight = "Origin: https://app.example\r\nAccess-Control-Request-Method: POST\r\n\
                     Access-Control-Request-Headers: authorization\r\nConnection: close\r\n";
    for (line, fields, body, status) in [
        ("GET / ", plain, "", "200"),
        ("GET /no/such/path ", plain, "", "404"),
        ("GET /rtc/validate ", cors, "", "401"),
        (
            &format!("GET /rtc/validate?access_token={good} "),
            cors,
            "",
            "200",
        ),
        (
            "GET /rtc/v1/validate?access_token=nonsense ",
            cors,
            "",
            "401",
        ),
        ("OPTIONS /rtc/validate ", preflight, "", "204"),
        ("OPTIONS /whip/v1 ", preflight, "", "204"),
        ("POST /whip/v1 ", plain, "", ""),
        (&format!("GET /rtc?access_token={good} "), plain, "", ""),
        (
            "POST /twirp/livekit.RoomService/CreateRoom ",
            &twirp,
            body,
            "200",
        ),
        (
            "POST /twirp/livekit.RoomService/NoSuchMethod ",
            &twirp,
            body,
            "",
        ),
        // Upgrades that LiveKit refuses.
        ("GET /rtc?access_token=nonsense ", upgrade, "", "401"),
        (
            "GET /rtc/v1?join_request=AAAA&access_token=nonsense ",
            upgrade,
            "",
            "401",
        ),
        ("GET /agent ", upgrade, "", "401"),
        ("GET //rtc ", upgrade, "", ""),
    ] {
        let request = format!("{line}HTTP/1.1\r\nHost: livekit.example\r\n{fields}\r\n{body}");
        let request = if fields == upgrade {
            // A refusal leaves the connection open: the next request ends it.
            format!("{request}GET /end HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        } else {
            request
        };
        let direct = ask(livekit.at(), &request).await;
        let through = ask(sidecar.at, &request).await;
        assert!(
            direct.starts_with(&format!("HTTP/1.1 {status}")),
            "{line}: {direct}"
        );
        if line.contains("CreateRoom") {
            // The room exists the second time, under the same SID.
            let tail = |answer: &str| answer.split_once("\r\n\r\n").unwrap().1.to_owned();
            let (direct, through) = (tail(&direct), tail(&through));
            assert!(through.contains("a room of one's own"), "{through}");
            assert_eq!(direct, through);
        } else {
            assert_eq!(direct, through, "{line}");
        }
    }
    assert_eq!(sidecar.told.count("accepted"), 0);
    assert_eq!(sidecar.told.count("refused"), sidecar.told.count("open"));
}

#[tokio::test]
async fn a_session_is_joined_pinged_and_left() {
    let livekit = LiveKit::start().await;
    let sidecar = Sidecar::start(&format!("http://{}", livekit.at()), |_| {}).await;
    let target = |id: &str| {
        format!(
            "/rtc?access_token={}&protocol=16&sdk=go&version=2.0&auto_subscribe=1",
            join_token(id)
        )
    };
    let mut ws = sidecar.websocket(&target("alice")).await;
    let Some(Message::Binary(join)) = next(&mut ws).await else {
        panic!("no JoinResponse");
    };
    // SignalResponse.join is field 1; room and identity are in it as text.
    assert_eq!(join[0], 0x0a);
    let holds = |text: &str| join.windows(text.len()).any(|w| w == text.as_bytes());
    assert!(holds("signal") && holds("alice"));
    sidecar.told.wait("accepted").await;
    sidecar
        .told
        .wait(&format!("server binary {}", join.len()))
        .await;

    // A ping of the WebSocket's own: the pong is the server's.
    ws.send(Message::Ping("are you there".into()))
        .await
        .unwrap();
    let pong = async {
        while let Some(message) = next(&mut ws).await {
            if message == Message::Pong("are you there".into()) {
                return true;
            }
        }
        false
    };
    assert!(pong.await);

    // A ping of the protocol's, in JSON: the server answers in JSON. SignalRequest.ping_req, SignalResponse.pong_resp.
    say(&mut ws, r#"{"pingReq":{"timestamp":"7","rtt":"0"}}"#).await;
    let answer = async {
        while let Some(message) = next(&mut ws).await {
            if let Message::Text(text) = message
                && text.contains("pongResp")
            {
                return text.to_string();
            }
        }
        String::new()
    };
    assert!(answer.await.contains(r#""lastPingTimestamp":"7""#));
    sidecar.told.wait("client text {\"pingReq\"").await;

    // The same identity joins again: LiveKit ends the first session, and its own way of closing comes through.
    let _second = sidecar.websocket(&target("alice")).await;
    let code = closing(&mut ws).await.map(|(code, _)| code);
    assert_eq!(code, Some(1000));
    sidecar.told.wait("closed Upstream Some(1000)").await;
}

#[tokio::test]
async fn a_server_that_dies_looks_the_same_through_the_sidecar() {
    let mut livekit = LiveKit::start().await;
    let sidecar = Sidecar::start(&format!("http://{}", livekit.at()), |_| {}).await;
    let mut ws = sidecar
        .websocket(&format!(
            "/rtc?access_token={}&protocol=16",
            join_token("bob")
        ))
        .await;
    assert!(matches!(next(&mut ws).await, Some(Message::Binary(_))));
    livekit.process.kill().unwrap();
    livekit.process.wait().unwrap();
    assert_eq!(closing(&mut ws).await, None, "1006, as without the sidecar");
    sidecar.told.wait("closed Upstream None").await;
    let Err(Error::Http(answer)) = sidecar.try_websocket("/rtc").await else {
        panic!("a session without a server");
    };
    assert_eq!(answer.status(), 502);
}

/// Whatever spelling the real server takes for a session's path: through the sidecar it is one that is edited, or none.
#[tokio::test]
async fn no_spelling_that_the_server_takes_is_unedited() {
    let livekit = LiveKit::start().await;
    let sidecar = Sidecar::start(&format!("http://{}", livekit.at()), |_| {}).await;
    let good = join_token("alice");
    let status = async |at: SocketAddr, target: &str| -> u16 {
        let request = format!(
            "GET {target} HTTP/1.1\r\nHost: s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
             Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        );
        let mut tcp = TcpStream::connect(at).await.unwrap();
        tcp.write_all(request.as_bytes()).await.unwrap();
        let head = head(&mut tcp).await;
        head.split(' ').nth(1).unwrap().parse().unwrap()
    };
    let mut taken = 0;
    for path in [
        "/rtc",
        "//rtc",
        "///rtc",
        "/rtc/",
        "/rtc//",
        "/./rtc",
        "/rtc/.",
        "/x/../rtc",
        "/%72tc",
        "/%52tc",
        "/RTC",
        "/rtc%20",
        "/rtc%00",
        "/%2frtc",
        "/%2Frtc",
        "//%72tc",
        "/rtc%2f",
        "/rtc;x",
        "/rtc;x=y",
        "/%2e/rtc",
        "/x/%2e%2e/rtc",
        "\\rtc",
        "/\\rtc",
        "/%5crtc",
        "/rtc#x",
        "/rtc%23",
        "/%2572tc",
        "/rtc/v1",
        "//rtc/v1",
        "/rtc//v1",
        "/rtc/v1/",
        "/rtc%2fv1",
        "/%72%74%63",
        "http://x/rtc",
        "http://x//rtc",
        "ws://x/rtc",
        "http://x:1/%72tc",
        "//x/rtc",
        "/agent/../rtc",
        "/agent/..%2frtc",
        "/rtc/agent",
        "/livekit/sfu/rtc",
    ] {
        let target = format!("{path}?access_token={good}&protocol=16");
        let direct = status(livekit.at(), &target).await;
        let before = sidecar.told.count("open");
        let through = status(sidecar.at, &target).await;
        taken += usize::from(direct == 101);
        let edited = sidecar.told.count("open") > before;
        assert!(through != 101 || edited, "{path}: {direct} and {through}");
    }
    assert!(taken >= 4, "{taken} spellings are the server's");
}
