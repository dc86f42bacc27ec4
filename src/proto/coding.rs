//! The AIC hop in one direction of a peer connection: which streams are packed and restored, the jobs
//! that this gives an engine, and the packets that come of it ([`crate::hop`], docs/protocol.md).
//!
//! A stream that was packed once stays framed as long as its leg lives, native if need be: its
//! sequence numbers are the hop's own from then on, and an SRTP index must not be used twice.

mod agreed;
mod recode;
mod stats;

pub use agreed::EngineRungs;
pub use stats::HopStats;

use crate::description::TrackRule;
use crate::flow::find;
use crate::hop::recode::{Passed, RecodeJob, Recoder};
use crate::hop::report::{self, Report};
use crate::hop::{DecodeJob, Decoded, EncodeJob, Encoded, Packer, Refusal, Restorer};
use crate::ladder::{Rung, Rungs};
use crate::packet::RtpHeader;
use crate::relay::Now;
use agreed::{packer_config, restorer_config};
use rustc_hash::FxHashMap;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Streams of one direction that are coded at a time; further ones pass as they are. A participant
/// publishes a few; who makes up more must not take the codecs from everybody else.
pub const MAX_UP: usize = 32;
/// Towards a participant: a large room, over a long call.
pub const MAX_DOWN: usize = 512;

/// A stream that has been silent for so long may give its place to another.
const IDLE: Duration = Duration::from_secs(60);

/// Audio that a stream may have decoded and coded at once, and more than it can say in real time.
const BUDGET: Duration = Duration::from_millis(1_500);

/// Our SSRC in reports. It sends nothing else, so its SRTCP index is its own.
const REPORTER: u32 = u32::from_be_bytes(*b"AIC1");

/// Names a stream to the engine; unique in the process as long as [`Coding::new`]'s base is.
pub type Track = u64;

/// What an engine is asked.
#[derive(Debug, PartialEq, Eq)]
pub enum Job {
    /// Code a group.
    Encode(Track, EncodeJob),
    /// Restore a group.
    Decode(Track, DecodeJob),
    /// Code a packet anew.
    Recode(Track, RecodeJob),
    /// The stream is over.
    Close(Track),
}

/// What an engine answers.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// To [`Job::Encode`], by its id.
    Encoded(Track, u64, Encoded),
    /// To [`Job::Encode`] and [`Job::Recode`], by its id.
    Refused(Track, u64, Refusal),
    /// To [`Job::Recode`], by its id: an Opus packet.
    Recoded(Track, u64, Vec<u8>),
    /// To [`Job::Decode`], by its id.
    Decoded(Track, u64, Decoded),
    /// To [`Job::Decode`], by its id.
    Failed(Track, u64),
    /// To [`Job::Decode`], by its id: the stream's codecs do nothing any more.
    Hangs(Track, u64),
}

impl Outcome {
    /// The stream it is for.
    #[must_use]
    pub fn track(&self) -> Track {
        match self {
            Self::Encoded(track, ..)
            | Self::Refused(track, ..)
            | Self::Recoded(track, ..)
            | Self::Decoded(track, ..)
            | Self::Failed(track, _)
            | Self::Hangs(track, _) => *track,
        }
    }
}

/// What became of a packet that [`Coding::take`] was offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// It goes the ordinary way.
    Not,
    /// It will be packed.
    Original,
    /// It is framed and will be restored.
    Framed,
    /// It comes out again, coded anew or as it is.
    Recoded,
}

/// A packet that [`Coding::poll_packet`] gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Coded {
    /// A framed one; the originals in it took so many bytes on their sender's wire.
    Framed {
        /// IP and UDP headers included.
        native_bytes: u64,
    },
    /// A restored one.
    Restored,
    /// One that was offered, perhaps with another payload.
    Passed(Passed),
}

#[derive(Debug)]
struct Stream {
    ssrc: u32,
    /// `a=mid` of its rule.
    mid: String,
    /// When its last packet came.
    last: Instant,
    /// Audio that the engine may still be asked to decode or code.
    budget: Duration,
    refilled: Instant,
    packer: Option<Packer>,
    /// What the rule wants.
    wanted: Rung,
    /// What signalling says that the receiver decodes.
    negotiated: Rungs,
    /// The models that the receiver decodes with, and those that the sender was told of.
    models: (Option<u32>, Option<u32>),
    restorer: Option<Restorer>,
    recoder: Option<Recoder>,
    /// The peer's last report.
    reported: Option<Report>,
}

