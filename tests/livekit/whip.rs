//! WHIP (RFC 9725), which the stock server serves by itself: a client that publishes with it meets the sidecar only.

use crate::client::{Client, Kind, Running};
use crate::harness::{Load, Trial, array, number, string, unix_now, wait_for};
use crate::http::{self, token};
use crate::servers::{Options, Stack};
use std::time::Duration;

/// An offer of a sender of Opus with nothing behind it.
const OFFER: &str = "v=0\r\no=- 1 1 IN IP4 127.0.0.1\r\ns=-\r\nt=0 0\r\na=group:BUNDLE 0\r\n\
    a=fingerprint:sha-256 0F:74:31:25:CB:A2:13:EC:28:6F:6D:2C:61:FF:5D:C2:BC:B9:DB:3D:98:14:8D:1A:BB:EA:33:0C:A4:60:A8:8E\r\n\
    a=ice-ufrag:someone\r\na=ice-pwd:0123456789012345678901\r\n\
    m=audio 9 UDP/TLS/RTP/SAVPF 111\r\nc=IN IP4 0.0.0.0\r\na=mid:0\r\na=sendonly\r\na=setup:actpass\r\na=rtcp-mux\r\n\
    a=rtpmap:111 opus/48000/2\r\na=msid:stream track\r\na=ssrc:1 cname:x\r\n";

fn publisher(stack: &Stack, room: &str) -> Client {
    Client::new(Kind::Go, &stack.sidecar.url(), room, "whip")
        .flag("--whip")
        .tone(440.0)
        .video(320, 240)
}

fn call(name: &'static str, mode: &str) {
    let trial = Trial::new(name, Load::Browser);
    let stack = Stack::shared(&trial);
    let room = trial.room(mode);
    let listener = Client::new(Kind::Python, &stack.sidecar.url(), &room, "listener")
        .seconds(12.0)
        .spawn(&trial);
    wait_for("the listener", Duration::from_secs(30), || {
        (stack.sidecar.sessions_in(&room) == 1).then_some(())
    });
    // A restart of ICE in the middle.
    let whip = publisher(&stack, &room)
        .scenario("resume", 4.0)
        .seconds(9.0)
        .spawn(&trial);
    let reports = [whip, listener].map(Running::finish);
    let [whip, listener] = &reports;
    // The tone and the picture went on after the restart, to the end.
    listener.received(whip);
    let heard = number(listener.audio_from("whip"), "/heard_ms");
    assert!(heard > 7_000.0, "{heard} ms of a tone of 9 s");
    for report in &reports {
        report.met_only(&stack.sidecar);
    }
    let requests: Vec<_> = array(&whip.json, "/requests")
        .iter()
        .filter_map(|request| request.as_str())
        .collect();
    assert_eq!(
        requests,
        ["POST 201", "PATCH 204", "PATCH 200", "DELETE 200"]
    );
    assert_eq!(whip.number("/reconnected"), 1.0);
    let answer = string(&whip.json, "/answer");
    assert!(answer.contains("a=ice-lite"), "{answer}");
    for line in answer
        .lines()
        .filter(|line| line.starts_with("a=candidate:"))
    {
        let words: Vec<_> = line.split(' ').collect();
        let address = format!("{}:{}", words[4], words[5]);
        assert!(
            stack.sidecar.is_candidate(&address),
            "the client was told of {line}"
        );
    }
    assert_eq!(stack.sidecar.joins(&room).len(), 2);
    assert_eq!(stack.sidecar.joins(&room)[1]["mode"], mode);
    stack.sidecar.wait_empty(&room, Duration::from_secs(20));
    assert_eq!(stack.sidecar.complaints(), Vec::<String>::new());
}

#[test]
fn off_whip_publishes_and_restarts() {
    call("off_whip_publishes_and_restarts", "off");
}

#[test]
fn lean_whip_publishes_and_restarts() {
    call("lean_whip_publishes_and_restarts", "lean");
}

