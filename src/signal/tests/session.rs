//! Sessions: what passes, what is changed, and how they end.

use super::*;
use tokio_tungstenite::tungstenite::Bytes;
use tokio_tungstenite::tungstenite::Error;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;

#[tokio::test]
async fn messages_pass_and_change_as_the_session_says() {
    let origin = Origin::start().await;
    let sidecar = Sidecar::before(&origin).await;
    let mut request = format!("ws://{}/rtc/v1?join_request=rewrite", sidecar.at)
        .into_client_request()
        .unwrap();
    for (name, value) in [
        ("authorization", "Bearer token"),
        ("sec-websocket-extensions", "permessage-deflate"),
        ("sec-websocket-protocol", "livekit"),
    ] {
        request.headers_mut().insert(name, value.parse().unwrap());
    }
    let key = request.headers()["sec-websocket-key"]
        .to_str()
        .unwrap()
        .to_owned();
    // tungstenite checks the Sec-WebSocket-Accept that comes back, and would refuse an extension.
    let mut config = tokio_tungstenite::tungstenite::protocol::WebSocketConfig::default();
    config.max_message_size = Some(4 << 20);
    let raw =
        tokio_tungstenite::client_async_with_config(request, sidecar.tcp().await, Some(config))
            .await;
    // The origin doesn't choose a subprotocol, which tungstenite takes for an error: asserted on below, then without.
    assert!(matches!(raw, Err(Error::Protocol(_))), "{raw:?}");
    let asked = origin.told.all();
    for line in [
        "GET /rtc/v1?join_request=rewritten",
        "authorization: Bearer token",
        "sec-websocket-protocol: livekit",
        &format!("sec-websocket-key: {key}"),
    ] {
        assert!(
            asked.iter().any(|l| l == line),
            "{line} is missing in {asked:#?}"
        );
    }
    assert_eq!(origin.told.count("sec-websocket-extensions"), 0);
    assert_eq!(
        sidecar.told.all()[..2],
        [
            "open /rtc/v1 join_request=rewrite Some(\"Bearer token\")",
            "accepted"
        ]
    );

    let mut ws = sidecar.websocket("/rtc?x=keep").await;
    assert_eq!(origin.told.count("GET /rtc?x=keep"), 1);
    say(&mut ws, "hello").await;
    assert_eq!(next(&mut ws).await, Some(Message::text("hello")));
    let big = Bytes::from(vec![9; 300_000]);
    ws.send(Message::Binary(big.clone())).await.unwrap();
    assert_eq!(next(&mut ws).await, Some(Message::Binary(big)));
    say(&mut ws, "client drop").await;
    say(&mut ws, "client replace").await;
    assert_eq!(next(&mut ws).await, Some(Message::text("replaced")));
    assert_eq!(origin.told.count("text client"), 0);
    say(&mut ws, "client binary").await;
    assert_eq!(next(&mut ws).await, Some(Message::binary(vec![1, 2, 3])));
    say(&mut ws, "say server drop").await;
    say(&mut ws, "say server replace").await;
    assert_eq!(next(&mut ws).await, Some(Message::text("replaced")));
    say(&mut ws, "say server binary").await;
    assert_eq!(next(&mut ws).await, Some(Message::binary(vec![1, 2, 3])));
}

#[tokio::test]
async fn pings_go_through_to_the_other_side() {
    let origin = Origin::start().await;
    let sidecar = Sidecar::before(&origin).await;
    let mut ws = sidecar.websocket("/rtc").await;
    ws.send(Message::Ping("one".into())).await.unwrap();
    assert_eq!(next(&mut ws).await, Some(Message::Pong("one".into())));
    assert_eq!(
        origin.told.count("ping one"),
        1,
        "the origin saw it, so the pong is the origin's"
    );
    say(&mut ws, "ping two").await;
    assert_eq!(next(&mut ws).await, Some(Message::Ping("two".into())));
    say(&mut ws, "x").await;
    assert_eq!(next(&mut ws).await, Some(Message::text("x")));
    origin.told.wait("pong two").await;
    assert_eq!(
        origin.told.count("pong two"),
        1,
        "one pong, and it is the client's"
    );
}

#[tokio::test]
async fn a_dead_client_looks_dead_to_the_server() {
    let origin = Origin::start().await;
    let sidecar = Sidecar::before(&origin).await;
    let mut ws = sidecar.websocket("/rtc").await;
    say(&mut ws, "ping me").await;
    // Read as bytes, so that nobody answers the ping.
    let mut ping = [0; 4];
    soon("the ping", ws.get_mut().read_exact(&mut ping))
        .await
        .unwrap();
    assert_eq!(ping, [0x89, 2, b'm', b'e']);
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(
        origin.told.count("pong"),
        0,
        "nobody answers in the client's name"
    );
}

#[tokio::test]
async fn close_codes_pass_both_ways() {
    let origin = Origin::start().await;
    let sidecar = Sidecar::before(&origin).await;
    let mut ws = sidecar.websocket("/rtc").await;
    say(&mut ws, "close 4321 because I say so").await;
    assert_eq!(
        closing(&mut ws).await,
        Some((4321, "because I say so".to_owned()))
    );
    sidecar.told.wait("closed Upstream Some(4321)").await;
    origin.told.wait("close 4321").await;

    let mut ws = sidecar.websocket("/rtc").await;
    let frame = CloseFrame {
        code: 3000.into(),
        reason: "done".into(),
    };
    ws.close(Some(frame)).await.unwrap();
    assert_eq!(closing(&mut ws).await, Some((3000, "done".to_owned())));
    origin.told.wait("close 3000 done").await;
    sidecar.told.wait("closed Client Some(3000)").await;

    let mut ws = sidecar.websocket("/rtc").await;
    ws.close(None).await.unwrap();
    closing(&mut ws).await;
    origin.told.wait("close none").await;
    sidecar.told.wait("closed Client None").await;
    assert_eq!(sidecar.told.count("closed"), 3);
}