/// One direction. After every call that takes a time, drain [`Coding::poll_job`],
/// [`Coding::poll_packet`] and [`Coding::poll_report`].
#[derive(Debug)]
pub struct Coding {
    base: Track,
    rules: Vec<TrackRule>,
    mid_ext_id: Option<u8>,
    /// By number within [`Coding::base`].
    streams: Vec<Stream>,
    by_ssrc: FxHashMap<u32, usize>,
    /// Streams that may have a packet ready.
    touched: VecDeque<usize>,
    most: usize,
    /// Framed packets that nothing is there for.
    strays: u64,
    /// What the engine can do now.
    engine: EngineRungs,
    jobs: VecDeque<Job>,
    reports: Vec<Report>,
    /// Of streams that gave up their place.
    ended: HopStats,
    buffer: Vec<u8>,
}

impl Coding {
    /// Without rules. Tracks are numbered from `base` on, at most `most` of them.
    #[must_use]
    pub fn new(base: Track, most: usize, engine: EngineRungs) -> Self {
        Self {
            base,
            rules: Vec::new(),
            mid_ext_id: None,
            streams: Vec::new(),
            by_ssrc: FxHashMap::default(),
            touched: VecDeque::new(),
            most,
            strays: 0,
            engine,
            jobs: VecDeque::new(),
            reports: Vec::new(),
            ended: HopStats::default(),
            buffer: Vec::new(),
        }
    }

