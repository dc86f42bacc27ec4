//! Whole calls through the core on a virtual clock and a seeded network: two ends of independent
//! stacks, the session and the relay between them. `AURALINK_SEED=n` replays one seed.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr
)]

mod net;
mod peer;
mod sdp;
mod world;

mod handshake;
mod hostile;
mod ice;
mod media;
mod session;
