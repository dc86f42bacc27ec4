//! No spelling of a path is a way around the pump, or out of the upstream's base path.

use super::*;

fn upgrade(target: &str) -> String {
    format!(
        "GET {target} HTTP/1.1\r\nHost: s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
}

/// The status of an upgrade.
async fn status(sidecar: &Sidecar, target: &str) -> u16 {
    let mut tcp = sidecar.tcp().await;
    tcp.write_all(upgrade(target).as_bytes()).await.unwrap();
    let head = head(&mut tcp).await;
    head.split(' ').nth(1).unwrap().parse().unwrap()
}

/// An upstream that takes every path for a session's, as a proxy that rewrites them might.
async fn anything() -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/base", listener.local_addr().unwrap());
    tokio::spawn(async move {
        loop {
            let (mut tcp, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let asked = head(&mut tcp).await;
                let target = asked.split(' ').nth(1).unwrap();
                assert!(target.starts_with("/base/"), "{target}");
                let answer = if asked.starts_with("POST") {
                    "HTTP/1.1 201 Created\r\nLocation: /whip/v1/PA_1\r\nContent-Type: application/sdp\r\nContent-Length: 3\r\n\r\nsdp"
                } else {
                    "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
                     Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
                };
                tcp.write_all(answer.as_bytes()).await.unwrap();
                let _ = tcp.read_to_end(&mut Vec::new()).await;
            });
        }
    });
    url
}

#[tokio::test]
async fn a_websocket_is_a_session_or_a_worker_s_or_none() {
    let sidecar = Sidecar::start(&anything().await, |_| {}).await;
    for target in [
        "/rtc",
        "/rtc?access_token=x",
        "//rtc",
        "/rtc/",
        "/%72tc",
        "/livekit/sfu/rtc",
        "/livekit/sfu/rtc/v1?join_request=x",
        "/a%2Frtc",
        "http://somebody.example/rtc",
        "http://somebody.example/x/rtc/v1",
    ] {
        let before = sidecar.told.count("open");
        assert_eq!(status(&sidecar, target).await, 101, "{target}");
        assert_eq!(sidecar.told.count("open"), before + 1, "{target}");
    }
    let opened = sidecar.told.count("open");
    assert_eq!(status(&sidecar, "/agent").await, 101);
    assert_eq!(status(&sidecar, "/livekit/agent?x=1").await, 101);
    for target in [
        "/",
        "/RTC",
        "/rtc2",
        "/sfu",
        "/rtc/validate",
        "/%61gent",
        "/agent/",
        "/whip/v1/%72tc",
        "/rtc;x/agent",
    ] {
        assert_eq!(status(&sidecar, target).await, 404, "{target}");
    }
    for target in ["/rtc/../rtc", "/x/%2e%2e/agent", "/..%2fagent"] {
        assert_eq!(status(&sidecar, target).await, 400, "{target}");
    }
    assert_eq!(
        sidecar.told.count("open"),
        opened,
        "nothing else is a session"
    );
}

#[tokio::test]
async fn a_whip_session_by_a_path_that_nobody_knows_is_none() {
    let sidecar = Sidecar::start(&anything().await, |_| {}).await;
    let post = |target: &str| {
        format!(
            "POST {target} HTTP/1.1\r\nHost: s\r\nConnection: close\r\nContent-Length: 5\r\n\r\noffer"
        )
    };
    let answer = sidecar.raw(&post("/publish")).await;
    assert!(
        answer.starts_with("HTTP/1.1 404") && !answer.contains("sdp"),
        "{answer}"
    );
    let answer = sidecar.raw(&post("/lk/whip/v1")).await;
    assert!(answer.starts_with("HTTP/1.1 201"), "{answer}");
    assert_eq!(sidecar.told.count("whip"), 1);
}

#[tokio::test]
async fn nothing_leaves_the_base_path() {
    let origin = Origin::start().await;
    let sidecar = Sidecar::start(&format!("{}/base", origin.url()), |_| {}).await;
    for target in [
        "/../admin",
        "/%2e%2e/admin",
        "/..%2fadmin",
        "/..%5cadmin",
        "/x/..\\..\\..\\admin",
        "/%252e%252e%252fadmin",
        "/..;/admin",
        "http://s/../admin",
    ] {
        let answer = sidecar.get(target).await;
        assert!(
            answer.starts_with("HTTP/1.1 400") && answer.contains(r#""side":"client""#),
            "{target}: {answer}"
        );
    }
    assert_eq!(origin.told.count("GET"), 0, "{:?}", origin.told.all());
    sidecar.get("//..a/x%20y").await;
    origin.told.wait("GET /base//..a/x%20y").await;
}
