//! What somebody without a token can take from others: nothing.

use super::*;

const WHIP: &str = "POST /whip/v1 HTTP/1.1\r\nHost: s\r\nContent-Length: 1000\r\n\r\n";

/// More unfinished WHIP requests than there are handshakes.
#[tokio::test]
async fn offers_that_do_not_come_take_no_handshake() {
    let origin = Origin::start().await;
    let sidecar = Sidecar::start(&origin.url(), |c| c.limits.handshakes = 4).await;
    let mut idle = Vec::new();
    for _ in 0..50 {
        let mut tcp = sidecar.tcp().await;
        tcp.write_all(WHIP.as_bytes()).await.unwrap();
        idle.push(tcp);
    }
    // A round trip over each, so that all have been read.
    sidecar.get("/teapot").await;
    let mut ws = sidecar.websocket("/rtc").await;
    say(&mut ws, "hello").await;
    assert_eq!(next(&mut ws).await, Some(Message::text("hello")));
    let offer =
        "POST /whip/v1 HTTP/1.1\r\nHost: s\r\nConnection: close\r\nContent-Length: 5\r\n\r\noffer";
    assert!(sidecar.raw(offer).await.starts_with("HTTP/1.1 201"));
}

/// WHIP requests that LiveKit doesn't answer take nothing from WebSockets, nor the other way round.
#[tokio::test]
async fn whip_and_websockets_have_handshakes_of_their_own() {
    let origin = Origin::start().await;
    let sidecar = Sidecar::start(&origin.url(), |c| {
        c.limits.handshakes = 4;
        c.limits.connections_per_address = 0;
    })
    .await;
    let upgrade = "GET /rtc?never HTTP/1.1\r\nHost: s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                   Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    let mut waiting = Vec::new();
    for _ in 0..4 {
        let mut tcp = sidecar.tcp().await;
        tcp.write_all(upgrade.as_bytes()).await.unwrap();
        waiting.push(tcp);
    }
    let all = async {
        while origin.told.count("GET /rtc?never") < 4 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    soon("four handshakes", all).await;
    assert!(sidecar.try_websocket("/rtc").await.is_err(), "they are all");
    let offer =
        "POST /whip/v1 HTTP/1.1\r\nHost: s\r\nConnection: close\r\nContent-Length: 5\r\n\r\noffer";
    assert!(sidecar.raw(offer).await.starts_with("HTTP/1.1 201"));
}

#[tokio::test]
async fn silent_connections_go_for_those_that_speak() {
    let origin = Origin::start().await;
    let sidecar = Sidecar::start(&origin.url(), |c| {
        c.limits.connections = 16;
        c.limits.sessions = 16;
    })
    .await;
    let mut ws = sidecar.websocket("/rtc").await;
    let mut silent = Vec::new();
    for n in 0..40 {
        let mut tcp = sidecar.tcp().await;
        let begun = [
            "",
            "GET / HT",
            WHIP,
            "POST /echo HTTP/1.1\r\nHost: s\r\nContent-Length: 9\r\n\r\nabc",
        ];
        tcp.write_all(begun[n % 4].as_bytes()).await.unwrap();
        silent.push(tcp);
    }
    for _ in 0..3 {
        assert!(sidecar.get("/teapot").await.starts_with("HTTP/1.1 418"));
    }
    let mut rest = Vec::new();
    let _ = soon("the oldest to go", silent[0].read_to_end(&mut rest)).await;
    say(&mut ws, "still here").await;
    assert_eq!(next(&mut ws).await, Some(Message::text("still here")));
}

#[tokio::test]
async fn an_address_has_so_many_connections_beside_its_sessions() {
    let origin = Origin::start().await;
    let sidecar = Sidecar::start(&origin.url(), |c| c.limits.connections_per_address = 3).await;
    let mut sessions = Vec::new();
    for _ in 0..6 {
        sessions.push(sidecar.websocket("/rtc").await);
    }
    let mut busy = Vec::new();
    for _ in 0..3 {
        let mut tcp = sidecar.tcp().await;
        tcp.write_all(b"GET /never HTTP/1.1\r\nHost: s\r\n\r\n")
            .await
            .unwrap();
        busy.push(tcp);
    }
    let all = async {
        while origin.told.count("GET /never") < 3 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    soon("three requests", all).await;
    let mut fourth = sidecar.tcp().await;
    let _ = fourth
        .write_all(b"GET /teapot HTTP/1.1\r\nHost: s\r\n\r\n")
        .await;
    let mut rest = Vec::new();
    let _ = soon("it to be refused", fourth.read_to_end(&mut rest)).await;
    assert!(rest.is_empty(), "{}", String::from_utf8_lossy(&rest));
    drop(busy.pop());
    let again = async {
        loop {
            let mut tcp = sidecar.tcp().await;
            let _ = tcp
                .write_all(b"GET /teapot HTTP/1.1\r\nHost: s\r\nConnection: close\r\n\r\n")
                .await;
            let mut answer = Vec::new();
            if tcp.read_to_end(&mut answer).await.is_ok() && !answer.is_empty() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    soon("room for another", again).await;
}

/// Each single byte of it must not keep the buffer that it came in.
#[tokio::test]
async fn an_offer_in_single_bytes_is_taken() {
    let origin = Origin::start().await;
    let sidecar = Sidecar::before(&origin).await;
    let mut tcp = sidecar.tcp().await;
    tcp.write_all(b"POST /whip/v1 HTTP/1.1\r\nHost: s\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n")
        .await
        .unwrap();
    for byte in "offer".bytes() {
        tcp.write_all(&[b'1', b'\r', b'\n', byte, b'\r', b'\n'])
            .await
            .unwrap();
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    tcp.write_all(b"0\r\n\r\n").await.unwrap();
    assert!(head(&mut tcp).await.starts_with("HTTP/1.1 201"));
    assert_eq!(origin.told.count("sdp offer and more"), 1);
}
