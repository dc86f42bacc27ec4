//! Rare but lawful HTTP, and what is neither.

use super::*;

#[tokio::test]
async fn targets_that_are_no_paths_are_the_client_s_fault() {
    let origin = Origin::start().await;
    let sidecar = Sidecar::before(&origin).await;
    for line in ["GET foo:80", "GET *", "POST foo", "OPTIONS foo:1"] {
        let answer = sidecar
            .raw(&format!(
                "{line} HTTP/1.1\r\nHost: s\r\nConnection: close\r\n\r\n"
            ))
            .await;
        assert!(
            answer.starts_with("HTTP/1.1 400") && answer.contains(r#""side":"client""#),
            "{line}: {answer}"
        );
    }
    let answer = sidecar
        .raw("CONNECT foo:80 HTTP/1.1\r\nHost: s\r\nConnection: close\r\n\r\n")
        .await;
    assert!(answer.starts_with("HTTP/1.1 4"), "{answer}");
    assert_eq!(origin.told.count("connection"), 0, "nobody was asked");
    sidecar
        .raw("OPTIONS * HTTP/1.1\r\nHost: s\r\nConnection: close\r\n\r\n")
        .await;
    origin.told.wait("OPTIONS *").await;
    // The absolute form is what a proxy is sent, and every server takes (RFC 9112 section 3.2.2).
    let answer = sidecar.get("http://elsewhere.example/teapot?a=b").await;
    assert!(answer.starts_with("HTTP/1.1 418"), "{answer}");
    origin.told.wait("GET /teapot?a=b").await;
}

/// What `Connection` names stays here, for the sidecar's own eyes too: else it would believe a token that the server never sees.
#[tokio::test]
async fn connection_hides_no_field_that_is_read_here() {
    let origin = Origin::start().await;
    let sidecar = Sidecar::before(&origin).await;
    let upgrade = "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==";
    for fields in [
        "Connection: Upgrade, close, authorization",
        "Connection: AUTHORIZATION\r\nConnection: Upgrade, close",
    ] {
        sidecar
            .raw(&format!(
                "GET /rtc?bad HTTP/1.1\r\nHost: s\r\n{fields}\r\nAuthorization: Bearer x\r\n{upgrade}\r\n\r\n"
            ))
            .await;
        sidecar
            .raw(&format!(
                "POST /whip/v1 HTTP/1.1\r\nHost: s\r\n{}\r\nAuthorization: Bearer x\r\nContent-Length: 5\r\n\r\noffer",
                fields.replace("Upgrade, ", "")
            ))
            .await;
    }
    let told = sidecar.told.all();
    let asked = |start: &str| told.iter().filter(|line| line.starts_with(start)).count();
    assert_eq!(
        (asked("open /rtc bad None"), asked("whip None")),
        (2, 2),
        "{told:#?}"
    );
    assert_eq!(origin.told.count("authorization"), 0);
}

/// LiveKit reads a form before it answers, however long that takes to arrive.
#[tokio::test]
async fn a_request_for_a_websocket_has_no_body() {
    let origin = Origin::start().await;
    let sidecar = Sidecar::before(&origin).await;
    for target in ["/rtc", "/agent", "/elsewhere"] {
        for body in ["Content-Length: 1000000", "Transfer-Encoding: chunked"] {
            let answer = sidecar
                .raw(&format!(
                    "GET {target} HTTP/1.1\r\nHost: s\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                     Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nContent-Type: multipart/form-data; boundary=b\r\n{body}\r\n\r\n"
                ))
                .await;
            assert!(
                answer.starts_with("HTTP/1.1 400"),
                "{target} {body}: {answer}"
            );
        }
    }
    assert_eq!(origin.told.count("connection"), 0, "nobody was asked");
}

#[tokio::test]
async fn head_and_http_1_0_are_served() {
    let origin = Origin::start().await;
    let sidecar = Sidecar::before(&origin).await;
    let answer = sidecar
        .raw("HEAD /teapot HTTP/1.1\r\nHost: s\r\nConnection: close\r\n\r\n")
        .await;
    assert!(
        answer.starts_with("HTTP/1.1 418") && answer.ends_with("\r\n\r\n"),
        "{answer}"
    );
    // The end of the connection is the end of the answer.
    let answer = sidecar.raw("GET /teapot HTTP/1.0\r\n\r\n").await;
    assert!(
        answer.starts_with("HTTP/1.0 418") && answer.ends_with("\r\n\r\nshort and stout"),
        "{answer}"
    );
    let answer = sidecar
        .raw("POST /echo HTTP/1.0\r\nContent-Length: 3\r\n\r\nabc")
        .await;
    assert!(
        answer.starts_with("HTTP/1.0 200") && answer.ends_with("\r\n\r\nabc"),
        "{answer}"
    );
    assert!(!answer.to_lowercase().contains("chunked"), "{answer}");
}

#[tokio::test]
async fn a_client_that_expects_100_is_told_to_go_on() {
    let origin = Origin::start().await;
    let sidecar = Sidecar::before(&origin).await;
    for (target, status) in [("/echo", "200"), ("/whip/v1", "201")] {
        let mut tcp = sidecar.tcp().await;
        let request = format!(
            "POST {target} HTTP/1.1\r\nHost: s\r\nExpect: 100-continue\r\nContent-Length: 5\r\nConnection: close\r\n\r\n"
        );
        tcp.write_all(request.as_bytes()).await.unwrap();
        assert!(head(&mut tcp).await.starts_with("HTTP/1.1 100"), "{target}");
        tcp.write_all(b"offer").await.unwrap();
        let answer = head(&mut tcp).await;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status}")),
            "{answer}"
        );
    }
}

