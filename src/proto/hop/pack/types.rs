//! What a packer takes and hands out.

use crate::hop::redundancy::Redundancy;
use crate::ladder::{CodecId, Rung, Rungs};
use std::time::Duration;

/// How long a packer waits for what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackTiming {
    /// Time that one framed packet covers, where an original isn't longer itself.
    pub group: Duration,
    /// A group goes out when its next original is so late.
    pub partner_late: Duration,
    /// A group goes native when its result isn't there so long after its end.
    pub deadline: Duration,
    /// After three groups in a row without a result, all goes native for so long; then one is tried.
    pub rest: Duration,
}

impl Default for PackTiming {
    fn default() -> Self {
        Self {
            group: Duration::from_millis(40),
            partner_late: Duration::from_millis(25),
            deadline: Duration::from_millis(20),
            rest: Duration::from_millis(300),
        }
    }
}

/// What a packer has to know of its stream and leg.
#[derive(Debug, Clone)]
pub struct PackerConfig {
    /// Payload type of Opus on the leg that the originals come from.
    pub opus_pt: u8,
    /// Payload type of RED there.
    pub red_pt: Option<u8>,
    /// Payload type of framed packets, from the receiver's `a=aic`.
    pub aic_pt: u8,
    /// Header extension id of the hint towards the receiver.
    pub hint_id: Option<u8>,
    /// Id of the audio level (RFC 6464): left out of coded packets, because the receiver measures it.
    pub level_id: Option<u8>,
    /// First sequence number of the hop. For a stream that went before on this leg, framed or not, the one
    /// after its last: no SRTP index may be used twice.
    pub first_sequence: u16,
    /// Rungs that the receiver can decode, from its `a=aic`.
    pub peer_rungs: Rungs,
    /// The receiver reads short headers, from its `a=aic`.
    pub short_headers: bool,
    /// It restores originals of 10 and 120 ms, from its `a=aic`.
    pub more_units: bool,
    /// When copies go along.
    pub redundancy: Redundancy,
    /// Waiting times.
    pub timing: PackTiming,
}

impl super::Packer {
    /// Payload types, ids and rungs of a new offer and answer, from the next packet on. `config.first_sequence` and
    /// `config.redundancy` don't matter: the stream goes on.
    pub fn renegotiated(&mut self, config: PackerConfig) {
        self.set_peer_rungs(config.peer_rungs);
        self.config = config;
    }
}

/// A group of originals to be coded. Hand back [`Packer::encoded`] or [`Packer::refused`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncodeJob {
    /// Comes back with the result.
    pub id: u64,
    /// What to code it with.
    pub rung: Rung,
    /// Opus payloads, consecutive, of the same duration.
    pub packets: Vec<Vec<u8>>,
    /// Milliseconds of each.
    pub unit_ms: u8,
    /// Originals lost right before the first of them.
    pub lost_before: u16,
}

/// An engine's result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// What it is coded with.
    pub codec: CodecId,
    /// The coded group.
    pub payload: Vec<u8>,
    /// Gain applied before coding, −32 to 31 dB.
    pub gain: i8,
    /// Duration of each original in milliseconds.
    pub unit_ms: u8,
    /// It holds speech.
    pub voice: bool,
    /// The rung used; a gate may have lifted it.
    pub rung: Rung,
}

/// Why an engine doesn't code a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// It is no Opus: end-to-end encrypted, say.
    Undecodable,
    /// It is stereo.
    Stereo,
    /// Its duration isn't one that it can code.
    Duration,
    /// It can't at the moment.
    Failed,
    /// Its queue is full.
    Busy,
    /// Others who share the work are past it already ([`crate::hop::recode`]).
    Stale,
}

/// Why an original went as it came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NativeReason {
    /// The rung is native, or the receiver can decode none as good as the wanted one.
    Rung,
    /// The engine failed the last groups.
    Resting,
    /// It is neither Opus nor RED of Opus.
    PayloadType,
    /// DTX or comfort noise: 8 bytes at most.
    Dtx,
    /// LiveKit's silence.
    Silence,
    /// No 10, 20, 40, 60 or 120 ms; or one of 10 ms without another.
    Duration,
    /// Stereo.
    Stereo,
    /// Older than, or the same as, one that came before.
    OutOfOrder,
    /// Too many groups wait for the engine already.
    Crowded,
    /// The engine's result didn't come in time.
    Missed,
    /// The engine refused it, or its result can't be used.
    Refused,
}

impl NativeReason {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::Rung,
        Self::Resting,
        Self::PayloadType,
        Self::Dtx,
        Self::Silence,
        Self::Duration,
        Self::Stereo,
        Self::OutOfOrder,
        Self::Crowded,
        Self::Missed,
        Self::Refused,
    ];

    /// Its name in metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Rung => "rung",
            Self::Resting => "resting",
            Self::PayloadType => "payload_type",
            Self::Dtx => "dtx",
            Self::Silence => "silence",
            Self::Duration => "duration",
            Self::Stereo => "stereo",
            Self::OutOfOrder => "out_of_order",
            Self::Crowded => "crowded",
            Self::Missed => "missed",
            Self::Refused => "refused",
        }
    }
}

/// A packer's counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PackerStats {
    /// Original packets taken.
    pub originals: u64,
    /// Not RTP: dropped.
    pub unreadable: u64,
    /// Lost originals recovered from RED.
    pub recovered: u64,
    /// Originals that came after they had been recovered: dropped.
    pub recovered_came: u64,
    /// Originals lost before they came here.
    pub lost: u64,
    /// Originals that went coded.
    pub coded: u64,
    /// Originals that went as they came, by reason; see [`PackerStats::native`].
    pub natives: [u64; NativeReason::ALL.len()],
    /// Originals that went once more, natively, because their coded form wasn't restored.
    pub resent: u64,
    /// Framed packets sent.
    pub framed: u64,
    /// Framed packets that carried a copy.
    pub copies: u64,
    /// Groups whose result didn't come in time.
    pub missed: u64,
    /// Results that came when their group had gone native.
    pub late_results: u64,
    /// Packets dropped because nobody polled them.
    pub dropped: u64,
}

impl PackerStats {
    /// Originals that went as they came because of `reason`.
    #[must_use]
    pub fn native(&self, reason: NativeReason) -> u64 {
        self.natives.get(reason as usize).copied().unwrap_or(0)
    }
}

/// What a framed packet was made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sent {
    /// Bytes that the originals in it took on the wire of their sender.
    pub native_bytes: u64,
    /// Originals in it.
    pub originals: u8,
    /// Its rung.
    pub rung: Rung,
    /// It carries a copy of an earlier one.
    pub copy: bool,
}
