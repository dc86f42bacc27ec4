//! From framed packets to the original ones.

mod interval;
mod types;
mod write;

pub use types::{DecodeJob, Decoded, RestoreTiming, Restored, RestorerConfig, RestorerStats};

use crate::aic::Hint;
use crate::aic::payload::{Body, Payload, TICKS_PER_MS, Unreadable};
use crate::hop::header;
use crate::hop::window::{Arrival, Frame, Window};
use crate::hop::{IP_UDP, Report, TAG};
use crate::ladder::{CodecId, Frames, Rung, Rungs};
use crate::packet::RtpHeader;
use interval::{Interval, LOOK_EVERY};
use rustc_hash::FxBuildHasher;
use std::collections::VecDeque;
use std::hash::BuildHasher;
use std::time::{Duration, Instant};

/// Jobs, frames in line and restored packets that nobody has polled or answered.
const MAX_LINE: usize = 128;

/// Time from one framed packet to the next, as the waiting for copies takes it.
const PACE: Duration = Duration::from_millis(40);

/// A stream carries copies as long as one of its last so many packets did: 2 s of speech.
const COPIES_WITHIN: u64 = 50;

/// Jobs of a codec in a row that failed or came too late before its rungs are taken back.
const FAILURES: u32 = 2;

#[derive(Debug)]
enum Slot {
    Waiting {
        id: u64,
        deadline: Instant,
        codec: CodecId,
        frame: Frame,
        count: u8,
        unit_ms: u8,
        concealed: bool,
    },
    Ready {
        since: Instant,
        packets: Vec<(Vec<u8>, Restored)>,
    },
}

/// Where the last coded payload ended.
#[derive(Debug, Clone, Copy)]
struct Last {
    sequence: u16,
    timestamp: u32,
    codec: CodecId,
    gain: i8,
    unit_ms: u8,
    red: bool,
}

/// How the engine does with the codecs of one kind.
#[derive(Debug, Clone, Copy, Default)]
struct Health {
    failures: u32,
    resting_until: Option<Instant>,
}

/// One stream's way off the hop.
#[derive(Debug)]
pub struct Restorer {
    config: RestorerConfig,
    frames: Frames,
    ssrc: Option<u32>,
    window: Window,
    /// Distance of the copies, and the place of the last packet that had one.
    copies: Option<(u8, u64)>,
    last: Option<Last>,
    /// What would have come next was given up.
    gap: bool,
    next_id: u64,
    jobs: VecDeque<DecodeJob>,
    line: VecDeque<Slot>,
    out: VecDeque<(Vec<u8>, Restored)>,
    neural: Health,
    opus: Health,
    interval: Interval,
    said: Said,
    /// Counters.
    pub stats: RestorerStats,
}

/// Packets that went on lately, by sequence number. The next leg's SRTP must not see a number twice with
/// other bytes (RFC 3711 section 9.1): one that was decoded, or made up, and then comes as it was.
#[derive(Debug)]
struct Said(Vec<Option<(u16, u64)>>);

/// Ten seconds of 20 ms.
const SAID: usize = 512;

impl Default for Said {
    fn default() -> Self {
        Self(vec![None; SAID])
    }
}

impl Said {
    /// Whether a packet may go on; the same bytes may again.
    fn is_new(&mut self, packet: &[u8]) -> bool {
        let Some(sequence) = packet.get(2..4).and_then(|two| two.first_chunk()) else {
            return false;
        };
        let sequence = u16::from_be_bytes(*sequence);
        let bytes = FxBuildHasher.hash_one(packet);
        let Some(slot) = self.0.get_mut(usize::from(sequence) % SAID) else {
            return false;
        };
        match slot {
            Some((known, before)) if *known == sequence => *before == bytes,
            slot => {
                *slot = Some((sequence, bytes));
                true
            }
        }
    }
}

