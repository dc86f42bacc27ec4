//! Every stock client publishes and subscribes audio, video and data, both ways, with one and two peer connections, in rooms
//! that are off and in rooms that are lean.

use crate::client::{Client, Kind, call};
use crate::harness::{Load, Trial};
use crate::servers::{Options, Stack};
use std::sync::Arc;

/// A call of two who send each other a tone, a picture, and messages of 60 kB.
fn full_call(name: &'static str, load: Load, mode: &str, a: (Kind, bool), b: (Kind, bool)) {
    let trial = Trial::new(name, load);
    let firefox = [a.0, b.0].contains(&Kind::Firefox);
    let stack = if firefox {
        Arc::new(Stack::own(&trial, Options::off_loopback()))
    } else {
        Stack::shared(&trial)
    };
    let room = trial.room(mode);
    let make = |(kind, dual): (Kind, bool), identity: &str, hz: f64| {
        let client = Client::new(kind, &stack.sidecar.url(), &room, identity)
            .tone(hz)
            .video(320, 240)
            .data(10, 60_000);
        if dual { client.dual() } else { client }
    };
    call(
        &trial,
        &stack.sidecar,
        &room,
        vec![make(a, "anna", 440.0), make(b, "ben", 620.0)],
    );
    let modes: Vec<_> = stack.sidecar.joins(&room);
    assert!(
        modes.iter().all(|join| join["mode"] == mode),
        "the rooms' modes: {modes:?}"
    );
}

const SINGLE: bool = false;
const DUAL: bool = true;

#[test]
fn off_python_single_and_node_dual() {
    full_call(
        "off_python_single_and_node_dual",
        Load::Browser,
        "off",
        (Kind::Python, SINGLE),
        (Kind::Node, DUAL),
    );
}

#[test]
fn off_python_dual_and_go() {
    full_call(
        "off_python_dual_and_go",
        Load::Browser,
        "off",
        (Kind::Python, DUAL),
        (Kind::Go, SINGLE),
    );
}

#[test]
fn off_chromium_single_and_node_single() {
    full_call(
        "off_chromium_single_and_node_single",
        Load::Browser,
        "off",
        (Kind::Chromium, SINGLE),
        (Kind::Node, SINGLE),
    );
}

#[test]
fn off_chromium_dual_and_go() {
    full_call(
        "off_chromium_dual_and_go",
        Load::Browser,
        "off",
        (Kind::Chromium, DUAL),
        (Kind::Go, SINGLE),
    );
}

#[test]
fn off_firefox_single_and_python_single() {
    full_call(
        "off_firefox_single_and_python_single",
        Load::Browser,
        "off",
        (Kind::Firefox, SINGLE),
        (Kind::Python, SINGLE),
    );
}

#[test]
fn lean_python_single_and_chromium_dual() {
    full_call(
        "lean_python_single_and_chromium_dual",
        Load::Browser,
        "lean",
        (Kind::Python, SINGLE),
        (Kind::Chromium, DUAL),
    );
}

#[test]
fn lean_python_dual_and_node_single() {
    full_call(
        "lean_python_dual_and_node_single",
        Load::Browser,
        "lean",
        (Kind::Python, DUAL),
        (Kind::Node, SINGLE),
    );
}

#[test]
fn lean_go_and_node_dual() {
    full_call(
        "lean_go_and_node_dual",
        Load::Browser,
        "lean",
        (Kind::Go, SINGLE),
        (Kind::Node, DUAL),
    );
}

#[test]
fn lean_chromium_single_and_firefox_dual() {
    full_call(
        "lean_chromium_single_and_firefox_dual",
        Load::Browser,
        "lean",
        (Kind::Chromium, SINGLE),
        (Kind::Firefox, DUAL),
    );
}
