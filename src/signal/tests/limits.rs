//! Limits of size and time, and the drain.

use super::*;
use tokio_tungstenite::tungstenite::Error;

#[tokio::test]
async fn a_message_over_the_limit_closes_its_sender_with_1009() {
    let origin = Origin::start().await;
    let sidecar = Sidecar::start(&origin.url(), |c| {
        c.limits.max_frame_bytes = 1000;
        c.limits.max_upstream_frame_bytes = 2_000_000;
    })
    .await;
    let mut ws = sidecar.websocket("/rtc").await;
    ws.send(Message::binary(vec![0; 1000])).await.unwrap();
    assert_eq!(
        next(&mut ws).await.unwrap().len(),
        1000,
        "the limit itself passes"
    );
    // Much more than socket buffers hold. The rest of it is read and thrown away: a reset while the client is still sending
    // would take the close frame away from it on many systems.
    let sent = ws.send(Message::binary(vec![0; 20 << 20]));
    soon("the message to go", sent).await.unwrap();
    let (code, reason) = closing(&mut ws).await.unwrap();
    assert_eq!(code, 1009);
    assert!(reason.contains("limits.max_frame_bytes"), "{reason}");
    origin.told.wait("close 1001").await;
    sidecar.told.wait("closed Fault Some(1009)").await;

    // What the upstream says is no stranger's.
    let mut ws = sidecar.websocket("/rtc").await;
    for bytes in [1000, 1001, 2_000_000] {
        say(&mut ws, &format!("big {bytes}")).await;
        assert_eq!(next(&mut ws).await.unwrap().len(), bytes);
    }
    say(&mut ws, "big 2000001").await;
    let (code, reason) = closing(&mut ws).await.unwrap();
    assert_eq!(code, 1011, "not the client's fault");
    assert!(reason.contains("max_upstream_frame_bytes"), "{reason}");
    origin.told.wait("close 1009").await;
    sidecar.told.wait("closed Fault Some(1011)").await;
}

