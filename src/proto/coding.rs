//! The AIC hop in one direction of a peer connection: which streams are packed and restored, the jobs
//! that this gives an engine, and the packets that come of it ([`crate::hop`], docs/protocol.md).
//!
//! A stream that was packed once stays framed as long as its leg lives, native if need be: its
//! sequence numbers are the hop's own from then on, and an SRTP index must not be used twice.

mod agreed;
mod recode;
mod stats;
mod stream;
mod streams;
#[cfg(test)]
mod tests;

pub use agreed::EngineRungs;
pub use stats::HopStats;

use crate::description::TrackRule;
use crate::hop::recode::{Passed, RecodeJob, Recoder};
use crate::hop::report::{self, Report};
use crate::hop::{DecodeJob, Decoded, EncodeJob, Encoded, Packer, Refusal, Restorer};
use crate::ladder::{Rung, Rungs};
use crate::packet::RtpHeader;
use crate::relay::Now;
use crate::rules::Rules;
use agreed::{packer_config, restorer_config};
use std::collections::VecDeque;
use std::time::Instant;
use stream::{Stream, newest_of};
use streams::{Admission, Known, Streams};

/// Streams of one direction that are known at a time; further ones pass as they are. A participant
/// publishes a few.
pub const MAX_UP: usize = 32;
/// Towards a participant: a large room.
pub const MAX_DOWN: usize = 512;

/// Opus payloads up to so many bytes have nothing to be coded: DTX or comfort noise. A framed packet of speech may be shorter.
const SILENCE: usize = 24;

/// Jobs that nobody has polled. Whoever drives this polls after each call; one stream has 16 groups waiting at most.
const MAX_JOBS: usize = 1024;

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
    /// The stream is over, and no other will be called so while the engine remembers it. It used the engine this way.
    Close(Track, Way),
}

/// What a stream uses an engine for; it has a state of its own for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// [`Job::Encode`].
    Encode,
    /// [`Job::Decode`].
    Decode,
    /// [`Job::Recode`].
    Recode,
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

/// One direction. After every call that takes a time, drain [`Coding::poll_job`],
/// [`Coding::poll_packet`] and [`Coding::poll_report`].
#[derive(Debug)]
pub struct Coding {
    base: Track,
    rules: Rules,
    /// Payload types of framed packets that may come, a bit each.
    framed: u128,
    /// What was told to who sends them.
    told: Option<u8>,
    /// Some rule wants to know what receivers report.
    lossy: bool,
    streams: Streams,
    /// Streams that may have a packet ready, each once.
    touched: VecDeque<u16>,
    /// Packets that nothing is there for, or that must not go as they came.
    strays: u64,
    /// What the engine can do now.
    engine: EngineRungs,
    jobs: VecDeque<Job>,
    reports: Vec<Report>,
    /// Of streams that gave up their place.
    ended: HopStats,
    buffer: Vec<u8>,
    /// What is due in this moment.
    firing: Vec<u16>,
}

/// Where a packet belongs.
enum Place {
    Stream(u16),
    /// Nowhere: it goes the ordinary way.
    Pass,
    /// Nowhere, and it must not go on.
    Drop(Taken),
}

impl Coding {
    /// Without rules. Tracks are numbered from `base` on; `most` are known at a time, and a quarter of them may have codecs.
    #[must_use]
    pub fn new(base: Track, most: usize, engine: EngineRungs) -> Self {
        Self {
            base,
            rules: Rules::default(),
            framed: 0,
            told: None,
            lossy: false,
            streams: Streams::new(most),
            touched: VecDeque::new(),
            strays: 0,
            engine,
            jobs: VecDeque::new(),
            reports: Vec::new(),
            ended: HopStats::default(),
            buffer: Vec::new(),
            firing: Vec::new(),
        }
    }

