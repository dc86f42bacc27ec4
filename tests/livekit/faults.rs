//! What goes wrong must look to clients as it does without the sidecar, and leave nothing behind.

use crate::client::{Client, Kind, Report, Running};
use crate::harness::{Load, Trial, string, unix_now, wait_for};
use crate::http::{self, Answer, UPGRADE, WebSocket, grant, token};
use crate::servers::{Options, Sidecar, Stack};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// LiveKit's answers come through unchanged, whatever was asked.
#[test]
fn refusals_are_livekits_own() {
    let trial = Trial::new("refusals_are_livekits_own", Load::Light);
    let stack = Stack::own(&trial, Options::default());
    let good = token("off-refusals", "anna");
    let forged = grant(
        json!({"room": "r", "roomJoin": true}),
        "anna",
        "another secret of at least 32 characters",
    );
    let not_to_join = grant(json!({"room": "r", "roomList": true}), "anna", http::SECRET);
    let admin = format!("Bearer {not_to_join}");
    let origin = [("Origin", "https://app.example")];
    let preflight = [
        ("Origin", "https://app.example"),
        ("Access-Control-Request-Method", "GET"),
        ("Access-Control-Request-Headers", "authorization"),
    ];
    let twirp = [
        ("Content-Type", "application/json"),
        ("Authorization", admin.as_str()),
    ];
    let no_token = [("Content-Type", "application/json")];
    // Method, target, headers, body, the status that LiveKit gives.
    type Case<'a> = (&'a str, String, &'a [(&'a str, &'a str)], &'a [u8], u16);
    let cases: Vec<Case<'_>> = vec![
        ("GET", "/".into(), &[], b"", 200),
        ("GET", "/nothing/here?x=%20".into(), &[], b"", 404),
        ("GET", "/rtc".into(), &UPGRADE, b"", 401),
        (
            "GET",
            "/rtc?access_token=nonsense".into(),
            &UPGRADE,
            b"",
            401,
        ),
        (
            "GET",
            format!("/rtc?access_token={forged}"),
            &UPGRADE,
            b"",
            401,
        ),
        (
            "GET",
            format!("/rtc?access_token={not_to_join}"),
            &UPGRADE,
            b"",
            401,
        ),
        (
            "GET",
            format!("/rtc/v1?access_token={forged}"),
            &UPGRADE,
            b"",
            401,
        ),
        (
            "GET",
            "/rtc/validate?access_token=nonsense".into(),
            &origin,
            b"",
            401,
        ),
        (
            "GET",
            format!("/rtc/validate?access_token={good}"),
            &origin,
            b"",
            200,
        ),
        (
            "GET",
            format!("/rtc/v1/validate?access_token={forged}"),
            &origin,
            b"",
            401,
        ),
        ("OPTIONS", "/rtc/validate".into(), &preflight, b"", 204),
        (
            "POST",
            "/twirp/livekit.RoomService/Nothing".into(),
            &twirp,
            b"{}",
            404,
        ),
        (
            "POST",
            "/twirp/livekit.RoomService/ListRooms".into(),
            &no_token,
            b"{}",
            401,
        ),
        (
            "POST",
            "/twirp/livekit.RoomService/ListRooms".into(),
            &twirp,
            b"{}",
            200,
        ),
        (
            "POST",
            "/twirp/livekit.RoomService/ListRooms".into(),
            &twirp,
            b"{nonsense",
            400,
        ),
    ];
    for (method, target, headers, body, status) in cases {
        let ask = |port| {
            http::request(port, method, &target, headers, body)
                .unwrap_or_else(|error| panic!("{method} {target} on {port}: {error}"))
        };
        let (direct, through) = (ask(stack.livekit.port), ask(stack.sidecar.port));
        assert_eq!(
            direct.status,
            status,
            "LiveKit's own answer to {method} {target}: {}",
            direct.text()
        );
        assert_eq!(through.essence(), direct.essence(), "{method} {target}");
    }
    assert_eq!(
        stack.sidecar.open_sessions().len(),
        0,
        "a refused token has made a session"
    );
    // Neither are tokens anywhere in the log.
    let log = std::fs::read_to_string(&stack.sidecar.process.log).unwrap();
    for secret in [&good, &forged, &not_to_join] {
        let signature = secret.rsplit('.').next().unwrap();
        assert!(!log.contains(signature), "a token is in the log");
    }
}