/// Room for two of the longest, in all sessions together: whoever doesn't take hers ends once another one waits for it, and only then.
#[tokio::test]
async fn long_messages_that_nobody_takes_make_room_for_others() {
    const LONG: usize = 16 << 20;
    let origin = Origin::start().await;
    let sidecar = Sidecar::start(&origin.url(), |c| {
        c.limits.max_upstream_frame_bytes = LONG;
        c.limits.take_timeout = Duration::from_millis(300);
    })
    .await;
    let mut idle = Vec::new();
    for n in 1..=2 {
        let mut ws = sidecar.websocket("/rtc").await;
        say(&mut ws, &format!("big {LONG}")).await;
        while sidecar.told.count("server binary") < n {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        idle.push(ws);
    }
    // They may be as slow as they like, and what is short passes them by.
    tokio::time::sleep(Duration::from_millis(900)).await;
    let mut quick = sidecar.websocket("/rtc").await;
    say(&mut quick, "big 1000000").await;
    assert_eq!(next(&mut quick).await.unwrap().len(), 1_000_000);
    assert_eq!(sidecar.told.count("closed"), 0);
    // There is nothing of the third in memory before one of them has gone.
    say(&mut quick, &format!("big {LONG}")).await;
    assert_eq!(next(&mut quick).await.unwrap().len(), LONG);
    let told = sidecar.told.all();
    let at = |what: &str| told.iter().position(|told| told.starts_with(what)).unwrap();
    let read = told
        .iter()
        .rposition(|told| told.starts_with("server binary"))
        .unwrap();
    assert!(at("closed Fault Some(1001)") < read, "{told:?}");
    // Whoever takes hers keeps her session, and gives back the room: else the last of these would wait for ever.
    for _ in 0..4 {
        say(&mut quick, &format!("big {LONG}")).await;
        assert_eq!(next(&mut quick).await.unwrap().len(), LONG);
    }
    drop(idle);
}

#[tokio::test]
async fn a_text_that_is_no_utf8_closes_with_1007() {
    let origin = Origin::start().await;
    let sidecar = Sidecar::before(&origin).await;
    let mut ws = sidecar.websocket("/rtc").await;
    ws.get_mut()
        .write_all(&[0x81, 0x81, 0, 0, 0, 0, 0xff])
        .await
        .unwrap();
    assert_eq!(closing(&mut ws).await.unwrap().0, 1007);
    let mut ws = sidecar.websocket("/rtc").await;
    ws.get_mut().write_all(&[0x81, 0x01, b'a']).await.unwrap();
    let (code, reason) = closing(&mut ws).await.unwrap();
    assert_eq!(code, 1002);
    assert!(reason.contains("not masked"), "{reason}");
}

#[tokio::test]
async fn an_idle_session_is_closed_and_pings_keep_it() {
    let origin = Origin::start().await;
    let idle = Duration::from_secs(1);
    let sidecar = Sidecar::start(&origin.url(), |c| c.limits.idle_timeout = idle).await;
    let mut ws = sidecar.websocket("/rtc").await;
    for _ in 0..6 {
        tokio::time::sleep(idle / 4).await;
        ws.send(Message::Ping("".into())).await.unwrap();
        assert!(matches!(next(&mut ws).await, Some(Message::Pong(_))));
    }
    let since = std::time::Instant::now();
    assert_eq!(closing(&mut ws).await.unwrap().0, 1001);
    // The pong's own way took a part of the time.
    assert!(since.elapsed() > idle / 2);
    sidecar.told.wait("closed Idle Some(1001)").await;
    origin.told.wait("close 1001").await;
}

#[tokio::test]
async fn long_queries_and_headers_are_refused() {
    let origin = Origin::start().await;
    let sidecar = Sidecar::before(&origin).await;
    let fits = "q".repeat(Limits::QUERY_CEILING);
    let answer = sidecar.get(&format!("/x?{fits}")).await;
    assert!(answer.starts_with("HTTP/1.1 404"), "{}", &answer[..80]);
    assert_eq!(origin.told.count(&format!("GET /x?{fits}")), 1);
    for over in [Limits::QUERY_CEILING + 1, 100_000, 130_000] {
        let answer = sidecar.get(&format!("/x?{}", "q".repeat(over))).await;
        assert!(
            answer.starts_with("HTTP/1.1 414") || answer.starts_with("HTTP/1.1 431"),
            "{over}: {answer}"
        );
    }
    for over in [66_000, 400_000] {
        let answer = sidecar
            .raw(&format!(
                "GET / HTTP/1.1\r\nHost: s\r\nConnection: close\r\nX-Big: {}\r\n\r\n",
                "h".repeat(over)
            ))
            .await;
        assert!(answer.starts_with("HTTP/1.1 431"), "{over}: {answer}");
    }
    assert_eq!(origin.told.count("GET"), 1);
}

#[tokio::test]
async fn a_header_section_that_does_not_end_is_given_up() {
    let origin = Origin::start().await;
    let sidecar = Sidecar::start(&origin.url(), |c| {
        c.limits.header_timeout = Duration::from_millis(300)
    })
    .await;
    let mut tcp = sidecar.tcp().await;
    tcp.write_all(b"GET / HTTP/1.1\r\nHost: s\r\n")
        .await
        .unwrap();
    let drip = async {
        let mut buf = [0; 256];
        loop {
            tokio::select! {
                n = tcp.read(&mut buf) => if !matches!(n, Ok(1..)) { return },
                () = tokio::time::sleep(Duration::from_millis(50)) => {}
            }
            let _ = tcp.write_all(b"x").await;
        }
    };
    soon("the connection to be closed", drip).await;
    assert_eq!(origin.told.count("GET"), 0);
}

#[tokio::test]
async fn handshakes_and_sessions_are_bounded() {
    let origin = Origin::start().await;
    let sidecar = Sidecar::start(&origin.url(), |c| {
        c.limits.handshakes = 2;
        c.limits.sessions = 3;
    })
    .await;
    let mut open = Vec::new();
    for _ in 0..2 {
        open.push(sidecar.websocket("/rtc").await);
    }
    // The third waits for its answer.
    let upgrade = "Host: s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                   Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    let mut waiting = sidecar.tcp().await;
    waiting
        .write_all(format!("GET /rtc?never HTTP/1.1\r\n{upgrade}").as_bytes())
        .await
        .unwrap();
    origin.told.wait("GET /rtc?never").await;
    let Err(Error::Http(answer)) = sidecar.try_websocket("/rtc").await else {
        panic!("a fourth session");
    };
    assert_eq!(answer.status(), 503);
    assert_eq!(answer.headers()["retry-after"], "1");
    assert!(
        sidecar.get("/teapot").await.starts_with("HTTP/1.1 418"),
        "plain requests still pass"
    );
    drop((waiting, open));
    // Their room comes back.
    let again = async {
        while sidecar.try_websocket("/rtc").await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    soon("room for a session", again).await;
}

#[tokio::test]
async fn an_upstream_that_does_not_answer_is_504() {
    let origin = Origin::start().await;
    let sidecar = Sidecar::start(&origin.url(), |c| {
        c.limits.answer_timeout = Duration::from_millis(200)
    })
    .await;
    let answer = sidecar.get("/never").await;
    assert!(answer.starts_with("HTTP/1.1 504"), "{answer}");
    assert!(
        answer.contains(r#""side":"upstream""#) && answer.contains(r#""what":"timeout""#),
        "{answer}"
    );

    // Linux drops the SYN of a listener whose accept queue is full: the connection neither comes nor fails.
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket
        .bind(&"127.0.0.1:0".parse::<SocketAddr>().unwrap().into())
        .unwrap();
    socket.listen(0).unwrap();
    let at = socket.local_addr().unwrap().as_socket().unwrap();
    let _full: Vec<_> = (0..3)
        .map(|_| std::net::TcpStream::connect_timeout(&at, Duration::from_millis(100)))
        .collect();
    let sidecar = Sidecar::start(&format!("http://{at}"), |c| {
        c.limits.dial_timeout = Duration::from_millis(300);
    })
    .await;
    let answer = sidecar.get("/x").await;
    assert!(answer.starts_with("HTTP/1.1 504"), "{answer}");
}

#[tokio::test]
async fn a_drain_refuses_then_tells_everybody_to_leave() {
    let origin = Origin::start().await;
    let sidecar = Sidecar::before(&origin).await;
    let mut ws = sidecar.websocket("/rtc").await;
    let mut spliced = sidecar.tcp().await;
    spliced
        .write_all(
            b"GET /agent HTTP/1.1\r\nHost: s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
              Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        )
        .await
        .unwrap();
    head(&mut spliced).await;
    let mut kept_alive = sidecar.tcp().await;
    kept_alive
        .write_all(b"GET /x HTTP/1.1\r\nHost: s\r\n\r\n")
        .await
        .unwrap();
    head(&mut kept_alive).await;

    sidecar.drain.send(Drain::Draining).unwrap();
    let Err(Error::Http(answer)) = sidecar.try_websocket("/rtc").await else {
        panic!("a new session while draining");
    };
    assert_eq!(answer.status(), 503);
    assert_eq!(answer.headers()["retry-after"], "5");
    say(&mut ws, "still served").await;
    assert_eq!(next(&mut ws).await, Some(Message::text("still served")));
    assert!(sidecar.get("/teapot").await.starts_with("HTTP/1.1 418"));

    // One that will never be answered in full must not hold up the end.
    let mut endless = sidecar.tcp().await;
    endless
        .write_all(b"GET /endless HTTP/1.1\r\nHost: s\r\n\r\n")
        .await
        .unwrap();
    head(&mut endless).await;

    sidecar.drain.send(Drain::Leaving).unwrap();
    assert_eq!(next(&mut ws).await, Some(Message::text("leave")));
    assert_eq!(closing(&mut ws).await.unwrap().0, 1001);
    origin.told.wait("close 1000").await;
    sidecar.told.wait("closed Drain Some(1001)").await;
    let mut rest = Vec::new();
    let _ = soon("the splice to end", spliced.read_to_end(&mut rest)).await;
    soon("serve to return", sidecar.serving).await.unwrap();
    assert!(
        TcpStream::connect(sidecar.at).await.is_err(),
        "the port is free"
    );
}

#[tokio::test]
async fn other_limits_are_for_what_comes_and_end_nothing_that_runs() {
    let origin = Origin::start().await;
    let sidecar = Sidecar::start(&origin.url(), |c| c.limits.sessions = 2).await;
    let [mut a, mut b] = [
        sidecar.websocket("/rtc").await,
        sidecar.websocket("/rtc").await,
    ];
    let busy = async || match sidecar.try_websocket("/rtc").await {
        Err(Error::Http(answer)) => answer.status() == 503,
        _ => false,
    };
    assert!(busy().await);
    // More places: at once.
    let mut limits = Limits {
        sessions: 3,
        ..Limits::default()
    };
    sidecar.control.set_limits(&limits);
    let mut c = sidecar.websocket("/rtc").await;
    assert!(busy().await);
    // Fewer than there are, and smaller messages: those that run go on as they began.
    limits.sessions = 1;
    limits.max_frame_bytes = 100;
    limits.max_query_bytes = 8 << 10;
    sidecar.control.set_limits(&limits);
    for ws in [&mut a, &mut b, &mut c] {
        let long = "x".repeat(1000);
        say(ws, &long).await;
        assert_eq!(next(ws).await, Some(Message::text(long)));
    }
    let answer = sidecar.get(&format!("/x?{}", "q".repeat(9 << 10))).await;
    assert!(answer.starts_with("HTTP/1.1 414"), "{answer}");
    // One goes, and there are still two: no room. The last one leaves it.
    for mut ws in [a, b] {
        assert!(busy().await);
        ws.close(None).await.unwrap();
        closing(&mut ws).await;
    }
    assert!(busy().await);
    c.close(None).await.unwrap();
    closing(&mut c).await;
    let mut d = soon("a place", async {
        loop {
            if let Ok(ws) = sidecar.try_websocket("/rtc").await {
                return ws;
            }
        }
    })
    .await;
    say(&mut d, &"x".repeat(101)).await;
    assert_eq!(
        closing(&mut d).await.unwrap().0,
        1009,
        "it began under the new limits"
    );
}

#[tokio::test]
async fn who_waits_for_a_place_gets_it_when_there_are_more() {
    let origin = Origin::start().await;
    let sidecar = Sidecar::start(&origin.url(), |c| {
        c.limits.connections = 1;
        c.limits.sessions = 1;
    })
    .await;
    let _held = sidecar.websocket("/rtc").await;
    let waiting = sidecar.get("/teapot");
    tokio::pin!(waiting);
    let early = tokio::time::timeout(Duration::from_millis(300), &mut waiting).await;
    assert!(early.is_err(), "a session holds the only place");
    sidecar.control.set_limits(&Limits::default());
    assert!(soon("a place", waiting).await.starts_with("HTTP/1.1 418"));
}
