//! The AIC hop of one audio stream between two AuraLinks: [`Packer`] turns its packets into framed
//! ones, [`Restorer`] turns framed ones back. Speech is coded and decoded by an engine outside; both
//! hand out jobs and take results, and neither waits for them. docs/protocol.md says what goes over
//! the wire.
//!
//! Both are called alike: after any call with a `now`, poll jobs, packets and the timeout until there
//! are no more; call `handle_timeout` when the timeout is reached.

mod header;
mod original;
mod pack;
pub mod recode;
mod redundancy;
pub mod report;
mod restore;
mod run;
#[cfg(test)]
mod tests;
mod window;

pub use pack::{
    EncodeJob, Encoded, NativeReason, PackTiming, Packer, PackerConfig, PackerStats, Refusal, Sent,
};
pub use redundancy::Redundancy;
pub use report::Report;
pub use restore::{
    DecodeJob, Decoded, RestoreTiming, Restored, Restorer, RestorerConfig, RestorerStats,
};
pub use run::Anchors;

/// IP and UDP headers of a datagram, as everywhere in the books: IPv4.
const IP_UDP: usize = 28;

/// SRTP tag of a framed packet.
const SHORT_TAG: usize = 4;

/// SRTP tag of an ordinary packet.
const TAG: usize = 10;