impl Restorer {
    /// A restorer that has seen nothing yet.
    #[must_use]
    pub fn new(config: RestorerConfig) -> Self {
        Self {
            config,
            frames: Frames::LYRA,
            ssrc: None,
            window: Window::default(),
            copies: None,
            last: None,
            gap: false,
            next_id: 0,
            jobs: VecDeque::new(),
            line: VecDeque::new(),
            out: VecDeque::new(),
            neural: Health::default(),
            opus: Health::default(),
            interval: Interval::default(),
            said: Said::default(),
            stats: RestorerStats::default(),
        }
    }

    /// Rungs that the engine can decode from now on; the sender is told at once.
    pub fn set_rungs(&mut self, now: Instant, rungs: Rungs) {
        if self.config.rungs != rungs {
            self.config.rungs = rungs;
            self.interval.due = Some(now);
        }
    }

    /// Frames of the bundle behind L1 and L2, from the next packet on.
    pub fn set_frames(&mut self, frames: Frames) {
        self.frames = frames;
    }

    /// Rungs that are decoded in time.
    #[must_use]
    pub fn rungs(&self) -> Rungs {
        let works = |rung: &Rung| {
            let health = if rung.is_neural() {
                self.neural
            } else {
                self.opus
            };
            health.resting_until.is_none()
        };
        let rungs = self.config.rungs.iter().filter(works);
        rungs.fold(Rungs::NONE, Rungs::with)
    }

    /// Takes a decrypted framed RTP packet, which took `wire_len` bytes on the wire. `ntp` is the
    /// middle of the NTP time now.
    pub fn take(&mut self, now: Instant, ntp: u32, packet: &[u8], wire_len: usize) {
        self.stats.framed += 1;
        let Some(header) = RtpHeader::parse(packet) else {
            self.stats.unreadable += 1;
            return;
        };
        self.ssrc = Some(header.ssrc);
        let arrival = self.window.arrive(header.sequence);
        let place = match arrival {
            Arrival::Duplicate | Arrival::Filled => {
                self.stats.duplicates += 1;
                if arrival == Arrival::Filled {
                    self.interval.lost = self.interval.lost.saturating_sub(1);
                }
                return;
            }
            Arrival::Old => {
                self.stats.old += 1;
                return;
            }
            Arrival::Late => {
                self.interval.lost = self.interval.lost.saturating_sub(1);
                None
            }
            Arrival::New(place) => Some(place),
            Arrival::Jump(place) => {
                self.flush(now, place);
                Some(place)
            }
        };
        self.interval.hop_bytes += wire_len as u64;
        self.interval.due.get_or_insert(now + LOOK_EVERY);
        let hint = self
            .config
            .hint_id
            .and_then(|id| header.extension(packet, id))
            .and_then(Hint::parse);
        if let Some(hint) = hint {
            self.interval.arrived(ntp, hint.sent);
        }
        let payload = match Payload::parse(header.payload(packet), self.frames) {
            Ok(payload) => payload,
            Err(error) => {
                self.stats.unreadable += 1;
                if matches!(error, Unreadable::Codec(_)) {
                    self.stats.unknown_codec += 1;
                }
                self.advance(now);
                return;
            }
        };
        self.stats.unknown_copy += u64::from(payload.skipped);
        if let (Some(place), Some(copy)) = (place, &payload.redundant) {
            self.copies = Some((copy.hop_distance, place));
            let target = place - u64::from(copy.hop_distance);
            if self.window.wants_copy(target) {
                let (kept, header) = header::without_extension(packet, &header);
                let frame = Frame {
                    packet: kept,
                    header,
                    timestamp: header.timestamp.wrapping_sub(copy.ticks_back),
                    part: copy.part.to_owned(),
                    copied: true,
                    rung: None,
                };
                self.window.hold(now, target, frame);
            }
        }
        let frame = Frame {
            packet: packet.get(..header.header_len).unwrap_or_default().to_vec(),
            header,
            timestamp: header.timestamp,
            part: payload.part.to_owned(),
            copied: false,
            rung: hint.and_then(|hint| Rung::new(hint.rung)),
        };
        match place {
            Some(place) => self.window.hold(now, place, frame),
            // A native packet is whole by itself, however late; coded speech has been played over.
            None if frame.part.body.codec().is_coded() => self.stats.late += 1,
            None => self.pass(now, &frame),
        }
        self.advance(now);
    }

