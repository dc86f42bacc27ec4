//! Every stock client joins over a link that loses packets, and media flows: DTLS of BoringSSL (Chromium, and libwebrtc in Python and
//! Node), of NSS (Firefox) and of Pion, as a client and as a server.

use crate::chain::{Link, RIGHT, options};
use crate::client::{Client, Kind, Running};
use crate::harness::{Load, Trial, array, number, string};
use crate::servers::{LiveKit, Options, RULES, Sidecar};
use std::process::Command;
use std::time::Duration;

/// All clients at one end of the link, sidecar and server at the other.
fn joins(name: &'static str, loss: &str) {
    let trial = Trial::new(name, Load::Alone);
    let room = trial.room("off");
    // Only UDP is lost: signalling is TCP, and would take the seconds that a client gives its join.
    let link = Link::new(&trial, &["--udp", "--loss", loss, "--delay", "15"]);
    let sidecar = link.right(|| {
        let livekit = LiveKit::start(&trial.dir);
        let sidecar = Sidecar::start(
            &trial.dir.join("sidecar"),
            livekit.port,
            Options {
                ips: vec![RIGHT.to_owned()],
                ..options(RULES.to_owned())
            },
        );
        (livekit, sidecar)
    });
    let (livekit, sidecar) = sidecar;
    for process in [&livekit.process, &sidecar.process] {
        trial.watch(&process.log);
    }
    let kinds = [
        (Kind::Chromium, "chromium"),
        (Kind::Firefox, "firefox"),
        (Kind::Python, "python"),
        (Kind::Node, "node"),
        (Kind::Go, "go"),
    ];
    let clients = link.left(|| {
        // Over ICE-TCP nothing would be lost.
        let rule = format!("rule add ipproto tcp dport {} prohibit", sidecar.tcp_port);
        let done = Command::new("ip").args(rule.split(' ')).status();
        assert!(done.is_ok_and(|status| status.success()), "ip {rule}");
        kinds.map(|(kind, identity)| {
            let client = Client::new(kind, &sidecar.url(), &room, identity)
                .tone(440.0)
                .with("--wait-peers", kinds.len() - 1)
                .seconds(5.0);
            let client = match kind {
                // With a peer connection for each direction it is the DTLS client of one and the server of the other.
                Kind::Chromium | Kind::Node => client.dual(),
                Kind::Python => client.with("--connect-timeout", 20),
                _ => client,
            };
            client.spawn(&trial)
        })
    });
    let reports = clients.map(Running::finish);
    for report in &reports {
        let me = &report.client.identity;
        for peer in reports.iter().filter(|peer| peer.client.identity != *me) {
            report.lasted(peer);
            let peer = &peer.client.identity;
            let audio = report.audio_from(peer);
            // Of five seconds. Go conceals nothing: each lost packet, on the way up or down, is silence there.
            assert!(
                number(audio, "/heard_ms") > 1_000.0,
                "{me} hears nothing of {peer}: {audio}"
            );
        }
        let udp = format!(":{}", sidecar.tcp_port);
        for pair in array(&report.json, "/ice") {
            assert!(
                !string(pair, "/remote").ends_with(&udp),
                "{me} is on a path without loss: {pair}"
            );
        }
    }
    link.right(|| sidecar.wait_empty(&room, Duration::from_secs(30)));
    assert_eq!(sidecar.complaints(), Vec::<String>::new());
}

#[test]
fn every_client_joins_at_10_percent_loss() {
    joins("every_client_joins_at_10_percent_loss", "10");
}

#[test]
fn every_client_joins_at_30_percent_loss() {
    joins("every_client_joins_at_30_percent_loss", "30");
}
