//! Resume (which restarts ICE), full reconnect, end-to-end encryption, active speakers, simulcast.

use crate::client::{Client, Kind, Report, Running, call};
use crate::harness::{Load, Trial, array, number, string, wait_for};
use crate::servers::{Options, Stack};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

/// One client of `kind` goes through a scenario while messages and tones are under way; nothing reliable may be lost.
fn scenario(
    name: &'static str,
    load: Load,
    kind: Kind,
    dual: bool,
    scenario: &str,
    mode: &str,
) -> (Arc<Stack>, String, Report) {
    let trial = Trial::new(name, load);
    let stack = if kind == Kind::Firefox {
        Arc::new(Stack::own(&trial, Options::off_loopback()))
    } else {
        Stack::shared(&trial)
    };
    let room = trial.room(mode);
    let make = |kind, identity: &str, hz| {
        Client::new(kind, &stack.sidecar.url(), &room, identity)
            .tone(hz)
            .seconds(9.0)
    };
    let mut anna = make(kind, "anna", 440.0).scenario(scenario, 3.0);
    if dual {
        anna = anna.dual();
    }
    // Longer than anna's start takes: he has to be there for all of her call.
    let other = if scenario == "resume" {
        Kind::Go
    } else {
        Kind::Node
    };
    let ben = make(other, "ben", 620.0).data(150, 1000);
    let (anna, ben) = (anna.spawn(&trial), ben.spawn(&trial));
    let (anna, ben) = (anna.finish(), ben.finish());
    assert!(
        anna.number("/reconnecting") >= 1.0 && anna.number("/reconnected") >= 1.0,
        "{scenario} did not happen: {}",
        anna.json
    );
    for (ear, hz, peer) in [(&anna, 620.0, "ben"), (&ben, 440.0, "anna")] {
        ear.lasted(if peer == "ben" { &ben } else { &anna });
        let audio = ear.audio_from(peer);
        let sounding = number(audio, "/heard_ms") / 1000.0;
        assert!(
            (number(audio, "/tone_hz") / hz - 1.0).abs() < 0.02 && sounding > 5.0,
            "{}: {sounding:.1} s of {peer}'s tone in 9 s: {audio}",
            ear.client.identity
        );
    }
    let data = anna.data_from("ben");
    assert_eq!(number(data, "/bad"), 0.0, "damaged messages: {data}");
    assert_eq!(
        number(data, "/duplicates"),
        0.0,
        "repeated messages: {data}"
    );
    anna.met_only(&stack.sidecar);
    stack.sidecar.wait_empty(&room, Duration::from_secs(25));
    assert_eq!(stack.sidecar.complaints(), Vec::<String>::new());
    (stack, room, anna)
}

/// A resume keeps the session (no new join at the sidecar) and every reliable message.
fn resume(name: &'static str, load: Load, kind: Kind, dual: bool, mode: &str) {
    let (stack, room, anna) = scenario(name, load, kind, dual, "resume", mode);
    let joins = stack.sidecar.joins(&room);
    let resumed = joins.iter().filter(|join| join["resumed"] == true).count();
    let fresh = joins.len() - resumed;
    assert!(
        fresh == 2 && resumed >= 1,
        "two joins and a resume: {joins:?}"
    );
    let data = anna.data_from("ben");
    assert_eq!(
        number(data, "/reliable"),
        150.0,
        "reliable messages across the resume: {data}"
    );
}

/// A full reconnect is a new session; the old one ends.
fn full(name: &'static str, load: Load, kind: Kind, dual: bool) {
    let (stack, room, _) = scenario(name, load, kind, dual, "full-reconnect", "off");
    let joins = stack.sidecar.joins(&room);
    let fresh = joins.iter().filter(|join| join["resumed"] == false).count();
    assert_eq!(fresh, 3, "two joins and one anew: {joins:?}");
}

#[test]
fn resume_python_single() {
    resume(
        "resume_python_single",
        Load::Light,
        Kind::Python,
        false,
        "off",
    );
}

#[test]
fn resume_python_dual_lean() {
    resume(
        "resume_python_dual_lean",
        Load::Light,
        Kind::Python,
        true,
        "lean",
    );
}

#[test]
fn resume_node_single_lean() {
    resume(
        "resume_node_single_lean",
        Load::Light,
        Kind::Node,
        false,
        "lean",
    );
}

#[test]
fn resume_chromium_single() {
    resume(
        "resume_chromium_single",
        Load::Browser,
        Kind::Chromium,
        false,
        "off",
    );
}

#[test]
fn resume_chromium_dual() {
    resume(
        "resume_chromium_dual",
        Load::Browser,
        Kind::Chromium,
        true,
        "off",
    );
}

#[test]
fn resume_firefox_single() {
    resume(
        "resume_firefox_single",
        Load::Browser,
        Kind::Firefox,
        false,
        "off",
    );
}

#[test]
fn resume_go() {
    resume("resume_go", Load::Light, Kind::Go, false, "off");
}

#[test]
fn full_reconnect_python_single() {
    full(
        "full_reconnect_python_single",
        Load::Light,
        Kind::Python,
        false,
    );
}

#[test]
fn full_reconnect_node_dual() {
    full("full_reconnect_node_dual", Load::Light, Kind::Node, true);
}

#[test]
fn full_reconnect_chromium() {
    full(
        "full_reconnect_chromium",
        Load::Browser,
        Kind::Chromium,
        false,
    );
}