    /// Nothing is coded here, and nothing was.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.rules.is_empty() && self.framed == 0 && self.streams.is_empty()
    }

    /// Who sends framed packets was told to give them this payload type: one that comes without a rule is nobody's.
    pub fn set_told(&mut self, pt: Option<u8>) {
        if self.told != pt {
            self.told = pt;
            self.set_framed();
        }
    }

    fn set_framed(&mut self) {
        let restored = self.rules.list().iter().filter_map(|rule| rule.restore);
        let pts = restored.map(|restore| restore.pt).chain(self.told);
        self.framed = pts.fold(0, |bits, pt| bits | bit(pt));
    }

    /// Takes new rules; streams that are framed already stay so.
    pub fn set_rules(&mut self, now: Instant, rules: &[TrackRule], mid_ext_id: Option<u8>) {
        let coded = |rule: &&TrackRule| {
            rule.pack.is_some() || rule.restore.is_some() || rule.recode.is_some()
        };
        let rules: Vec<TrackRule> = rules.iter().filter(coded).cloned().collect();
        if !self.rules.set(rules, mid_ext_id) {
            return;
        }
        self.set_framed();
        let lossy = |rule: &TrackRule| rule.recode.is_some_and(|recode| recode.lossy_only);
        self.lossy = self.rules.list().iter().any(lossy);
        self.streams.set_tracks(self.rules.list().len());
        for number in self.streams.numbers() {
            if let Some(stream) = self.streams.get_mut(number) {
                let rule = self.rules.again(stream.ssrc, &stream.mid);
                stream.set_rule(rule, rule.and_then(|rule| self.rules.get(rule)));
                if rule.is_none() {
                    self.streams.unseat(number);
                }
            }
        }
        self.set_engine(now, self.engine);
    }

    /// What the engine can do from now on.
    pub fn set_engine(&mut self, now: Instant, engine: EngineRungs) {
        self.engine = engine;
        for number in self.streams.numbers() {
            self.equip(now, number);
        }
    }

    /// Tells a stream what the engine can do for it.
    fn equip(&mut self, now: Instant, number: u16) {
        if let Some(stream) = self.streams.get_mut(number) {
            stream.set_engine(now, self.engine);
            self.follow(number);
        }
    }

    /// A stream may have a packet ready, or be due at another time.
    fn follow(&mut self, number: u16) {
        if let Some(stream) = self.streams.get_mut(number)
            && !std::mem::replace(&mut stream.touched, true)
        {
            self.touched.push_back(number);
        }
        self.streams.retime(number);
    }

    /// Lets a stream have the engine where there is a seat.
    fn admit(&mut self, now: Instant, number: u16) -> bool {
        match self.streams.admit(now, number) {
            Admission::Had => true,
            Admission::Full => false,
            Admission::Given { instead_of } => {
                self.equip(now, number);
                if let Some(other) = instead_of {
                    self.equip(now, other);
                }
                true
            }
        }
    }

    /// Offers a decrypted RTP packet, which took `wire_len` bytes on the wire of its sender. `newest_sent` is the
    /// highest sequence number that has gone on of a stream, by SSRC.
    pub fn take(
        &mut self,
        now: Now,
        packet: &[u8],
        wire_len: usize,
        newest_sent: impl Fn(u32) -> Option<u16>,
    ) -> Taken {
        let Some(header) = RtpHeader::parse(packet) else {
            return self.odd(packet);
        };
        let number = match self.place(now.instant, &header, packet) {
            Place::Stream(number) => number,
            Place::Pass => return Taken::Not,
            Place::Drop(taken) => {
                self.strays += 1;
                return taken;
            }
        };
        let Some(stream) = self.streams.get_mut(number) else {
            return Taken::Not;
        };
        if stream.rule.is_none()
            && let Some(index) = self.rules.find(&header, packet)
        {
            stream.set_rule(Some(index), self.rules.get(index));
        }
        let framed = (self.framed | stream.framed) & bit(header.payload_type) != 0;
        // Who needs no codec takes no seat from who does.
        if !stream.seated
            && let Some(rule) = stream.rule.and_then(|index| self.rules.get(index))
            && stream.asks(rule, &header, packet, framed, self.engine)
        {
            self.admit(now.instant, number);
        }
        let Some(stream) = self.streams.get_mut(number) else {
            return Taken::Not;
        };
        let rule = stream.rule.and_then(|index| self.rules.get(index));
        if framed {
            let Some((rule, restore)) = rule.and_then(|rule| Some((rule, rule.restore?))) else {
                // Its numbers are the hop's: as it is it would be somebody else under the same SSRC.
                self.strays += 1;
                return Taken::Framed;
            };
            stream.framed |= bit(header.payload_type);
            if stream.restorer.is_none() {
                let mut restorer = Restorer::new(restorer_config(rule, restore));
                stream.models.1 = restore.models;
                if stream.packer.is_none()
                    && let Some(newest) = newest_of(newest_sent(header.ssrc), stream.newest())
                {
                    restorer.begin_after(newest);
                }
                restorer.set_frames(self.engine.frames);
                stream.restorer = Some(restorer);
                stream.set_engine(now.instant, self.engine);
            }
            if let Some(restorer) = &mut stream.restorer {
                restorer.set_frames(self.engine.frames);
                restorer.take(now.instant, now.ntp, packet, wire_len);
            }
            self.settle(now, number);
            return Taken::Framed;
        }
        let packs = |rule: &TrackRule| Some((rule.pack?, rule.opus_pts.0?));
        if stream.packer.is_none()
            && let Some(rule) = rule
            && let Some((pack, opus_pt)) = packs(rule)
            && (stream.seated || stream.was_packed)
        {
            // Not the original's own: it may have been overtaken by some that went unframed, or are about to.
            let first = newest_of(newest_sent(header.ssrc), stream.newest())
                .map_or(header.sequence, |newest| newest.wrapping_add(1));
            let packer = Packer::new(packer_config(rule, pack, opus_pt, first));
            stream.wanted = pack.rung;
            stream.models.0 = pack.models;
            stream.negotiated = pack.rungs;
            stream.packer = Some(packer);
            stream.set_engine(now.instant, self.engine);
        }
        let engine = stream.engine(self.engine);
        let Some(packer) = &mut stream.packer else {
            let passes = !stream.was_packed
                && stream
                    .floor
                    .as_mut()
                    .is_none_or(|f| f.admits(header.sequence))
                && stream.restorer.as_mut().is_none_or(|r| r.passes(packet));
            if !passes {
                self.strays += 1;
                return Taken::Original;
            }
            if stream.recoder.is_none() && stream.restorer.is_none() {
                let newest = newest_of(newest_sent(header.ssrc), stream.newest());
                recode::begin(stream, rule, engine, newest);
            }
            if !recode::take(stream, now.instant, packet, wire_len) {
                return Taken::Not;
            }
            self.settle(now, number);
            return Taken::Recoded;
        };
        packer.take(now.instant, packet, wire_len);
        self.settle(now, number);
        Taken::Original
    }

    /// Where a packet belongs; a stream is made where a rule is for it.
    fn place(&mut self, now: Instant, header: &RtpHeader, packet: &[u8]) -> Place {
        let framed = self.framed & bit(header.payload_type) != 0;
        let nowhere = if framed {
            // Nobody else can make anything of it.
            Place::Drop(Taken::Framed)
        } else {
            Place::Pass
        };
        match self.streams.known(header.ssrc) {
            Some(Known::Stream(number)) => {
                let number = *number;
                if let Some(stream) = self.streams.get_mut(number) {
                    (stream.last, stream.ended) = (now, false);
                }
                return Place::Stream(number);
            }
            // It was framed, and must not go on in any other way.
            Some(Known::Gone { packed: true, .. }) => {
                let rule = self.rules.find(header, packet);
                let packs = |rule: &usize| {
                    let rule = self.rules.get(*rule);
                    rule.is_some_and(|rule| rule.pack.is_some() && rule.opus_pts.0.is_some())
                };
                return match rule.filter(packs) {
                    Some(rule) => self.make(now, header, rule, Place::Drop(Taken::Original)),
                    None => Place::Drop(Taken::Original),
                };
            }
            Some(Known::Gone { floor, .. }) => {
                // The numbers of a framed one are the hop's.
                let goes = framed || floor.admits(header.sequence);
                if !goes {
                    return Place::Drop(Taken::Original);
                }
            }
            None => {}
        }
        match self.rules.find(header, packet) {
            Some(rule) => self.make(now, header, rule, nowhere),
            None => nowhere,
        }
    }

    fn make(&mut self, now: Instant, header: &RtpHeader, rule: usize, nowhere: Place) -> Place {
        let Some(mid) = self.rules.get(rule).map(|rule| rule.mid.clone()) else {
            return nowhere;
        };
        if !self.streams.may_know(header.ssrc) {
            return nowhere;
        }
        if self.streams.is_full() {
            let Some(old) = self.streams.idle(now) else {
                return nowhere;
            };
            self.forget(old);
        }
        let number = self.streams.insert(now, header.ssrc, mid);
        if let Some(stream) = self.streams.get_mut(number) {
            stream.set_rule(Some(rule), self.rules.get(rule));
        }
        Place::Stream(number)
    }

    /// A packet whose header can't be read: none may go on in a stream that is coded, or was.
    fn odd(&mut self, packet: &[u8]) -> Taken {
        let ssrc = packet.get(8..12).and_then(|four| four.first_chunk());
        if ssrc.is_some_and(|ssrc| self.streams.known(u32::from_be_bytes(*ssrc)).is_some()) {
            self.strays += 1;
            return Taken::Original;
        }
        Taken::Not
    }

    /// Gives a stream's place up.
    fn forget(&mut self, number: u16) {
        let track = self.track(number);
        if let Some(stream) = self.streams.remove(number) {
            self.ended += stream.stats();
            self.jobs.extend(stream.closes(track));
        }
    }

    fn track(&self, number: u16) -> Track {
        self.base + Track::from(number)
    }

    /// Moves on what a stream has: restored packets that are to be packed again, jobs, reports.
    fn settle(&mut self, now: Now, number: u16) {
        let track = self.track(number);
        let room = self.jobs.len() < MAX_JOBS;
        let Some(stream) = self.streams.get_mut(number) else {
            return;
        };
        while let Some(job) = stream.restorer.as_mut().and_then(Restorer::poll_job) {
            let readable = self.engine.with(Rungs::ALL, stream.models.1);
            let cost = u64::from(job.unit_ms) * u64::from(job.count);
            if room
                && stream.seated
                && readable.iter().any(|rung| rung.codec() == job.codec)
                && stream.spend(now.instant, Way::Decode, cost)
            {
                self.jobs.push_back(Job::Decode(track, job));
            } else if let Some(restorer) = &mut stream.restorer {
                restorer.failed(now.instant, job.id);
            }
        }
        if let Some(restorer) = &mut stream.restorer {
            if let Some(packer) = &mut stream.packer {
                while restorer.poll_packet(&mut self.buffer).is_some() {
                    packer.take(now.instant, &self.buffer, self.buffer.len());
                }
            }
            self.reports.extend(restorer.poll_report(now.instant));
        }
        while let Some(job) = stream.recoder.as_mut().and_then(Recoder::poll_job) {
            let cost = u64::from(job.unit_ms);
            if room && stream.seated && stream.spend(now.instant, Way::Recode, cost) {
                self.jobs.push_back(Job::Recode(track, job));
            } else if let Some(recoder) = &mut stream.recoder {
                recoder.refused(now.instant, job.id, Refusal::Busy);
            }
        }
        while let Some(job) = stream.packer.as_mut().and_then(Packer::poll_job) {
            let cost = u64::from(job.unit_ms) * job.packets.len() as u64;
            if room && stream.seated && stream.spend(now.instant, Way::Encode, cost) {
                self.jobs.push_back(Job::Encode(track, job));
            } else if let Some(packer) = &mut stream.packer {
                packer.refused(now.instant, job.id, Refusal::Busy);
            }
        }
        self.follow(number);
    }

    /// Takes an engine's answer.
    pub fn outcome(&mut self, now: Now, outcome: Outcome) {
        let number = outcome.track().checked_sub(self.base);
        let Some(Ok(number)) = number.map(u16::try_from) else {
            return;
        };
        let Some(stream) = self.streams.get_mut(number) else {
            return;
        };
        let outcome = match recode::outcome(stream, now.instant, outcome) {
            Some(outcome) => outcome,
            None => return self.settle(now, number),
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
        self.settle(now, number);
    }

    /// Takes the hop's reports out of an RTCP packet of the side that framed packets go to. Drain [`Coding::poll_packet`] after it.
    pub fn report(&mut self, now: Now, rtcp: &[u8]) {
        report::read(rtcp, |report| {
            if let Some(number) = self.streams.of(report.ssrc)
                && let Some(stream) = self.streams.get_mut(number)
                && let Some(packer) = &mut stream.packer
            {
                packer.report(now.instant, &report);
                // What was negotiated is the most there can be.
                packer.set_peer_rungs(report.rungs.and(stream.negotiated));
                stream.reported = Some(report);
                self.settle(now, number);
            }
        });
    }

    /// Takes the goodbyes (RTCP BYE) of the side that packets come from: such a stream gives its place up before others.
    pub fn goodbyes(&mut self, rtcp: &[u8]) {
        report::goodbyes(rtcp, |ssrc| {
            if let Some(number) = self.streams.of(ssrc)
                && let Some(stream) = self.streams.get_mut(number)
            {
                stream.ended = true;
            }
        });
    }

    /// The next job.
    pub fn poll_job(&mut self) -> Option<Job> {
        self.jobs.pop_front()
    }

    /// Writes the next RTP packet that is to go on into `out`.
    pub fn poll_packet(&mut self, now: Now, out: &mut Vec<u8>) -> Option<Coded> {
        while let Some(number) = self.touched.front().copied() {
            let ready = self.streams.get_mut(number).and_then(|stream| {
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
                    (None, Some(restorer)) => loop {
                        restorer.poll_packet(out)?;
                        // A framed packet may hold anything, but none of its own kind.
                        let pt = out.get(1).copied().unwrap_or_default();
                        if (self.framed | stream.framed) & bit(pt) == 0 {
                            return Some(Coded::Restored);
                        }
                        self.strays += 1;
                    },
                    (None, None) => None,
                }
            });
            if ready.is_some() {
                return ready;
            }
            self.touched.pop_front();
            if let Some(stream) = self.streams.get_mut(number) {
                stream.touched = false;
            }
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
        let mut firing = std::mem::take(&mut self.firing);
        self.streams.take_due(now.instant, &mut firing);
        for number in firing.drain(..) {
            let Some(stream) = self.streams.get_mut(number) else {
                continue;
            };
            if stream.due().is_none_or(|due| due > now.instant) {
                self.streams.retime(number);
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
            self.settle(now, number);
        }
        self.firing = firing;
    }

    /// When [`Coding::handle_timeout`] wants to be called, at the latest. What it costs doesn't grow with the streams.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.streams.first_due()
    }

    /// Everything is over: jobs that let the engine forget the streams.
    pub fn close(&mut self) {
        self.jobs.clear();
        for number in self.streams.numbers() {
            self.forget(number);
        }
        self.streams.clear();
        self.touched.clear();
        self.rules = Rules::default();
        self.set_told(None);
        self.set_framed();
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
        for stream in self.streams.iter() {
            sum += stream.stats();
        }
        sum
    }
}

/// A payload type in a set of them.
fn bit(pt: u8) -> u128 {
    1 << (pt & 0x7f)
}
