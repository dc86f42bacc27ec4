//! Plain requests and opaque upgrades.

use std::sync::atomic::Ordering;

use super::*;

#[tokio::test]
async fn a_request_and_its_answer_pass_unchanged() {
    let origin = Origin::start().await;
    let sidecar = Sidecar::before(&origin).await;
    let answer = sidecar
        .raw(
            "PATCH /./teapot//?a=%20b&access_token=secret HTTP/1.1\r\nHost: sidecar:1\r\nX-Odd-CASE: 1\r\n\
             Origin: https://app.example\r\nX-Forwarded-For: 10.9.8.7\r\nTE: trailers\r\nConnection: close, X-Hop\r\nX-Hop: 1\r\n\r\n",
        )
        .await;
    assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
    let asked = origin.told.all();
    for line in [
        // The target as it was, not tidied.
        "PATCH /./teapot//?a=%20b&access_token=secret",
        "origin: https://app.example",
        "x-forwarded-for: 10.9.8.7, 127.0.0.1",
        "x-forwarded-proto: http",
        "x-forwarded-host: sidecar:1",
        "x-odd-case: 1",
        &format!("host: {}", origin.at),
    ] {
        assert!(
            asked.iter().any(|l| l == line),
            "{line} is missing in {asked:#?}"
        );
    }
    for field in ["x-hop", "te:", "connection:"] {
        assert_eq!(origin.told.count(field), 0, "{field} is for one hop only");
    }
    let answer = sidecar.get("/teapot").await;
    assert!(
        answer.starts_with("HTTP/1.1 418 I'm a teapot\r\n"),
        "{answer}"
    );
    assert!(
        answer.contains("set-cookie: a=1\r\n") && answer.contains("set-cookie: b=2\r\n"),
        "{answer}"
    );
    assert!(
        !answer.contains("keep-alive") && answer.ends_with("\r\n\r\nshort and stout"),
        "{answer}"
    );
}

#[tokio::test]
async fn header_names_keep_their_case() {
    // A one-shot server which keeps the raw bytes: hyper would hide the case.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/base/", listener.local_addr().unwrap());
    let server = tokio::spawn(async move {
        let (mut tcp, _) = listener.accept().await.unwrap();
        let asked = head(&mut tcp).await;
        let answer = "HTTP/1.1 200 Fine By Me\r\nX-TwirP: Yes\r\nContent-Length: 0\r\n\r\n";
        tcp.write_all(answer.as_bytes()).await.unwrap();
        asked
    });
    let sidecar = Sidecar::start(&url, |_| {}).await;
    let answer = sidecar
        .raw("GET /x HTTP/1.1\r\nHost: s\r\nAUTHorization: Bearer t\r\nConnection: close\r\n\r\n")
        .await;
    let asked = server.await.unwrap();
    assert!(asked.starts_with("GET /base/x HTTP/1.1\r\n"), "{asked}");
    assert!(asked.contains("\r\nAUTHorization: Bearer t\r\n"), "{asked}");
    assert!(
        answer.starts_with("HTTP/1.1 200 Fine By Me\r\n"),
        "{answer}"
    );
    assert!(answer.contains("X-TwirP: Yes\r\n"), "{answer}");
}

#[tokio::test]
async fn bodies_stream_both_ways() {
    let origin = Origin::start().await;
    let sidecar = Sidecar::before(&origin).await;
    let mut tcp = sidecar.tcp().await;
    tcp.write_all(
        b"POST /echo HTTP/1.1\r\nHost: s\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n",
    )
    .await
    .unwrap();
    let answer = head(&mut tcp).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let mut chunk = [0; 8];
    soon("the first chunk", tcp.read_exact(&mut chunk))
        .await
        .unwrap();
    assert_eq!(&chunk, b"3\r\none\r\n", "before the request has ended");
    tcp.write_all(b"3\r\ntwo\r\n0\r\n\r\n").await.unwrap();
    let mut rest = [0; 13];
    soon("the rest", tcp.read_exact(&mut rest)).await.unwrap();
    assert_eq!(&rest, b"3\r\ntwo\r\n0\r\n\r\n");
    // And the connection serves on, over the same connection upstream.
    tcp.write_all(b"GET /teapot HTTP/1.1\r\nHost: s\r\n\r\n")
        .await
        .unwrap();
    assert!(head(&mut tcp).await.starts_with("HTTP/1.1 418"));
    assert_eq!(origin.told.count("connection"), 1);
}