#[test]
fn a_whip_session_ends_when_its_client_vanishes() {
    let trial = Trial::new(
        "a_whip_session_ends_when_its_client_vanishes",
        Load::Browser,
    );
    let options = Options {
        consent_timeout: "5s",
        ..Options::default()
    };
    let stack = Stack::own(&trial, options);
    let room = trial.room("off");
    // Of the call that begins for the listener when the other comes.
    let crash = 5.0;
    let listener = Client::new(Kind::Python, &stack.sidecar.url(), &room, "listener")
        .seconds(12.0)
        .cut_after(crash)
        .spawn(&trial);
    wait_for("the listener", Duration::from_secs(30), || {
        (stack.sidecar.sessions_in(&room) == 1).then_some(())
    });
    let mut whip = publisher(&stack, &room)
        .seconds(60.0)
        .cut_after(crash)
        .spawn(&trial);
    whip.wait_begun();
    std::thread::sleep(Duration::from_secs_f64(crash));
    let crashed = unix_now();
    whip.process.crash();
    wait_for("its session to end", Duration::from_secs(15), || {
        (stack.sidecar.sessions_in(&room) <= 1).then_some(())
    });
    // It was there until then.
    listener.finish().lasted_until(&whip.client, crashed);
    stack.sidecar.wait_empty(&room, Duration::from_secs(15));
    assert_eq!(stack.sidecar.complaints(), Vec::<String>::new());
}

#[test]
fn a_whip_session_without_media_ends() {
    let trial = Trial::new("a_whip_session_without_media_ends", Load::Light);
    let stack = Stack::own(&trial, Options::default());
    let room = trial.room("off");
    let bearer = format!("Bearer {}", token(&room, "anna"));
    let headers = [
        ("Authorization", bearer.as_str()),
        ("Content-Type", "application/sdp"),
    ];
    let port = stack.sidecar.port;
    let made = http::request(port, "POST", "/whip/v1", &headers, OFFER.as_bytes()).unwrap();
    assert_eq!(made.status, 201, "{}", made.text());
    assert_eq!(stack.sidecar.sessions_in(&room), 1);

    // Neither somebody else nor an unknown session gets a restart; LiveKit's refusals pass.
    let resource = made.header("location").unwrap().to_owned();
    let fragment = "a=ice-ufrag:other\r\na=ice-pwd:9876543210987654321098\r\n\
        m=audio 9 UDP/TLS/RTP/SAVPF 111\r\na=mid:0\r\n";
    let other = format!("Bearer {}", token(&room, "mallory"));
    let patch = |bearer: &str, target: &str, tag: &str| {
        let headers = [
            ("Authorization", bearer),
            ("Content-Type", "application/trickle-ice-sdpfrag"),
            ("If-Match", tag),
        ];
        http::request(port, "PATCH", target, &headers, fragment.as_bytes()).unwrap()
    };
    assert_eq!(patch(&other, &resource, "*").status, 404);
    assert_eq!(patch(&bearer, "/whip/v1/PA_unknown", "*").status, 404);
    let refused = patch(&bearer, &resource, made.header("etag").unwrap());
    assert_eq!(refused.status, 400, "{}", refused.text());
    assert!(
        refused.text().contains("ice credential mismatch"),
        "{}",
        refused.text()
    );

    stack.sidecar.wait_empty(&room, Duration::from_secs(40));
    // And the server knows nobody any more.
    let empty = |target: &str, headers: &[(&str, &str)], body: &str| {
        let direct =
            http::request(stack.livekit.port, "POST", target, headers, body.as_bytes()).unwrap();
        let through = http::request(port, "POST", target, headers, body.as_bytes()).unwrap();
        assert_eq!(direct.essence(), through.essence(), "{target}");
    };
    empty("/whip/v1", &headers, "");
    empty("/whip/v1", &headers[..1], OFFER);
    empty("/whip/v1", &headers[1..], OFFER);
    assert_eq!(stack.sidecar.complaints(), Vec::<String>::new());
}