    /// Nothing is coded here.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.rules.is_empty() && self.streams.is_empty()
    }

    /// Takes new rules; streams that are framed already stay so.
    pub fn set_rules(&mut self, now: Instant, rules: &[TrackRule], mid_ext_id: Option<u8>) {
        let coded = |rule: &&TrackRule| {
            rule.pack.is_some() || rule.restore.is_some() || rule.recode.is_some()
        };
        let rules: Vec<TrackRule> = rules.iter().filter(coded).cloned().collect();
        if self.rules == rules && self.mid_ext_id == mid_ext_id {
            return;
        }
        self.rules = rules;
        self.mid_ext_id = mid_ext_id;
        for (index, stream) in self.streams.iter_mut().enumerate() {
            // What waits may go now.
            self.touched.push_back(index);
            let by_ssrc = |rule: &&TrackRule| rule.ssrcs.contains(&stream.ssrc);
            let by_mid = |rule: &&TrackRule| rule.ssrcs.is_empty() && rule.mid == stream.mid;
            let rules = self.rules.iter();
            let Some(rule) = rules.clone().find(by_ssrc).or(rules.clone().find(by_mid)) else {
                stream.wanted = Rung::NATIVE;
                recode::set_rule(&mut stream.recoder, None);
                continue;
            };
            recode::set_rule(&mut stream.recoder, Some(rule));
            stream.wanted = rule.pack.map_or(Rung::NATIVE, |pack| pack.rung);
            if let (Some(restorer), Some(restore)) = (&mut stream.restorer, rule.restore) {
                stream.models.1 = restore.models;
                restorer.renegotiated(restorer_config(rule, restore));
            }
            if let (Some(packer), Some(pack)) = (&mut stream.packer, rule.pack) {
                stream.negotiated = pack.rungs;
                stream.models.0 = pack.models;
                if let Some(opus_pt) = rule.opus_pts.0 {
                    packer.renegotiated(packer_config(rule, pack, opus_pt, 0));
                }
                let reported = stream.reported.map_or(Rungs::ALL, |report| report.rungs);
                packer.set_peer_rungs(reported.and(pack.rungs));
            }
        }
        self.set_engine(now, self.engine);
    }

    /// What the engine can do from now on.
    pub fn set_engine(&mut self, now: Instant, engine: EngineRungs) {
        self.engine = engine;
        for stream in &mut self.streams {
            if let Some(packer) = &mut stream.packer {
                let rungs = engine.with(engine.encodes, stream.models.0);
                packer.set_rung(rungs.at_least(stream.wanted));
                packer.set_frames(engine.frames);
            }
            if let Some(restorer) = &mut stream.restorer {
                restorer.set_frames(engine.frames);
                restorer.set_rungs(now, engine.with(engine.decodes, stream.models.1));
            }
            recode::set_engine(&mut stream.recoder, engine);
        }
    }

    /// Offers a decrypted RTP packet, which took `wire_len` bytes on the wire of its sender. `newest_sent` is the
    /// highest sequence number that has gone on of a stream, by SSRC.
    pub fn take(
        &mut self,
        now: Now,
        packet: &[u8],
        wire_len: usize,
        newest_sent: impl FnOnce(u32) -> Option<u16>,
    ) -> Taken {
        let Some(header) = RtpHeader::parse(packet) else {
            return self.odd(packet);
        };
        let framed = |rule: &TrackRule| rule.restore.is_some_and(|r| r.pt == header.payload_type);
        let Some(index) = self.stream(now.instant, &header, packet) else {
            // Nobody else can make anything of a framed packet.
            if self.rules.iter().any(framed) {
                self.strays += 1;
                return Taken::Framed;
            }
            return Taken::Not;
        };
        let Some(stream) = self.streams.get_mut(index) else {
            return Taken::Not;
        };
        let rule = find(&self.rules, self.mid_ext_id, &header, packet)
            .and_then(|rule| self.rules.get(rule));
        if let Some(rule) = rule
            && let Some(restore) = rule.restore
            && restore.pt == header.payload_type
        {
            let engine = self.engine;
            let restorer = stream.restorer.get_or_insert_with(|| {
                stream.models.1 = restore.models;
                let mut restorer = Restorer::new(restorer_config(rule, restore));
                restorer.set_rungs(now.instant, engine.with(engine.decodes, restore.models));
                restorer
            });
            restorer.set_frames(engine.frames);
            restorer.take(now.instant, now.ntp, packet, wire_len);
            self.settle(now, index);
            return Taken::Framed;
        }
        if stream.packer.is_none()
            && let Some(rule) = rule
            && let Some(pack) = rule.pack
            && let Some(opus_pt) = rule.opus_pts.0
        {
            // Not the original's own: it may have been overtaken by some that went unframed, or are about to.
            let first = recode::newest(stream, newest_sent(header.ssrc))
                .map_or(header.sequence, |newest| newest.wrapping_add(1));
            let mut packer = Packer::new(packer_config(rule, pack, opus_pt, first));
            let rungs = self.engine.with(self.engine.encodes, pack.models);
            packer.set_rung(rungs.at_least(pack.rung));
            packer.set_frames(self.engine.frames);
            stream.wanted = pack.rung;
            stream.models.0 = pack.models;
            stream.negotiated = pack.rungs;
            stream.packer = Some(packer);
        }
        let Some(packer) = &mut stream.packer else {
            let (instant, engine) = (now.instant, self.engine);
            if !recode::take(stream, rule, engine, instant, packet, wire_len) {
                return Taken::Not;
            }
            self.settle(now, index);
            return Taken::Recoded;
        };
        packer.take(now.instant, packet, wire_len);
        self.settle(now, index);
        Taken::Original
    }

    /// The stream of a packet, made where a rule is for it.
    fn stream(&mut self, now: Instant, header: &RtpHeader, packet: &[u8]) -> Option<usize> {
        if let Some(index) = self.by_ssrc.get(&header.ssrc) {
            if let Some(stream) = self.streams.get_mut(*index) {
                stream.last = now;
            }
            return Some(*index);
        }
        let rule = find(&self.rules, self.mid_ext_id, header, packet)?;
        let rule = self.rules.get(rule)?;
        let stream = Stream {
            ssrc: header.ssrc,
            mid: rule.mid.clone(),
            last: now,
            budget: BUDGET,
            refilled: now,
            packer: None,
            wanted: Rung::NATIVE,
            negotiated: Rungs::NONE,
            models: (None, None),
            restorer: None,
            recoder: None,
            reported: None,
        };
        let index = if self.streams.len() < self.most {
            self.streams.push(stream);
            self.streams.len() - 1
        } else {
            // What is packed keeps its place: its sequence numbers must go on.
            let idle = |old: &Stream| {
                old.packer.is_none() && now.saturating_duration_since(old.last) > IDLE
            };
            let index = self.streams.iter().position(idle)?;
            let old = self.streams.get_mut(index)?;
            self.ended += old.stats();
            self.by_ssrc.remove(&old.ssrc);
            *old = stream;
            self.jobs.push_back(Job::Close(self.base + index as Track));
            index
        };
        self.by_ssrc.insert(header.ssrc, index);
        Some(index)
    }

    /// A packet whose header can't be read: none may go unframed in a stream that is framed.
    fn odd(&mut self, packet: &[u8]) -> Taken {
        let ssrc = packet.get(8..12).and_then(|four| four.first_chunk());
        let framed = ssrc
            .and_then(|ssrc| self.by_ssrc.get(&u32::from_be_bytes(*ssrc)))
            .and_then(|index| self.streams.get(*index))
            .is_some_and(|stream| stream.packer.is_some());
        if framed {
            self.strays += 1;
            return Taken::Original;
        }
        Taken::Not
    }

    /// Moves on what a stream has: restored packets that are to be packed again, jobs, reports.
    fn settle(&mut self, now: Now, index: usize) {
        let track = self.base + index as Track;
        let Some(stream) = self.streams.get_mut(index) else {
            return;
        };
        self.touched.push_back(index);
        if let Some(restorer) = &mut stream.restorer {
            let readable = self.engine.with(Rungs::ALL, stream.models.1);
            while let Some(job) = restorer.poll_job() {
                if !readable.iter().any(|rung| rung.codec() == job.codec) {
                    restorer.failed(now.instant, job.id);
                    continue;
                }
                let cost = u64::from(job.unit_ms) * u64::from(job.count);
                if spend(&mut stream.budget, &mut stream.refilled, now.instant, cost) {
                    self.jobs.push_back(Job::Decode(track, job));
                } else {
                    restorer.failed(now.instant, job.id);
                }
            }
            if let Some(packer) = &mut stream.packer {
                while restorer.poll_packet(&mut self.buffer).is_some() {
                    packer.take(now.instant, &self.buffer, self.buffer.len());
                }
            }
            self.reports.extend(restorer.poll_report(now.instant));
        }
        while let Some(job) = stream.recoder.as_mut().and_then(Recoder::poll_job) {
            let cost = u64::from(job.unit_ms);
            if spend(&mut stream.budget, &mut stream.refilled, now.instant, cost) {
                self.jobs.push_back(Job::Recode(track, job));
            } else if let Some(recoder) = &mut stream.recoder {
                recoder.refused(now.instant, job.id, Refusal::Busy);
            }
        }
        if let Some(packer) = &mut stream.packer {
            while let Some(job) = packer.poll_job() {
                let cost = 20 * job.packets.len() as u64;
                if spend(&mut stream.budget, &mut stream.refilled, now.instant, cost) {
                    self.jobs.push_back(Job::Encode(track, job));
                } else {
                    packer.refused(now.instant, job.id, Refusal::Busy);
                }
            }
        }
    }

    /// Takes an engine's answer.
    pub fn outcome(&mut self, now: Now, outcome: Outcome) {
        let Some(index) = outcome.track().checked_sub(self.base) else {
            return;
        };
        let Ok(index) = usize::try_from(index) else {
            return;
        };
        let Some(stream) = self.streams.get_mut(index) else {
            return;
        };
        let outcome = match recode::outcome(stream, now.instant, outcome) {
            Some(outcome) => outcome,
            None => return self.settle(now, index),
        };
        match (outcome, &mut stream.packer, &mut stream.restorer) {
            (Outcome::Encoded(_, id, encoded), Some(packer), _) => {
                packer.encoded(now.instant, id, encoded);
            }
            (Outcome::Refused(_, id, refusal), Some(packer), _) => {
                packer.refused(now.instant, id, refusal);
            }
            (Outcome::Decoded(_, id, decoded), _, Some(restorer)) => {
                restorer.decoded(now.instant, id, decoded);
            }
            (Outcome::Failed(_, id), _, Some(restorer)) => restorer.failed(now.instant, id),
            (Outcome::Hangs(_, id), _, Some(restorer)) => restorer.hangs(now.instant, id),
            _ => {}
        }
        self.settle(now, index);
    }

    /// Takes the hop's reports out of an RTCP packet of the side that framed packets go to. Drain [`Coding::poll_packet`] after it.
    pub fn report(&mut self, now: Now, rtcp: &[u8]) {
        report::read(rtcp, |report| {
            if let Some(index) = self.by_ssrc.get(&report.ssrc)
                && let Some(stream) = self.streams.get_mut(*index)
                && let Some(packer) = &mut stream.packer
            {
                packer.report(now.instant, &report);
                // What was negotiated is the most there can be.
                packer.set_peer_rungs(report.rungs.and(stream.negotiated));
                stream.reported = Some(report);
                self.touched.push_back(*index);
            }
        });
    }

    /// The next job.
    pub fn poll_job(&mut self) -> Option<Job> {
        self.jobs.pop_front()
    }

    /// Writes the next RTP packet that is to go on into `out`.
    pub fn poll_packet(&mut self, now: Now, out: &mut Vec<u8>) -> Option<Coded> {
        while let Some(index) = self.touched.front() {
            let ready = self.streams.get_mut(*index).and_then(|stream| {
                // Before anything is framed: these are older.
                let passed = stream.recoder.as_mut().and_then(|r| r.poll_packet(out));
                if let Some(passed) = passed {
                    return Some(Coded::Passed(passed));
                }
                match (&mut stream.packer, &mut stream.restorer) {
                    (Some(packer), _) => {
                        let sent = packer.poll_packet(now.ntp, out)?;
                        Some(Coded::Framed {
                            native_bytes: sent.native_bytes,
                        })
                    }
                    (None, Some(restorer)) => restorer.poll_packet(out).map(|_| Coded::Restored),
                    (None, None) => None,
                }
            });
            if ready.is_some() {
                return ready;
            }
            self.touched.pop_front();
        }
        None
    }

    /// Writes RTCP for the side that framed packets come from into `out`; `false`: there is none.
    pub fn poll_report(&mut self, out: &mut Vec<u8>) -> bool {
        out.clear();
        report::write(REPORTER, &self.reports, out);
        self.reports.clear();
        !out.is_empty()
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Now) {
        for index in 0..self.streams.len() {
            let Some(stream) = self.streams.get_mut(index) else {
                return;
            };
            if due(stream).is_none_or(|due| due > now.instant) {
                continue;
            }
            if let Some(restorer) = &mut stream.restorer {
                restorer.handle_timeout(now.instant);
            }
            if let Some(packer) = &mut stream.packer {
                packer.handle_timeout(now.instant);
            }
            if let Some(recoder) = &mut stream.recoder {
                recoder.handle_timeout(now.instant);
            }
            self.settle(now, index);
        }
    }

    /// When [`Coding::handle_timeout`] wants to be called.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.streams.iter().filter_map(due).min()
    }

    /// Everything is over: jobs that let the engine forget the streams.
    pub fn close(&mut self) {
        self.jobs.clear();
        let tracks = self.base..self.base + self.streams.len() as Track;
        self.jobs.extend(tracks.map(Job::Close));
        self.streams.clear();
        self.by_ssrc.clear();
        self.rules.clear();
    }

    /// The cheapest rung in use, and how many streams are framed.
    #[must_use]
    pub fn in_use(&self) -> (Option<Rung>, usize) {
        let packers = self.streams.iter().filter_map(|s| s.packer.as_ref());
        let framed = |s: &&Stream| s.packer.is_some() || s.restorer.is_some();
        (
            packers
                .map(Packer::rung)
                .filter(|rung| *rung != Rung::NATIVE)
                .min(),
            self.streams.iter().filter(framed).count(),
        )
    }

    /// Counters.
    #[must_use]
    pub fn stats(&self) -> HopStats {
        let mut sum = self.ended;
        sum.unreadable += self.strays;
        for stream in &self.streams {
            sum += stream.stats();
        }
        sum
    }
}

/// Takes `cost` milliseconds of audio out of a budget that fills again twice as fast as time goes.
fn spend(budget: &mut Duration, refilled: &mut Instant, now: Instant, cost: u64) -> bool {
    let passed = now.saturating_duration_since(*refilled);
    *refilled = now;
    *budget = (*budget + passed * 2).min(BUDGET);
    match budget.checked_sub(Duration::from_millis(cost)) {
        Some(left) => {
            *budget = left;
            true
        }
        None => false,
    }
}

fn due(stream: &Stream) -> Option<Instant> {
    let packer = stream.packer.as_ref().and_then(Packer::poll_timeout);
    let restorer = stream.restorer.as_ref().and_then(Restorer::poll_timeout);
    let recoder = stream.recoder.as_ref().and_then(Recoder::poll_timeout);
    packer.into_iter().chain(restorer).chain(recoder).min()
}
