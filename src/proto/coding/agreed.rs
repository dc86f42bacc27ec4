//! What was agreed on with a peer, against what the engine can do now.

use crate::description::{PackRule, RestoreRule, TrackRule};
use crate::hop::{PackTiming, PackerConfig, Redundancy, RestoreTiming, RestorerConfig};
use crate::ladder::{Frames, Rungs};

/// What an engine can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineRungs {
    /// What it codes now.
    pub encodes: Rungs,
    /// What it decodes.
    pub decodes: Rungs,
    /// Frames of the bundle behind L1 and L2.
    pub frames: Frames,
    /// The models of its neural rungs ([`crate::sdp::AicLine::models`]).
    pub models: Option<u32>,
}

impl EngineRungs {
    /// There is none.
    pub const NONE: Self = Self {
        encodes: Rungs::NONE,
        decodes: Rungs::NONE,
        frames: Frames::LYRA,
        models: None,
    };

    /// Those of `rungs` that mean the same to a peer which speaks of these models: ours may have been replaced
    /// since the peer was told of them, and others than were coded with decode to noise.
    pub(super) fn with(self, rungs: Rungs, models: Option<u32>) -> Rungs {
        if models.is_some() && models == self.models {
            rungs
        } else {
            rungs.and(Rungs::OPUS)
        }
    }
}

/// How a stream is packed by these rules.
pub(super) fn packer_config(
    rule: &TrackRule,
    pack: PackRule,
    opus_pt: u8,
    first_sequence: u16,
) -> PackerConfig {
    PackerConfig {
        opus_pt,
        red_pt: rule.opus_pts.1,
        aic_pt: pack.pt,
        hint_id: Some(pack.hint_id),
        level_id: pack.level_id,
        first_sequence,
        peer_rungs: pack.rungs,
        short_headers: pack.short_headers,
        more_units: pack.more_units,
        redundancy: Redundancy::default(),
        timing: PackTiming::default(),
    }
}

/// How it is restored; its rungs are to be set.
pub(super) fn restorer_config(rule: &TrackRule, restore: RestoreRule) -> RestorerConfig {
    RestorerConfig {
        opus_pt: rule.opus_pts.0.unwrap_or(restore.pt),
        red_pt: rule.opus_pts.1,
        hint_id: Some(restore.hint_id),
        level_id: restore.level_id,
        rungs: Rungs::NONE,
        timing: RestoreTiming::default(),
    }
}
