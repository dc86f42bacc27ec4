//! What lean saves on the wire, and what it must leave alone. Every figure is kbps of IP packets on loopback.

use crate::client::{Client, Kind, Report};
use crate::harness::{Load, Trial, array, number, setting, string};
use crate::servers::{Options, Stack};
use crate::wire::{Flow, Wire, kbps};
use std::sync::Arc;
use std::time::Duration;

fn speech(name: &str) -> String {
    format!("{}/{name}.wav", setting("AURALINK_SPEECH"))
}

/// kbps from this participant to the sidecar.
fn up(flows: &[Flow], sidecar: &[u16], report: &Report) -> f64 {
    let ports = report.local_ports();
    kbps(flows, |f| {
        f.udp && ports.contains(&f.src) && sidecar.contains(&f.dst)
    })
}

/// kbps from the sidecar to this participant.
fn down(flows: &[Flow], sidecar: &[u16], report: &Report) -> f64 {
    let ports = report.local_ports();
    kbps(flows, |f| {
        f.udp && ports.contains(&f.dst) && sidecar.contains(&f.src)
    })
}

fn wait_sessions(stack: &Stack, room: &str, count: usize) {
    crate::harness::wait_for("all participants", Duration::from_secs(60), || {
        (stack.sidecar.sessions_in(room) >= count).then_some(())
    });
}

/// kbps up of someone who speaks in a browser, in a room that is off and in a lean one.
fn browser_uplink(name: &'static str, browser: Kind) -> (f64, f64) {
    let trial = Trial::new(name, Load::Alone);
    let stack = if browser == Kind::Firefox {
        Arc::new(Stack::own(&trial, Options::off_loopback()))
    } else {
        Stack::shared(&trial)
    };
    let sidecar = &stack.sidecar;
    let wav = speech("talker-a");
    let [off, lean] = ["off", "lean"].map(|mode| {
        let room = trial.room(mode);
        let make = |kind, who: &str| {
            let identity = format!("{mode}-{who}");
            Client::new(kind, &sidecar.url(), &room, &identity).seconds(13.0)
        };
        let talker = make(browser, "talker").wav(&wav).spawn(&trial);
        let listener = make(Kind::Python, "listener").spawn(&trial);
        wait_sessions(&stack, &room, 2);
        std::thread::sleep(Duration::from_secs(3));
        let flows = Wire::count(&trial, &format!("wire-{mode}"), 8.0, &sidecar.udp_ports()).flows();
        let (talker, listener) = (talker.finish(), listener.finish());
        listener.lasted(&talker);
        let heard = listener.audio_from(&talker.client.identity);
        assert!(
            number(heard, "/rms") > 0.01 && number(heard, "/heard_ms") > 8_000.0,
            "the listener heard no speech: {heard}"
        );
        up(&flows, &sidecar.udp_ports(), &talker)
    });
    println!(
        "uplink of a speaking {browser:?}: {off:.1} kbps off, {lean:.1} kbps lean, {:.1} % saved",
        100.0 * (1.0 - lean / off)
    );
    (off, lean)
}

#[test]
fn a_browser_publisher_sends_a_quarter() {
    let (off, lean) = browser_uplink("a_browser_publisher_sends_a_quarter", Kind::Chromium);
    assert!(
        (90.0..150.0).contains(&off),
        "off is no longer the default publisher: {off:.1} kbps"
    );
    assert!(
        lean <= 0.25 * off,
        "lean saves less than three quarters: {off:.1} → {lean:.1} kbps"
    );
}

/// It knows no RED, and livekit-client writes its own `maxaveragebitrate` over the answer's, the one limit of Opus that Firefox keeps to: only
/// the packets become longer.
#[test]
fn a_firefox_publisher_sends_longer_packets() {
    let (off, lean) = browser_uplink("a_firefox_publisher_sends_longer_packets", Kind::Firefox);
    assert!(
        (65.0..82.0).contains(&off),
        "Firefox no longer sends what is counted as its default: {off:.1} kbps"
    );
    assert!(lean <= 0.82 * off, "{off:.1} → {lean:.1} kbps");
}

