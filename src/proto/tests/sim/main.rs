//! Whole calls through the core on a virtual clock and a seeded network: two ends of independent
//! stacks, the session and the relay between them. `AURALINK_SEED=n` replays one seed.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    // The start of the virtual clock is the only one taken.
    clippy::disallowed_methods
)]

mod net;
mod peer;
mod sdp;
mod world;

mod chain;
mod dtls;
mod dtls_pair;
mod golden;
mod handshake;
mod hop;
mod hostile;
mod ice;
mod media;
mod recode;
mod session;
mod strangers;