/// A server that isn't there is the sidecar's own 502, in JSON.
#[test]
fn no_upstream_is_502() {
    let trial = Trial::new("no_upstream_is_502", Load::Light);
    let nobody = crate::harness::free_ports(1);
    let sidecar = Sidecar::start(&trial.dir, nobody, Options::default());
    trial.watch(&sidecar.process.log);
    let token = token("r", "anna");
    for (target, headers) in [
        ("/rtc/validate?access_token=".to_owned() + &token, &[][..]),
        ("/rtc?access_token=".to_owned() + &token, &UPGRADE[..]),
        ("/rtc/v1?access_token=".to_owned() + &token, &UPGRADE[..]),
        ("/".to_owned(), &[][..]),
    ] {
        let answer: Answer = http::request(sidecar.port, "GET", &target, headers, b"").unwrap();
        assert_eq!(answer.status, 502, "{}", answer.text());
        let body: Value = serde_json::from_slice(&answer.body)
            .unwrap_or_else(|error| panic!("no JSON: {error}: {}", answer.text()));
        assert!(!string(&body, "/error").is_empty(), "no error in {body}");
        assert_eq!(string(&body, "/side"), "upstream", "{body}");
        assert!(
            !answer.text().contains(&token),
            "the answer repeats the token"
        );
    }
    assert_eq!(sidecar.open_sessions().len(), 0);
}

/// What a client tells of its server's end.
fn fate(report: &Report) -> (bool, bool, bool, bool) {
    let json = &report.json;
    (
        report.number("/reconnecting") >= 1.0,
        report.number("/reconnected") >= 1.0,
        json["disconnected"].is_null(),
        report.code == 0,
    )
}

/// LiveKit dies in the middle of a call: clients behind the sidecar see what clients without it see.
#[test]
fn a_dead_server_looks_the_same() {
    let trial = Trial::new("a_dead_server_looks_the_same", Load::Browser);
    let mut stack = Stack::own(
        &trial,
        Options {
            resume_grace: "2s",
            consent_timeout: "5s",
            ..Options::default()
        },
    );
    let room = trial.room("off");
    let (direct, through) = (stack.livekit.url(), stack.sidecar.url());
    let mut clients: Vec<_> = [Kind::Python, Kind::Node, Kind::Chromium]
        .into_iter()
        .flat_map(|kind| [(kind, &direct, "direct"), (kind, &through, "through")])
        .map(|(kind, url, way)| {
            Client::new(
                kind,
                url,
                &format!("{room}-{way}"),
                &format!("{kind:?}-{way}"),
            )
            .with("--wait-peers", 2)
            .tone(440.0)
            .seconds(12.0)
            .cut_after(5.0)
            .spawn(&trial)
        })
        .collect();
    clients.iter_mut().for_each(Running::wait_begun);
    std::thread::sleep(Duration::from_secs(5));
    let crashed = unix_now();
    stack.livekit.process.crash();
    stack
        .sidecar
        .wait_empty(&format!("{room}-through"), Duration::from_secs(20));
    let reports: Vec<_> = clients.into_iter().map(Running::report).collect();
    // Until then everybody heard everybody.
    for (at, ear) in reports.iter().enumerate() {
        let others = reports.iter().enumerate().skip(at % 2).step_by(2);
        for (_, peer) in others.filter(|(other, _)| *other != at) {
            ear.lasted_until(&peer.client, crashed);
        }
    }
    for pair in reports.chunks(2) {
        assert!(
            fate(&pair[0]).0 || !fate(&pair[0]).2,
            "directly the server's end was not seen: {}",
            pair[0].json
        );
        assert_eq!(
            fate(&pair[1]),
            fate(&pair[0]),
            "(reconnecting, reconnected, stays connected, exit 0) of\n{}\nand directly of\n{}",
            pair[1].json,
            pair[0].json
        );
    }
}