#[test]
fn a_subscriber_gets_speech_without_redundancy() {
    let trial = Trial::new("a_subscriber_gets_speech_without_redundancy", Load::Alone);
    let stack = Stack::shared(&trial);
    let sidecar = &stack.sidecar;
    // Only participants lean-* of this room are lean: the publisher sends RED.
    let room = trial.room("mixed");
    let make = |kind, identity: &str| {
        Client::new(kind, &sidecar.url(), &room, identity)
            .with("--wait-peers", 2)
            .seconds(13.0)
    };
    let talker = make(Kind::Python, "talker")
        .wav(&speech("talker-a"))
        .spawn(&trial);
    let off = make(Kind::Python, "off-ear").spawn(&trial);
    let lean = make(Kind::Node, "lean-ear").spawn(&trial);
    wait_sessions(&stack, &room, 3);
    // Until the first receiver reports show that nothing is lost.
    std::thread::sleep(Duration::from_secs(6));
    let flows = Wire::count(&trial, "wire", 4.0, &sidecar.udp_ports()).flows();
    let (talker, off, lean) = (talker.finish(), off.finish(), lean.finish());
    for ear in [&off, &lean] {
        ear.lasted(&talker);
        let heard = ear.audio_from("talker");
        assert!(
            number(heard, "/rms") > 0.01,
            "{}: {heard}",
            ear.client.identity
        );
    }
    let off = down(&flows, &sidecar.udp_ports(), &off);
    let lean = down(&flows, &sidecar.udp_ports(), &lean);
    let saved = 100.0 * (1.0 - lean / off);
    println!("downlink of one talker: {off:.1} kbps off, {lean:.1} kbps lean, {saved:.1} % saved");
    assert!(off > 60.0, "the publisher sends no RED: {off:.1} kbps");
    assert!(
        saved >= 30.0,
        "shedding saves only {saved:.1} % ({off:.1} → {lean:.1} kbps)"
    );
}

#[test]
fn stereo_is_never_steered() {
    let trial = Trial::new("stereo_is_never_steered", Load::Alone);
    let stack = Stack::shared(&trial);
    let sidecar = &stack.sidecar;
    let mut measured = Vec::new();
    for mode in ["off", "lean"] {
        let room = trial.room(mode);
        let make = |kind, identity: &str| {
            Client::new(kind, &sidecar.url(), &room, identity)
                .flag("--stereo")
                .seconds(9.0)
        };
        let player = make(Kind::Chromium, &format!("{mode}-player"))
            .tone(440.0)
            .spawn(&trial);
        let listener = make(Kind::Chromium, &format!("{mode}-listener")).spawn(&trial);
        wait_sessions(&stack, &room, 2);
        std::thread::sleep(Duration::from_secs(3));
        let flows = Wire::count(&trial, &format!("wire-{mode}"), 4.0, &sidecar.udp_ports()).flows();
        let (player, listener) = (player.finish(), listener.finish());
        listener.received(&player);
        measured.push((
            up(&flows, &sidecar.udp_ports(), &player),
            down(&flows, &sidecar.udp_ports(), &listener),
        ));
    }
    let [(off_up, off_down), (lean_up, lean_down)] = measured[..] else {
        unreachable!()
    };
    println!(
        "stereo tone: up {off_up:.1} → {lean_up:.1} kbps, down {off_down:.1} → {lean_down:.1} kbps"
    );
    assert!(off_up > 30.0, "no stereo tone was sent: {off_up:.1} kbps");
    for (off, lean) in [(off_up, lean_up), (off_down, lean_down)] {
        assert!(
            (lean / off - 1.0).abs() < 0.15,
            "a stereo track costs {off:.1} kbps off and {lean:.1} kbps lean: it was steered"
        );
    }
}

#[test]
fn a_steered_publisher_sends_plain_opus_in_long_packets() {
    let trial = Trial::new(
        "a_steered_publisher_sends_plain_opus_in_long_packets",
        Load::Browser,
    );
    let stack = Stack::shared(&trial);
    let room = trial.room("lean");
    let make = |kind, identity: &str| {
        Client::new(kind, &stack.sidecar.url(), &room, identity).seconds(8.0)
    };
    let reports = crate::client::call(
        &trial,
        &stack.sidecar,
        &room,
        vec![
            make(Kind::Chromium, "talker").tone(440.0),
            make(Kind::Node, "listener"),
        ],
    );
    let sent = array(&reports[0].json, "/outbound")
        .iter()
        .find(|flow| string(flow, "/kind") == "audio")
        .expect("the browser's outbound audio");
    let packets = number(sent, "/packets");
    let bytes = number(sent, "/bytes");
    // 40 ms a packet instead of 20; a browser needs a second or so to publish.
    assert!(
        (100.0..320.0).contains(&packets),
        "{packets} packets in 8 s and a start: they are not of 40 ms: {sent}"
    );
    let payload = bytes / packets;
    assert!(
        payload < 110.0,
        "{payload:.0} bytes a packet are more than 12 kbps: {sent}"
    );
}
