//! Stock LiveKit clients through the sidecar to the stock server, and the sidecar against what could go wrong around it.
//!
//! `scripts/setup.sh all` installs server and clients; a missing one fails its test. Run with two test threads: each call
//! keeps a core busy. Logs of every process stay under `target/…/tmp/livekit/NAME-OF-THE-TEST`, and the end of them is
//! printed where a test fails. Tests with a network of their own need root (`ip netns`), as does counting packets.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::disallowed_methods
)]

mod calls;
mod chain;
mod client;
mod cycles;
mod disclosure;
mod faults;
mod frozen;
mod handshake;
mod harness;
mod hop;
mod hop_faults;
mod http;
mod identity;
mod lean;
mod network;
mod recode;
mod reconnect;
mod reload;
mod sabotage;
mod servers;
mod strangers;
mod video;
mod whip;
mod wire;
