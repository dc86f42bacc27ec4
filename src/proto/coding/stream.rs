//! One stream: what it is made into and from, and its share of the engine.

use super::agreed::{EngineRungs, packer_config, restorer_config};
use super::recode;
use super::{SILENCE, Track, Way, bit};
use crate::aic::payload::{Body, Payload};
use crate::coding::Job;
use crate::description::TrackRule;
use crate::hop::recode::Recoder;
use crate::hop::report::Report;
use crate::hop::{Packer, Restorer};
use crate::ladder::{Rung, Rungs};
use crate::packet::RtpHeader;
use crate::past::Floor;
use std::time::{Duration, Instant};

/// Audio that a stream may have decoded and coded at once: what a link holds back that stands still for a while.
const BUDGET: Duration = Duration::from_millis(1_500);

/// So many milliseconds of audio for each that pass: nobody says more in a second than a second, and a clock may be fast.
const PER_MS: (u32, u32) = (5, 4);

#[derive(Debug)]
pub(super) struct Stream {
    pub(super) ssrc: u32,
    /// `a=mid` of its rule.
    pub(super) mid: String,
    /// Which of the rules is its.
    pub(super) rule: Option<usize>,
    /// When its last packet came.
    pub(super) last: Instant,
    /// Its sender said goodbye after that.
    pub(super) ended: bool,
    /// It may use the engine.
    pub(super) seated: bool,
    /// When it did last.
    pub(super) worked: Instant,
    /// Audio that the engine may still be asked to decode or code.
    budget: Duration,
    refilled: Instant,
    /// What it has used the engine for.
    used: [bool; 3],
    /// Payload types that its framed packets had, a bit each.
    pub(super) framed: u128,
    /// It had its place before, and these numbers of it are used up.
    pub(super) floor: Option<Floor>,
    /// It was framed then.
    pub(super) was_packed: bool,
    pub(super) packer: Option<Packer>,
    /// What the rule wants.
    pub(super) wanted: Rung,
    /// What signalling says that the receiver decodes.
    pub(super) negotiated: Rungs,
    /// The models that the receiver decodes with, and those that the sender was told of.
    pub(super) models: (Option<u32>, Option<u32>),
    pub(super) restorer: Option<Restorer>,
    pub(super) recoder: Option<Recoder>,
    /// The peer's last report.
    pub(super) reported: Option<Report>,
    /// It waits in [`super::Coding`]'s line of those that may have a packet.
    pub(super) touched: bool,
    /// When it is looked after next.
    pub(super) wake: Option<Instant>,
}

impl Stream {
    pub(super) fn new(now: Instant, ssrc: u32, mid: String) -> Self {
        Self {
            ssrc,
            mid,
            rule: None,
            last: now,
            ended: false,
            seated: false,
            worked: now,
            budget: BUDGET,
            refilled: now,
            used: [false; 3],
            framed: 0,
            floor: None,
            was_packed: false,
            packer: None,
            wanted: Rung::NATIVE,
            negotiated: Rungs::NONE,
            models: (None, None),
            restorer: None,
            recoder: None,
            reported: None,
            touched: false,
            wake: None,
        }
    }

    /// Its rule from now on.
    pub(super) fn set_rule(&mut self, index: Option<usize>, rule: Option<&TrackRule>) {
        self.rule = index;
        recode::set_rule(&mut self.recoder, rule);
        let Some(rule) = rule else {
            self.wanted = Rung::NATIVE;
            return;
        };
        self.mid.clone_from(&rule.mid);
        self.wanted = rule.pack.map_or(Rung::NATIVE, |pack| pack.rung);
        // A number that a codec has now was given up by framed packets.
        for pt in [rule.opus_pts.0, rule.opus_pts.1].into_iter().flatten() {
            self.framed &= !bit(pt);
        }
        if let (Some(restorer), Some(restore)) = (&mut self.restorer, rule.restore) {
            self.models.1 = restore.models;
            restorer.renegotiated(restorer_config(rule, restore));
        }
        if let (Some(packer), Some(pack)) = (&mut self.packer, rule.pack) {
            self.negotiated = pack.rungs;
            self.models.0 = pack.models;
            if let Some(opus_pt) = rule.opus_pts.0 {
                packer.renegotiated(packer_config(rule, pack, opus_pt, 0));
            }
            let reported = self.reported.map_or(Rungs::ALL, |report| report.rungs);
            packer.set_peer_rungs(reported.and(pack.rungs));
        }
    }

    /// What of an engine there is for it.
    pub(super) fn engine(&self, engine: EngineRungs) -> EngineRungs {
        if self.seated {
            return engine;
        }
        EngineRungs {
            encodes: Rungs::NONE,
            decodes: Rungs::NONE,
            ..engine
        }
    }

