//! What goes to the engine and what comes back: one job per hop packet.

use auralink_proto::ladder::{CodecId, Rung};

/// Which way a track's media goes through the engine; each has a state of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// From the original Opus to a rung.
    Encode,
    /// From a rung back to Opus.
    Decode,
    /// From Opus to Opus, by itself.
    Recode,
}

/// A job. Jobs of one track and direction are done in the order in which they were sent.
#[derive(Debug, Clone)]
pub enum Job {
    /// Code a group of original packets.
    Encode(Encode),
    /// Restore the original packets of a coded payload, or conceal lost ones.
    Decode(Decode),
    /// Code an Opus packet anew.
    Recode(Recode),
    /// Forget a track's state. Nothing comes back.
    Close {
        /// The worker's key of the track.
        track: u64,
        /// Which of its states. What several streams share isn't forgotten by the end of one.
        direction: Direction,
    },
}

/// A group of original Opus packets (RFC 6716) to be coded as one payload: mono, each of the same
/// 10, 20, 40 or 60 ms, whole 20 ms and at most 60 ms in all; or one of 120 ms.
#[derive(Debug, Clone)]
pub struct Encode {
    /// The worker's key of the track; one stream of media.
    pub track: u64,
    /// Comes back with the outcome.
    pub id: u64,
    /// The rung wanted; the outcome says which was used.
    pub rung: Rung,
    /// The Opus payloads, in order.
    pub packets: Vec<Vec<u8>>,
    /// How many originals were lost right before the first of them.
    pub lost_before: u16,
}

/// A payload to be restored.
#[derive(Debug, Clone)]
pub struct Decode {
    /// The worker's key of the track; one stream of media.
    pub track: u64,
    /// Comes back with the outcome.
    pub id: u64,
    /// What it is coded with. Ignored where `lost`: the codec of the last payload is the one that conceals.
    pub codec: CodecId,
    /// The coded speech; empty where `lost`.
    pub payload: Vec<u8>,
    /// Decibels that the sender applied before coding, −32 to 31.
    pub gain: i8,
    /// Milliseconds of each original: 10, 20, 40, 60 or 120.
    pub unit_ms: u8,
    /// How many originals it covers, 1 to 4.
    pub count: u8,
    /// The payload never came: make up `count` originals from what came before, fading out.
    pub lost: bool,
}

/// An Opus packet (RFC 6716) to be coded anew: mono, 10, 20, 40, 60 or 120 ms.
#[derive(Debug, Clone)]
pub struct Recode {
    /// The worker's key of the track; one stream of media.
    pub track: u64,
    /// Comes back with the outcome.
    pub id: u64,
    /// Of the source: streams that say the same get the same packets for the same ones of theirs, and
    /// only the first that asks costs anything. None: the track is the source's only stream.
    pub key: Option<u128>,
    /// The rung, L3 or better; none: decoded with LACE and coded at the local rate.
    pub rung: Option<Rung>,
    /// The packet.
    pub payload: Vec<u8>,
    /// How many packets of the stream were lost right before it.
    pub lost_before: u16,
}

/// What became of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Of [`Encode`].
    Encoded(Encoded),
    /// Of [`Recode`].
    Recoded(Recoded),
    /// Of [`Encode`] and [`Recode`]: the group has to go as it came.
    Refused {
        /// The job's.
        track: u64,
        /// The job's.
        id: u64,
        /// Why.
        reason: Refusal,
    },
    /// Of [`Decode`].
    Decoded(Decoded),
    /// Of [`Decode`]: nothing can be restored.
    Failed {
        /// The job's.
        track: u64,
        /// The job's.
        id: u64,
    },
}

/// A coded group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// The job's.
    pub track: u64,
    /// The job's.
    pub id: u64,
    /// The rung really used: higher than the one wanted where it isn't speech or a model is out of order, L1 for the pauses of L2.
    pub rung: Rung,
    /// What the payload is coded with.
    pub codec: CodecId,
    /// The coded speech: the frames of the bundle's codec, or one Opus packet.
    pub payload: Vec<u8>,
    /// Decibels applied before coding, −32 to 31; to be undone by the receiver.
    pub gain: i8,
    /// Milliseconds of each original: 10, 20, 40, 60 or 120.
    pub unit_ms: u8,
    /// Somebody speaks in it.
    pub voice: bool,
}

/// A packet coded anew.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recoded {
    /// The job's.
    pub track: u64,
    /// The job's.
    pub id: u64,
    /// One Opus packet of the same duration.
    pub payload: Vec<u8>,
    /// It was coded for another stream of the same source before.
    pub shared: bool,
}

/// Restored originals.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decoded {
    /// The job's.
    pub track: u64,
    /// The job's.
    pub id: u64,
    /// An Opus payload for each original, in order.
    pub packets: Vec<Vec<u8>>,
    /// The audio level of each (RFC 6464): −dBov, 0 loudest, 127 silence.
    pub levels: Vec<u8>,
    /// Loud enough to be somebody speaking.
    pub voice: bool,
}

/// Why a group can't be coded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// Not Opus, or not to be read (end-to-end encrypted).
    Undecodable,
    /// Two channels.
    Stereo,
    /// None of these durations, not all the same, too many or no whole 20 ms together, DTX, or nothing at all.
    Duration,
    /// The codec failed, and no other could stand in.
    Failed,
    /// Other streams of the source are past it already.
    Stale,
}

impl Refusal {
    /// Its name in metrics and logs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Undecodable => "undecodable",
            Self::Stereo => "stereo",
            Self::Duration => "duration",
            Self::Failed => "failed",
            Self::Stale => "stale",
        }
    }
}

/// A job that wasn't taken; the caller goes on without it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Busy {
    /// The thread that the track is pinned to is behind: send the media as it came.
    #[error("the codec thread's queue is full")]
    Full,
    /// The thread that the track is pinned to hangs, or fell and isn't up again.
    #[error("the codec thread hangs")]
    Hangs,
    /// The engine was shut down.
    #[error("the engine has ended")]
    Ended,
}

impl Job {
    /// The worker's key of the track.
    #[must_use]
    pub const fn track(&self) -> u64 {
        match self {
            Self::Encode(job) => job.track,
            Self::Decode(job) => job.track,
            Self::Recode(job) => job.track,
            Self::Close { track, .. } => *track,
        }
    }

    /// The source that several tracks may share, which keeps them on one thread.
    pub(crate) const fn source(&self) -> Option<u128> {
        match self {
            Self::Recode(job) => job.key,
            _ => None,
        }
    }
}

impl Outcome {
    /// The key of the track and the job's number.
    #[must_use]
    pub const fn of(&self) -> (u64, u64) {
        match self {
            Self::Encoded(e) => (e.track, e.id),
            Self::Decoded(d) => (d.track, d.id),
            Self::Recoded(r) => (r.track, r.id),
            Self::Refused { track, id, .. } | Self::Failed { track, id } => (*track, *id),
        }
    }
}