/// Everyone with the key understands everyone; who has another key does not, so encryption was really on.
fn encrypted(name: &'static str, mode: &str, dual: bool) {
    let trial = Trial::new(name, Load::Browser);
    let stack = Stack::shared(&trial);
    let room = trial.room(mode);
    let make = |kind, identity: &str, hz: f64| {
        let client = Client::new(kind, &stack.sidecar.url(), &room, identity)
            .with("--wait-peers", 2)
            .tone(hz)
            .video(320, 240)
            .seconds(9.0);
        if dual { client.dual() } else { client }
    };
    let anna = make(Kind::Chromium, "anna", 440.0)
        .data(5, 60_000)
        .e2ee("correct horse")
        .spawn(&trial);
    let ben = make(Kind::Python, "ben", 620.0)
        .data(5, 60_000)
        .e2ee("correct horse")
        .spawn(&trial);
    // He hears noise or nothing, and his SDK may call that an error.
    let stranger = Client::new(Kind::Node, &stack.sidecar.url(), &room, "stranger")
        .with("--wait-peers", 2)
        .seconds(9.0)
        .e2ee("another key")
        .spawn(&trial);
    let (anna, ben, stranger) = (anna.report(), ben.finish(), stranger.report());
    anna.received(&ben);
    ben.received(&anna);
    for (peer, hz) in [("anna", 440.0), ("ben", 620.0)] {
        let audio = stranger.audio_from(peer);
        let clear = (number(audio, "/tone_hz") / hz - 1.0).abs() < 0.02
            && number(audio, "/tone_share") > 0.5;
        assert!(!clear, "who lacks the key hears {peer}: {audio}");
    }
    // Not because nothing came; its statistics are a second apart.
    let ended = [&anna, &ben, &stranger].map(|report| report.moment("/ended_at"));
    let end = ended.into_iter().fold(f64::MAX, f64::min);
    let last = stranger.moment("/packets_at");
    assert!(
        last >= end - 1.3,
        "who lacks the key got no packets in the last {:.1} s: {}",
        end - last,
        stranger.json
    );
    anna.met_only(&stack.sidecar);
    ben.met_only(&stack.sidecar);
}

#[test]
fn e2ee_off_single() {
    encrypted("e2ee_off_single", "off", false);
}

#[test]
fn e2ee_off_dual() {
    encrypted("e2ee_off_dual", "off", true);
}

#[test]
fn e2ee_lean_dual() {
    encrypted("e2ee_lean_dual", "lean", true);
}

#[test]
fn e2ee_lean_single() {
    encrypted("e2ee_lean_single", "lean", false);
}

/// Audio levels cross the sidecar: who was there before hears of the speaker.
fn speakers(name: &'static str, load: Load, mode: &str, publisher: Kind) {
    let trial = Trial::new(name, load);
    let stack = Stack::shared(&trial);
    let room = trial.room(mode);
    let make = |kind, identity: &str| {
        Client::new(kind, &stack.sidecar.url(), &room, identity).seconds(7.0)
    };
    let ears = [Kind::Python, Kind::Go].map(|kind| {
        make(kind, &format!("{kind:?}-ear"))
            .with("--wait-peers", 2)
            .spawn(&trial)
    });
    wait_for("the listeners to join", Duration::from_secs(30), || {
        (stack.sidecar.sessions_in(&room) == 2).then_some(())
    });
    let speaker = make(publisher, "speaker")
        .with("--wait-peers", 2)
        .tone(440.0)
        .spawn(&trial)
        .finish();
    for ear in ears.map(Running::finish) {
        ear.received(&speaker);
        assert!(
            ear.number("/active_speakers") >= 1.0,
            "{} never heard of the active speaker: {}",
            ear.client.identity,
            ear.json
        );
    }
}

#[test]
fn active_speakers_off() {
    speakers("active_speakers_off", Load::Light, "off", Kind::Node);
}

#[test]
fn active_speakers_lean() {
    speakers("active_speakers_lean", Load::Light, "lean", Kind::Python);
}

#[test]
fn active_speakers_lean_browser() {
    speakers(
        "active_speakers_lean_browser",
        Load::Browser,
        "lean",
        Kind::Chromium,
    );
}

/// Several layers leave the publisher, and the largest can be had.
#[test]
fn simulcast_layers_cross() {
    let trial = Trial::new("simulcast_layers_cross", Load::Alone);
    let stack = Stack::shared(&trial);
    let room = trial.room("off");
    let make = |kind, identity: &str| {
        Client::new(kind, &stack.sidecar.url(), &room, identity).seconds(11.0)
    };
    let reports = call(
        &trial,
        &stack.sidecar,
        &room,
        vec![
            make(Kind::Chromium, "camera").video(960, 540),
            make(Kind::Python, "viewer"),
        ],
    );
    let layers: BTreeSet<_> = array(&reports[0].json, "/outbound")
        .iter()
        .filter(|flow| string(flow, "/kind") == "video" && number(flow, "/packets") > 20.0)
        .map(|flow| string(flow, "/rid").to_owned())
        .collect();
    assert!(
        layers.len() >= 2,
        "only the layers {layers:?} were sent: {}",
        reports[0].json
    );
    let seen = reports[1].video_from("camera");
    assert!(
        number(seen, "/width") >= 960.0,
        "the viewer never got the largest layer: {seen}"
    );
}