/// SIGTERM: no new sessions, a grace period, then LiveKit's own leave, and exit 0.
#[test]
fn sigterm_drains() {
    let trial = Trial::new("sigterm_drains", Load::Light);
    let mut stack = Stack::own(
        &trial,
        Options {
            drain_grace: "4s",
            ..Options::default()
        },
    );
    let target = |identity: &str| {
        let token = token("off-drain", identity);
        format!("/rtc?access_token={token}&protocol=15&auto_subscribe=1&sdk=go&version=2.16.2")
    };
    let mut socket = WebSocket::open(stack.sidecar.port, &target("anna")).expect("a session");
    let join = socket.next().expect("a JoinResponse");
    assert_eq!(
        (join.0, join.1.first()),
        (2, Some(&0x0A)),
        "SignalResponse.join is field 1"
    );
    let url = stack.sidecar.url();
    let make = |kind, identity: &str| {
        Client::new(kind, &url, "off-drain", identity)
            .with("--wait-peers", 2)
            .seconds(14.0)
            .cut_after(6.0)
    };
    let mut ben = make(Kind::Python, "ben").tone(440.0).spawn(&trial);
    let mut carl = make(Kind::Go, "carl").spawn(&trial);
    ben.wait_begun();
    carl.wait_begun();
    assert_eq!(stack.sidecar.sessions_in("off-drain"), 3);
    std::thread::sleep(Duration::from_secs(2));
    let started = Instant::now();
    stack.sidecar.process.signal("TERM");
    let mut frames = Vec::new();
    let refused = wait_for("a refusal", Duration::from_secs(3), || {
        WebSocket::open(stack.sidecar.port, &target("late")).err()
    });
    assert_eq!(refused.status, 503, "a session asked for while draining");
    while let Some(frame) = socket.next() {
        frames.push(frame);
    }
    let (left_after, left) = (started.elapsed(), unix_now());
    assert!(
        left_after >= Duration::from_millis(3500),
        "the session ended {left_after:?} after SIGTERM, before its grace of 4 s"
    );
    // SignalResponse.leave is field 8, length-delimited; its action (field 3) RECONNECT is 2.
    let leave = frames
        .iter()
        .find(|(opcode, payload)| *opcode == 2 && payload.first() == Some(&0x42))
        .unwrap_or_else(|| panic!("no leave among {frames:?}"));
    assert!(
        leave.1.windows(2).any(|pair| pair == [0x18, 2]),
        "the leave does not ask to reconnect: {:?}",
        leave.1
    );
    let last = frames.last().expect("frames");
    assert_eq!(last.0, 8, "no Close frame at the end: {frames:?}");
    assert_eq!(
        stack.sidecar.process.wait(Duration::from_secs(10)),
        0,
        "the exit code of a drained sidecar"
    );
    let (ben, carl) = (ben.report(), carl.report());
    // During its grace a call goes on.
    carl.lasted_until(&ben.client, left);
    assert!(
        ben.number("/reconnecting") >= 1.0 || !ben.json["disconnected"].is_null(),
        "ben was not told to leave: {}",
        ben.json
    );
}

/// A client that dies without a word is cleaned up, and the other one's call goes on.
#[test]
fn a_crashed_client_is_cleaned_up() {
    let trial = Trial::new("a_crashed_client_is_cleaned_up", Load::Light);
    let stack = Stack::own(
        &trial,
        Options {
            resume_grace: "2s",
            consent_timeout: "5s",
            ..Options::default()
        },
    );
    let room = trial.room("off");
    let make = |kind, identity: &str, hz| {
        Client::new(kind, &stack.sidecar.url(), &room, identity)
            .with("--wait-peers", 2)
            .tone(hz)
            .seconds(14.0)
    };
    let mut anna = make(Kind::Python, "anna", 440.0).spawn(&trial);
    let ben = make(Kind::Go, "ben", 620.0).spawn(&trial);
    let carl = make(Kind::Node, "carl", 800.0).spawn(&trial);
    wait_for("three sessions", Duration::from_secs(40), || {
        (stack.sidecar.sessions_in(&room) == 3).then_some(())
    });
    std::thread::sleep(Duration::from_secs(3));
    let crashed = unix_now();
    anna.process.crash();
    wait_for("anna's session to end", Duration::from_secs(10), || {
        (stack.sidecar.sessions_in(&room) == 2).then_some(())
    });
    let status = stack.sidecar.status();
    assert_eq!(
        crate::harness::array(&status, "/sessions").len(),
        2,
        "/status.json still shows the crashed client: {status:#}"
    );
    let (ben, carl) = (ben.finish(), carl.finish());
    for ear in [&ben, &carl] {
        ear.lasted_until(&anna.client, crashed);
    }
    ben.received(&carl);
    carl.received(&ben);
    stack.sidecar.wait_empty(&room, Duration::from_secs(10));
    assert_eq!(stack.sidecar.complaints(), Vec::<String>::new());
}