#[tokio::test]
async fn a_slow_reader_holds_back_the_upstream() {
    let origin = Origin::start().await;
    let sidecar = Sidecar::before(&origin).await;
    let mut tcp = sidecar.tcp().await;
    tcp.write_all(b"GET /endless HTTP/1.1\r\nHost: s\r\n\r\n")
        .await
        .unwrap();
    let stalled = async {
        let mut before = usize::MAX;
        loop {
            tokio::time::sleep(Duration::from_millis(300)).await;
            let now = origin.taken.load(Ordering::Relaxed);
            if now == before && now > 0 {
                return now;
            }
            before = now;
        }
    };
    let held = soon("the upstream to be held back", stalled).await;
    // Four socket buffers of loopback; without backpressure it would be hundreds of megabytes by now.
    assert!(
        held < 32 << 20,
        "{held} bytes were taken from a client that reads nothing"
    );
    let mut sink = vec![0; 1 << 20];
    for _ in 0..(held >> 20) + 8 {
        soon("bytes", tcp.read_exact(&mut sink)).await.unwrap();
    }
    assert!(
        origin.taken.load(Ordering::Relaxed) > held,
        "it goes on when the client reads"
    );
}

#[tokio::test]
async fn an_upstream_that_is_down_is_said_to_be() {
    let free = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let sidecar = Sidecar::start(&format!("http://{free}"), |_| {}).await;
    let answer = sidecar.get("/rtc/validate?access_token=secret").await;
    assert!(
        answer.starts_with("HTTP/1.1 502 Bad Gateway\r\n"),
        "{answer}"
    );
    assert!(
        answer.contains("content-type: application/json\r\n"),
        "{answer}"
    );
    let body: serde_json::Value =
        serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap();
    assert_eq!(
        (body["side"].as_str(), body["what"].as_str()),
        (Some("upstream"), Some("unreachable"))
    );
    assert!(
        !answer.contains("secret") && !answer.contains(&free.port().to_string()),
        "{answer}"
    );
    let Err(tokio_tungstenite::tungstenite::Error::Http(answer)) =
        sidecar.try_websocket("/rtc?x=1").await
    else {
        panic!("a session without an upstream");
    };
    assert_eq!(answer.status(), 502);
    sidecar.told.wait("closed Upstream None").await;
    assert_eq!(
        sidecar.told.all()[1..],
        ["refused 502", "closed Upstream None"]
    );
}

#[tokio::test]
async fn an_upstream_that_talks_nonsense_or_hangs_up_is_502() {
    for (says, what) in [("220 smtp.example ESMTP\r\n", "bad_answer"), ("", "lost")] {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move {
            let (mut tcp, _) = listener.accept().await.unwrap();
            head(&mut tcp).await;
            tcp.write_all(says.as_bytes()).await.unwrap();
        });
        let answer = Sidecar::start(&url, |_| {}).await.get("/").await;
        assert!(
            answer.starts_with("HTTP/1.1 502") && answer.contains(what),
            "{answer}"
        );
    }
}

#[tokio::test]
async fn other_upgrades_are_spliced_as_bytes() {
    let origin = Origin::start().await;
    let sidecar = Sidecar::before(&origin).await;
    let mut tcp = sidecar.tcp().await;
    // With the first bytes right behind the request, which a client may not do but a splice must not lose.
    tcp.write_all(
        b"GET /agent HTTP/1.1\r\nHost: s\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
          Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Extensions: permessage-deflate\r\n\r\nabc",
    )
    .await
    .unwrap();
    let answer = head(&mut tcp).await;
    assert!(
        answer.starts_with("HTTP/1.1 101 Switching Protocols\r\n"),
        "{answer}"
    );
    let lower = answer.to_ascii_lowercase();
    for line in [
        "\r\nsec-websocket-accept: s3pplmbitxaq9kygzzhzrbk+xoo=\r\n",
        "\r\nx-from: origin\r\n",
        "\r\nupgrade: websocket\r\n",
        "\r\nsec-websocket-extensions: permessage-deflate\r\n",
    ] {
        assert!(lower.contains(line), "{line} is missing in {answer}");
    }
    assert_eq!(
        origin
            .told
            .count("sec-websocket-extensions: permessage-deflate"),
        1
    );
    tcp.write_all(b"def").await.unwrap();
    tcp.shutdown().await.unwrap();
    let mut got = String::new();
    soon("the end", tcp.read_to_string(&mut got)).await.unwrap();
    assert_eq!(
        got, "ABCDEFbye",
        "one side's end of stream is passed on, the other goes on sending"
    );
    assert_eq!(sidecar.told.all(), [""; 0], "no session was opened");
}

#[tokio::test]
async fn an_upstream_that_leads_back_is_a_loop() {
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let sidecar = Sidecar::start(&format!("http://{port}"), |c| c.listen = port).await;
    let answer = sidecar.get("/x").await;
    assert!(answer.starts_with("HTTP/1.1 508"), "{answer}");
}