    /// Delivers what is held, because the stream goes on at `place`.
    fn flush(&mut self, now: Instant, place: u64) {
        loop {
            while let Some(frame) = self.window.take_next() {
                self.deliver(now, frame);
            }
            if self.window.gap_since().is_none() {
                break;
            }
            self.give_up();
        }
        self.window.skip_to(place);
        self.last = None;
        self.gap = false;
        self.copies = None;
    }

    fn give_up(&mut self) {
        self.window.skip();
        self.gap = true;
        self.stats.lost += 1;
        self.interval.turns += 1;
        self.interval.lost += 1;
        self.interval.missing += 1;
    }

    /// Delivers what is in order, and gives up what was waited for long enough.
    fn advance(&mut self, now: Instant) {
        loop {
            if let Some(frame) = self.window.take_next() {
                self.deliver(now, frame);
            } else if self.gap_deadline().is_some_and(|deadline| deadline <= now) {
                self.give_up();
            } else {
                break;
            }
        }
        self.settle(now);
    }

    /// Until when the next place is waited for, where others have overtaken it.
    fn gap_deadline(&self) -> Option<Instant> {
        let since = self.window.gap_since()?;
        let hold = since + self.config.timing.hold;
        let highest = self.window.highest()?;
        let Some((distance, seen)) = self.copies else {
            return Some(hold);
        };
        let carrier = self.window.next() + u64::from(distance);
        if highest - seen >= COPIES_WITHIN || self.window.has_come(carrier) {
            return Some(hold);
        }
        // The gap shows with the first packet after it; the carrier comes so many packets later.
        Some(hold + PACE * u32::from(distance.saturating_sub(1)))
    }

    fn deliver(&mut self, now: Instant, frame: Frame) {
        self.stats.copied += u64::from(frame.copied);
        self.interval.turns += 1;
        self.interval.lost += u64::from(frame.copied);
        if std::mem::take(&mut self.gap) {
            self.conceal(now, &frame);
        }
        let Body::Coded {
            codec,
            unit_ms,
            gain,
            payload,
        } = &frame.part.body
        else {
            self.last = None;
            self.pass(now, &frame);
            return;
        };
        let (codec, unit_ms, gain, count) = (*codec, *unit_ms, *gain, frame.part.packets);
        let ticks = u32::from(unit_ms) * u32::from(count) * TICKS_PER_MS;
        self.last = Some(Last {
            sequence: frame.part.sequence.wrapping_add(u16::from(count)),
            timestamp: frame.timestamp.wrapping_add(ticks),
            codec,
            gain,
            unit_ms,
            red: frame.part.red,
        });
        let job = DecodeJob {
            id: self.next_id,
            codec,
            payload: payload.clone(),
            gain,
            unit_ms,
            count,
            lost: false,
        };
        self.ask(now, job, frame, false);
    }