/// RFC 9112 section 6.3: Transfer-Encoding goes before Content-Length, of which nothing is passed on, and the connection ends, so
/// that nobody in front of us can take a part of the body for a request.
#[tokio::test]
async fn of_two_lengths_one_counts_and_the_connection_ends() {
    for fields in [
        "Content-Length: 4\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 4",
    ] {
        let origin = Origin::start().await;
        let sidecar = Sidecar::before(&origin).await;
        let answer = sidecar
            .raw(&format!(
                "POST /echo HTTP/1.1\r\nHost: s\r\n{fields}\r\n\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: s\r\n\r\n"
            ))
            .await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{answer}");
        assert_eq!(origin.told.count("GET"), 0);
        assert_eq!(origin.told.count("content-length"), 0);
        assert_eq!(origin.told.count("transfer-encoding: chunked"), 1);
    }
    let origin = Origin::start().await;
    let sidecar = Sidecar::before(&origin).await;
    for fields in [
        "Content-Length: 4\r\nContent-Length: 5",
        "Transfer-Encoding: gzip",
        "Content-Length: -1",
        "Content-Length: +4",
    ] {
        let answer = sidecar
            .raw(&format!(
                "POST /echo HTTP/1.1\r\nHost: s\r\n{fields}\r\n\r\nabcd"
            ))
            .await;
        assert!(answer.starts_with("HTTP/1.1 400"), "{fields}: {answer}");
    }
    assert_eq!(origin.told.count("POST"), 0);
}

#[tokio::test]
async fn a_body_of_unknown_length_passes_whatever_the_method() {
    let origin = Origin::start().await;
    let sidecar = Sidecar::before(&origin).await;
    for method in ["GET", "DELETE", "OPTIONS", "POST"] {
        let answer = sidecar
            .raw(&format!(
                "{method} /echo HTTP/1.1\r\nHost: s\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n"
            ))
            .await;
        assert!(
            answer.starts_with("HTTP/1.1 200") && answer.contains("body"),
            "{method}: {answer}"
        );
    }
}

/// `printf … | nc` and the like: the client has nothing more to send and waits.
#[tokio::test]
async fn a_client_that_has_ended_its_side_gets_its_answer() {
    let origin = Origin::start().await;
    let sidecar = Sidecar::before(&origin).await;
    let mut tcp = sidecar.tcp().await;
    tcp.write_all(b"POST /echo HTTP/1.1\r\nHost: s\r\nContent-Length: 4\r\n\r\nbody")
        .await
        .unwrap();
    tcp.shutdown().await.unwrap();
    let mut answer = String::new();
    soon("the answer", tcp.read_to_string(&mut answer))
        .await
        .unwrap();
    assert!(
        answer.starts_with("HTTP/1.1 200") && answer.ends_with("body"),
        "{answer}"
    );
    // One that is gone doesn't keep the upstream at work for ever.
    let mut tcp = sidecar.tcp().await;
    tcp.write_all(b"GET /never HTTP/1.1\r\nHost: s\r\n\r\n")
        .await
        .unwrap();
    origin.told.wait("GET /never").await;
    tcp.shutdown().await.unwrap();
    let mut rest = Vec::new();
    let _ = soon("the connection to end", tcp.read_to_end(&mut rest)).await;
    assert!(rest.is_empty());
}

#[tokio::test]
async fn a_connection_rests_longer_than_a_request_may_take() {
    let origin = Origin::start().await;
    let sidecar = Sidecar::start(&origin.url(), |c| {
        c.limits.header_timeout = Duration::from_millis(150);
        c.limits.keep_alive_timeout = Duration::from_millis(1500);
    })
    .await;
    let mut tcp = sidecar.tcp().await;
    for _ in 0..2 {
        tcp.write_all(b"GET /teapot HTTP/1.1\r\nHost: s\r\nContent-Length: 0\r\n\r\n")
            .await
            .unwrap();
        assert!(head(&mut tcp).await.starts_with("HTTP/1.1 418"));
        let mut body = [0; 15];
        tcp.read_exact(&mut body).await.unwrap();
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let mut rest = Vec::new();
    let _ = soon("the connection to end", tcp.read_to_end(&mut rest)).await;
    assert!(rest.is_empty());
}
