//! What a restorer takes and hands out.

use crate::ladder::{CodecId, Rung, Rungs};
use std::time::Duration;

/// How long a restorer waits for what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RestoreTiming {
    /// For a packet that others overtook.
    pub hold: Duration,
    /// What is ready waits so long for what should go before it.
    pub ready_wait: Duration,
    /// For a job's result.
    pub decode_deadline: Duration,
    /// The most that is made up in one gap.
    pub conceal: Duration,
    /// Rungs of which the engine decodes nothing in time are taken back for so long.
    pub rest: Duration,
}

impl Default for RestoreTiming {
    fn default() -> Self {
        Self {
            hold: Duration::from_millis(30),
            ready_wait: Duration::from_millis(20),
            decode_deadline: Duration::from_millis(60),
            conceal: Duration::from_millis(60),
            rest: Duration::from_secs(2),
        }
    }
}

/// What a restorer has to know of its stream and the leg that the restored packets go to.
#[derive(Debug, Clone)]
pub struct RestorerConfig {
    /// Payload type of Opus there.
    pub opus_pt: u8,
    /// Payload type of RED there.
    pub red_pt: Option<u8>,
    /// Header extension id of the hint on the hop: not passed on.
    pub hint_id: Option<u8>,
    /// Id of the audio level (RFC 6464) there: written into what was decoded.
    pub level_id: Option<u8>,
    /// Rungs that the engine can decode now.
    pub rungs: Rungs,
    /// Waiting times.
    pub timing: RestoreTiming,
}

impl super::Restorer {
    /// Payload types and ids of a new offer and answer, from the next packet on. `config.rungs` doesn't matter:
    /// what the engine can do is said by [`super::Restorer::set_rungs`].
    pub fn renegotiated(&mut self, config: RestorerConfig) {
        let rungs = self.config.rungs;
        self.config = RestorerConfig { rungs, ..config };
    }
}

/// Coded speech to be decoded, and originals to be encoded from it. Hand back [`Restorer::decoded`]
/// or [`Restorer::failed`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DecodeJob {
    /// Comes back with the result.
    pub id: u64,
    /// What it is coded with; where `lost`, the last codec.
    pub codec: CodecId,
    /// The coded speech; empty where `lost`.
    pub payload: Vec<u8>,
    /// Gain to be undone, −32 to 31 dB.
    pub gain: i8,
    /// Duration of each original in milliseconds.
    pub unit_ms: u8,
    /// Originals wanted.
    pub count: u8,
    /// Nothing came: the originals are to be made up.
    pub lost: bool,
}

/// An engine's result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decoded {
    /// An Opus payload for each original.
    pub packets: Vec<Vec<u8>>,
    /// The level of each in −dBov (RFC 6464), 0 to 127.
    pub levels: Vec<u8>,
    /// There is speech in it.
    pub voice: bool,
}

/// What a restored packet is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Restored {
    /// Rung that it came on, from codec and hints; native where it isn't known.
    pub rung: Rung,
    /// It is the original, byte for byte but for the hint.
    pub native: bool,
    /// It comes from a copy.
    pub copied: bool,
    /// It was made up.
    pub concealed: bool,
}

/// A restorer's counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RestorerStats {
    /// Framed packets taken.
    pub framed: u64,
    /// What they took on the wire, IP and UDP headers included.
    pub bytes: u64,
    /// What the originals that went on take there.
    pub restored_bytes: u64,
    /// Not RTP, or a payload that can't be read: dropped.
    pub unreadable: u64,
    /// Of those, with a codec of another version.
    pub unknown_codec: u64,
    /// Of those, with a short header that none which came is the whole one of.
    pub unknown_run: u64,
    /// Copies of another version: ignored.
    pub unknown_copy: u64,
    /// Came twice, or after a copy had taken their place: dropped.
    pub duplicates: u64,
    /// Coded packets that came when their turn was over: dropped.
    pub late: u64,
    /// From far behind: dropped.
    pub old: u64,
    /// Framed packets that never came in time, copies included.
    pub lost: u64,
    /// Lost framed packets that a copy made good.
    pub copied: u64,
    /// Originals restored, concealed ones included.
    pub restored: u64,
    /// Originals passed on as they came.
    pub natives: u64,
    /// Originals made up.
    pub concealed: u64,
    /// Originals that were lost on the hop and not made up.
    pub gaps: u64,
    /// Jobs whose result didn't come in time.
    pub missed: u64,
    /// Jobs that failed.
    pub failed: u64,
    /// Results that came too late, or were never asked for.
    pub late_results: u64,
    /// Dropped because nobody polled them.
    pub dropped: u64,
}