    /// Asks for what was lost between the last coded payload and `frame`, as far as it may be made up.
    fn conceal(&mut self, now: Instant, frame: &Frame) {
        let Some(last) = self.last else { return };
        let missing = frame.part.sequence.wrapping_sub(last.sequence);
        if missing == 0 || missing.cast_signed() < 0 {
            return;
        }
        let ticks = u32::from(last.unit_ms) * TICKS_PER_MS;
        let apart = frame.timestamp.wrapping_sub(last.timestamp);
        let unit = Duration::from_millis(u64::from(last.unit_ms));
        let most = self.config.timing.conceal.as_millis() / unit.as_millis().max(1);
        let most = u16::try_from(most.min(4)).unwrap_or(0);
        // A jump of the timestamps that isn't that of the missing originals is a pause.
        let count = if apart == ticks.wrapping_mul(u32::from(missing)) {
            missing.min(most)
        } else {
            0
        };
        self.stats.gaps += u64::from(missing - count);
        let count = u8::try_from(count).unwrap_or(0);
        if count == 0 {
            return;
        }
        let (packet, header) = header::without_extension(&frame.packet, &frame.header);
        let mut made_up = Frame {
            packet,
            header,
            timestamp: last.timestamp,
            part: frame.part.clone(),
            copied: true,
            rung: None,
        };
        made_up.part.sequence = last.sequence;
        made_up.part.packets = count;
        made_up.part.red = last.red;
        let job = DecodeJob {
            id: self.next_id,
            codec: last.codec,
            payload: Vec::new(),
            gain: last.gain,
            unit_ms: last.unit_ms,
            count,
            lost: true,
        };
        self.ask(now, job, made_up, true);
    }

    fn ask(&mut self, now: Instant, job: DecodeJob, frame: Frame, concealed: bool) {
        self.next_id += 1;
        if self.line.len() >= MAX_LINE || self.jobs.len() >= MAX_LINE {
            self.stats.dropped += 1;
            return;
        }
        self.line.push_back(Slot::Waiting {
            id: job.id,
            deadline: now + self.config.timing.decode_deadline,
            codec: job.codec,
            count: job.count,
            unit_ms: job.unit_ms,
            frame,
            concealed,
        });
        self.jobs.push_back(job);
    }

    /// Puts a native packet in line.
    fn pass(&mut self, now: Instant, frame: &Frame) {
        let Some(packet) = write::native(&self.config, frame) else {
            return;
        };
        self.stats.natives += 1;
        let restored = Restored {
            rung: Rung::NATIVE,
            native: true,
            copied: frame.copied,
            concealed: false,
        };
        if self.line.len() >= MAX_LINE {
            self.stats.dropped += 1;
            return;
        }
        self.line.push_back(Slot::Ready {
            since: now,
            packets: vec![(packet, restored)],
        });
    }

    /// The next job for the engine.
    pub fn poll_job(&mut self) -> Option<DecodeJob> {
        self.jobs.pop_front()
    }

    /// The engine did job `id`.
    pub fn decoded(&mut self, now: Instant, id: u64, decoded: Decoded) {
        let Some(at) = self.position(id) else {
            self.stats.late_results += 1;
            return;
        };
        let Some(Slot::Waiting {
            codec,
            frame,
            count,
            unit_ms,
            concealed,
            ..
        }) = self.line.get(at)
        else {
            return;
        };
        if decoded.packets.len() != usize::from(*count) || decoded.packets.iter().any(Vec::is_empty)
        {
            self.failed(now, id);
            return;
        }
        let codec = *codec;
        let restored = Restored {
            rung: frame.rung.unwrap_or(Rung::NATIVE),
            native: false,
            copied: frame.copied && !concealed,
            concealed: *concealed,
        };
        let packets: Vec<_> = write::decoded(&self.config, frame, *unit_ms, &decoded)
            .into_iter()
            .map(|packet| (packet, restored))
            .collect();
        self.stats.restored += packets.len() as u64;
        if restored.concealed {
            self.stats.concealed += packets.len() as u64;
        }
        if let Some(slot) = self.line.get_mut(at) {
            *slot = Slot::Ready {
                since: now,
                packets,
            };
        }
        *self.health(codec) = Health::default();
        self.settle(now);
    }

    /// The engine couldn't do job `id`, or its queue was full.
    pub fn failed(&mut self, now: Instant, id: u64) {
        match self.position(id) {
            Some(at) => {
                self.stats.failed += 1;
                self.drop_job(now, at);
                self.settle(now);
            }
            None => self.stats.late_results += 1,
        }
    }