#[tokio::test]
async fn an_abrupt_end_is_an_abrupt_end_on_the_other_side() {
    let origin = Origin::start().await;
    let sidecar = Sidecar::before(&origin).await;
    let mut ws = sidecar.websocket("/rtc").await;
    say(&mut ws, "say last words").await;
    say(&mut ws, "vanish").await;
    assert_eq!(next(&mut ws).await, Some(Message::text("last words")));
    assert_eq!(
        closing(&mut ws).await,
        None,
        "no close frame: 1006 to a browser"
    );
    sidecar.told.wait("closed Upstream None").await;

    let ws = sidecar.websocket("/rtc").await;
    sidecar.told.wait("accepted").await;
    drop(ws);
    origin.told.wait("websocket broke").await;
    sidecar.told.wait("closed Client None").await;
}

#[tokio::test]
async fn a_refusal_reaches_the_client_unchanged() {
    let origin = Origin::start().await;
    let sidecar = Sidecar::before(&origin).await;
    let Err(Error::Http(answer)) = sidecar.try_websocket("/rtc?bad").await else {
        panic!("a session without a token");
    };
    assert_eq!(answer.status(), 401);
    assert_eq!(answer.headers()["access-control-allow-origin"], "*");
    assert_eq!(answer.body().as_deref(), Some(&b"invalid token\n"[..]));
    sidecar.told.wait("closed").await;
    assert_eq!(
        sidecar.told.all()[1..],
        ["refused 401", "closed Upstream None"]
    );
}

#[tokio::test]
async fn what_cannot_be_read_never_reaches_the_upstream() {
    let origin = Origin::start().await;
    let sidecar = Sidecar::before(&origin).await;
    let Err(Error::Http(answer)) = sidecar.try_websocket("/rtc?undecodable").await else {
        panic!("a session that can't be read");
    };
    assert_eq!(answer.status(), 400);
    assert_eq!(origin.told.all(), [""; 0]);
}

#[tokio::test]
async fn an_extension_that_nobody_offered_is_refused() {
    let origin = Origin::start().await;
    let sidecar = Sidecar::before(&origin).await;
    let Err(Error::Http(answer)) = sidecar.try_websocket("/rtc?compress").await else {
        panic!("the pump can't read compressed messages");
    };
    assert_eq!(answer.status(), 502);
}

#[tokio::test]
async fn a_client_that_leaves_before_the_answer_closes_its_session_once() {
    let origin = Origin::start().await;
    let sidecar = Sidecar::before(&origin).await;
    let mut tcp = sidecar.tcp().await;
    tcp.write_all(
        b"GET /rtc?never HTTP/1.1\r\nHost: s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
          Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
    )
    .await
    .unwrap();
    origin.told.wait("GET /rtc?never").await;
    drop(tcp);
    sidecar.told.wait("closed Client None").await;
    assert_eq!(
        sidecar.told.count("refused") + sidecar.told.count("accepted"),
        0
    );
    assert_eq!(sidecar.told.count("closed"), 1);
}

#[tokio::test]
async fn a_fault_of_the_session_closes_both_sides() {
    let origin = Origin::start().await;
    let sidecar = Sidecar::before(&origin).await;
    let mut ws = sidecar.websocket("/rtc").await;
    say(&mut ws, "client fault").await;
    assert_eq!(
        closing(&mut ws).await,
        Some((1011, "as the test wishes".to_owned()))
    );
    origin.told.wait("close 1011 as the test wishes").await;
    sidecar.told.wait("closed Fault Some(1011)").await;
}

#[tokio::test]
async fn a_session_that_panics_ends_alone() {
    let origin = Origin::start().await;
    let sidecar = Sidecar::before(&origin).await;
    let mut other = sidecar.websocket("/rtc").await;
    let mut ws = sidecar.websocket("/rtc").await;
    say(&mut ws, "client panic").await;
    assert_eq!(closing(&mut ws).await, None);
    sidecar.told.wait("closed").await;
    assert_eq!(sidecar.told.count("closed"), 1);
    say(&mut other, "still here").await;
    assert_eq!(next(&mut other).await, Some(Message::text("still here")));
}

#[tokio::test]
async fn a_client_that_does_not_read_holds_back_its_server_alone() {
    let origin = Origin::start().await;
    let sidecar = Sidecar::before(&origin).await;
    let mut slow = sidecar.websocket("/rtc?flood").await;
    let stalled = async {
        let mut before = 0;
        loop {
            tokio::time::sleep(Duration::from_millis(300)).await;
            let now = origin.told.count("flood");
            if now == before && now > 0 {
                return now;
            }
            before = now;
        }
    };
    let held = soon("the server to be held back", stalled).await;
    assert!(
        held < 512,
        "{held} messages of 64 KiB were taken from a client that reads nothing"
    );
    let mut quick = sidecar.websocket("/rtc").await;
    say(&mut quick, "quick").await;
    assert_eq!(next(&mut quick).await, Some(Message::text("quick")));
    for _ in 0..held + 20 {
        assert_eq!(next(&mut slow).await.unwrap().len(), 64 << 10);
    }
}