    /// Whether a packet of it gives the engine something to do.
    pub(super) fn asks(
        &self,
        rule: &TrackRule,
        header: &RtpHeader,
        packet: &[u8],
        framed: bool,
        engine: EngineRungs,
    ) -> bool {
        let payload = header.payload(packet);
        if !framed {
            // Beside framed packets nothing is coded anew.
            let recodes = rule.recode.is_some()
                && rule.restore.is_none()
                && self.restorer.is_none()
                && self.packer.is_none();
            let (opus, red) = rule.opus_pts;
            let is_opus = opus.is_some() && [opus, red].contains(&Some(header.payload_type));
            return (rule.pack.is_some() || recodes) && is_opus && payload.len() > SILENCE;
        }
        let (Some(restore), Ok(payload)) = (rule.restore, Payload::parse(payload, engine.frames))
        else {
            return false;
        };
        let readable = engine.with(Rungs::ALL, restore.models);
        let packs = rule.pack.is_some() && self.packer.is_some();
        let copy = payload.redundant.as_ref().map(|copy| &copy.part);
        // How long it is says nothing: 40 ms of the cheapest rung have as many bytes as comfort noise.
        copy.into_iter()
            .chain([&payload.part])
            .any(|part| match part.body {
                Body::Coded { codec, .. } => readable.iter().any(|rung| rung.codec() == codec),
                Body::Native { payload, .. } => packs && payload.len() > SILENCE,
            })
    }

    /// What the engine can do from now on.
    pub(super) fn set_engine(&mut self, now: Instant, engine: EngineRungs) {
        let engine = self.engine(engine);
        if let Some(packer) = &mut self.packer {
            let rungs = engine.with(engine.encodes, self.models.0);
            packer.set_rung(rungs.at_least(self.wanted));
            packer.set_frames(engine.frames);
        }
        if let Some(restorer) = &mut self.restorer {
            restorer.set_frames(engine.frames);
            restorer.set_rungs(now, engine.with(engine.decodes, self.models.1));
        }
        recode::set_engine(&mut self.recoder, engine);
    }

    /// Takes `cost` milliseconds of audio out of its budget; `false`: there isn't so much.
    pub(super) fn spend(&mut self, now: Instant, way: Way, cost: u64) -> bool {
        // What is decoded and coded again passes twice.
        let twice = self.restorer.is_some() && self.packer.is_some();
        let (gain, of) = PER_MS;
        let gain = if twice { 2 * gain } else { gain };
        let passed = now.saturating_duration_since(self.refilled).min(BUDGET);
        self.refilled = now;
        self.budget = (self.budget + passed * gain / of).min(BUDGET);
        let Some(left) = self.budget.checked_sub(Duration::from_millis(cost)) else {
            return false;
        };
        self.budget = left;
        self.worked = now;
        if let Some(used) = self.used.get_mut(way as usize) {
            *used = true;
        }
        true
    }

    /// Jobs by which the engine forgets it.
    pub(super) fn closes(&self, track: Track) -> impl Iterator<Item = Job> {
        let used = self.used;
        [Way::Encode, Way::Decode, Way::Recode]
            .into_iter()
            .filter(move |way| used.get(*way as usize).is_some_and(|used| *used))
            .map(move |way| Job::Close(track, way))
    }

    /// The highest number of it that may have gone on with a payload that is not the one it came with.
    pub(super) fn newest(&self) -> Option<u16> {
        let floor = self.floor.map(|floor| floor.0);
        let recoded = self.recoder.as_ref().and_then(Recoder::newest);
        let restored = self.restorer.as_ref().and_then(Restorer::newest);
        newest_of(newest_of(floor, recoded), restored)
    }

    /// What has to be remembered of it when it goes; nothing of one that went as it came.
    pub(super) fn leaves(&self) -> Option<(Floor, bool)> {
        if let Some(packer) = &self.packer {
            return Some((Floor(packer.next_sequence().wrapping_sub(1)), true));
        }
        let touched = self.floor.is_some()
            || self.restorer.is_some()
            || self.recoder.as_ref().is_some_and(Recoder::was_active);
        let newest = self.newest().filter(|_| touched)?;
        Some((Floor(newest), self.was_packed))
    }

    pub(super) fn due(&self) -> Option<Instant> {
        let packer = self.packer.as_ref().and_then(Packer::poll_timeout);
        let restorer = self.restorer.as_ref().and_then(Restorer::poll_timeout);
        let recoder = self.recoder.as_ref().and_then(Recoder::poll_timeout);
        packer.into_iter().chain(restorer).chain(recoder).min()
    }
}

/// The newer of two sequence numbers.
pub(super) fn newest_of(one: Option<u16>, other: Option<u16>) -> Option<u16> {
    match (one, other) {
        (Some(one), Some(other)) if other.wrapping_sub(one).cast_signed() > 0 => Some(other),
        (Some(one), _) => Some(one),
        (None, other) => other,
    }
}