    fn position(&self, id: u64) -> Option<usize> {
        let is_it =
            |slot: &Slot| matches!(slot, Slot::Waiting { id: waiting, .. } if *waiting == id);
        self.line.iter().position(is_it)
    }

    fn health(&mut self, codec: CodecId) -> &mut Health {
        match codec {
            CodecId::Lyra3 | CodecId::Lyra6 => &mut self.neural,
            _ => &mut self.opus,
        }
    }

    fn drop_job(&mut self, now: Instant, at: usize) {
        let Some(Slot::Waiting { id, codec, .. }) = self.line.remove(at) else {
            return;
        };
        self.jobs.retain(|job| job.id != id);
        let rest = self.config.timing.rest;
        let health = self.health(codec);
        health.failures = health.failures.saturating_add(1);
        if health.failures >= FAILURES && health.resting_until.is_none() {
            health.resting_until = Some(now + rest);
            self.interval.due = Some(now);
        }
    }

    /// Moves what is ready and has waited enough for what should go before it.
    fn settle(&mut self, now: Instant) {
        let wait = self.config.timing.ready_wait;
        let mut at = 0;
        while let Some(slot) = self.line.get(at) {
            match slot {
                Slot::Ready { since, .. } if at == 0 || *since + wait <= now => {
                    let Some(Slot::Ready { packets, .. }) = self.line.remove(at) else {
                        return;
                    };
                    for packet in packets {
                        if !self.said.is_new(&packet.0) {
                            self.stats.duplicates += 1;
                            continue;
                        }
                        self.interval.restored_bytes += (packet.0.len() + IP_UDP + TAG) as u64;
                        if self.out.len() >= MAX_LINE {
                            self.out.pop_front();
                            self.stats.dropped += 1;
                        }
                        self.out.push_back(packet);
                    }
                }
                _ => at += 1,
            }
        }
    }

    /// Writes the next restored RTP packet into `out`.
    pub fn poll_packet(&mut self, out: &mut Vec<u8>) -> Option<Restored> {
        let (packet, restored) = self.out.pop_front()?;
        out.clear();
        out.extend(packet);
        Some(restored)
    }

    /// When [`Restorer::handle_timeout`] is to be called, and [`Restorer::poll_report`] after it.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        let wait = self.config.timing.ready_wait;
        let line = self.line.iter().map(|slot| match slot {
            Slot::Waiting { deadline, .. } => *deadline,
            Slot::Ready { since, .. } => *since + wait,
        });
        let rests = [self.neural.resting_until, self.opus.resting_until];
        let due = self.interval.due.filter(|_| self.ssrc.is_some());
        line.chain(self.gap_deadline())
            .chain(rests.into_iter().flatten())
            .chain(due)
            .min()
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Instant) {
        loop {
            let due =
                |slot: &Slot| matches!(slot, Slot::Waiting { deadline, .. } if *deadline <= now);
            let Some(at) = self.line.iter().position(due) else {
                break;
            };
            self.stats.missed += 1;
            self.drop_job(now, at);
        }
        for health in [&mut self.neural, &mut self.opus] {
            if health.resting_until.is_some_and(|until| until <= now) {
                // One more failure is enough to take the rungs back again.
                *health = Health {
                    failures: FAILURES - 1,
                    resting_until: None,
                };
                self.interval.due = Some(now);
            }
        }
        self.advance(now);
    }

    /// The report for the sender, where one is due.
    pub fn poll_report(&mut self, now: Instant) -> Option<Report> {
        let ssrc = self.ssrc?;
        let highest = self.window.highest()?;
        self.interval.due.filter(|due| *due <= now)?;
        let rungs = self.rungs();
        let wants = self.interval.wants(now, rungs);
        wants.then(|| self.interval.report(ssrc, highest, rungs))
    }
}
