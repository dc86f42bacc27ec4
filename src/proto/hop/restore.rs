//! From framed packets to the original ones.

mod interval;
mod line;
mod said;
mod types;
mod unrestored;
mod write;

pub use types::{DecodeJob, Decoded, RestoreTiming, Restored, RestorerConfig, RestorerStats};

use crate::aic::Hint;
use crate::aic::payload::{Body, TICKS_PER_MS, Unreadable};
use crate::hop::Report;
use crate::hop::header;
use crate::hop::run::Anchors;
use crate::hop::window::{Arrival, Frame, Window};
use crate::ladder::{CodecId, Frames, Rung, Rungs};
use crate::packet::RtpHeader;
use interval::{Interval, LOOK_EVERY};
use line::{FAILURES, Health, Slot};
use said::Said;
use std::collections::VecDeque;
use std::time::{Duration, Instant};
use unrestored::Unrestored;

/// Time from one framed packet to the next, as the waiting for copies takes it.
const PACE: Duration = Duration::from_millis(40);

/// A stream carries copies as long as one of its last so many packets did: 2 s of speech.
const COPIES_WITHIN: u64 = 50;

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

/// One stream's way off the hop.
#[derive(Debug)]
pub struct Restorer {
    config: RestorerConfig,
    frames: Frames,
    ssrc: Option<u32>,
    window: Window,
    /// Packets that those after them are read by.
    anchors: Anchors,
    /// Rung of Opus, as the last hint of a packet coded with it said.
    opus_rung: Option<Rung>,
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
    unrestored: Unrestored,
    interval: Interval,
    said: Said,
    /// Counters.
    pub stats: RestorerStats,
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
            anchors: Anchors::default(),
            opus_rung: None,
            copies: None,
            last: None,
            gap: false,
            next_id: 0,
            jobs: VecDeque::new(),
            line: VecDeque::new(),
            out: VecDeque::new(),
            neural: Health::default(),
            opus: Health::default(),
            unrestored: Unrestored::default(),
            interval: Interval::default(),
            said: Said::default(),
            stats: RestorerStats::default(),
        }
    }

    /// Numbers up to this one went on before there was a restorer.
    pub fn begin_after(&mut self, sequence: u16) {
        self.said.begin_after(sequence);
    }

    /// The highest number that went on.
    #[must_use]
    pub fn newest(&self) -> Option<u16> {
        self.said.newest()
    }

    /// Whether a packet that isn't framed may go on among the restored ones: none does under a number that another went by.
    pub fn passes(&mut self, packet: &[u8]) -> bool {
        self.said.is_new(packet)
    }

    /// Interarrival jitter of the framed packets by their send times (RFC 3550 section 6.4.1), in 1/65,536 s.
    #[must_use]
    pub fn jitter(&self) -> u32 {
        self.interval.jitter >> 4
    }

    /// Rungs that the engine can decode from now on; the sender is told at once. What waits for others is given up:
    /// the sender has it still.
    pub fn set_rungs(&mut self, now: Instant, rungs: Rungs) {
        if self.config.rungs != rungs {
            self.config.rungs = rungs;
            self.interval.due = Some(now);
            self.give_up_without(rungs);
            self.settle(now);
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
        self.stats.bytes += wire_len as u64;
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
        let position = (header.sequence, header.timestamp);
        let payload = self
            .anchors
            .read(position, header.payload(packet), self.frames);
        let payload = match payload {
            Ok(payload) => payload,
            Err(error) => {
                self.stats.unreadable += 1;
                self.stats.unknown_run += u64::from(error == Unreadable::Run);
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
                    place: target,
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
            place: place.unwrap_or_else(|| self.window.next()),
            copied: false,
            rung: self.rung(payload.part.body.codec(), hint),
        };
        match place {
            Some(place) => self.window.hold(now, place, frame),
            // A native packet is whole by itself, however late; coded speech has been played over.
            None if frame.part.body.codec().is_coded() => self.stats.late += 1,
            None => self.pass(now, &frame),
        }
        self.advance(now);
    }

    /// The rung that a packet was coded at. Hints are seldom: its codec tells it, or, of Opus, the last hint.
    fn rung(&mut self, codec: CodecId, hint: Option<Hint>) -> Option<Rung> {
        match codec {
            CodecId::Lyra3 => Some(Rung::L1),
            CodecId::Lyra6 => Some(Rung::L2),
            CodecId::Opus => {
                let said = hint.and_then(|hint| Rung::new(hint.rung));
                self.opus_rung = said.or(self.opus_rung);
                self.opus_rung
            }
            _ => None,
        }
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
        self.anchors = Anchors::default();
        self.unrestored = Unrestored::default();
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
            place: frame.place,
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
        let news = self.unrestored.is_news();
        if !self.interval.wants(now, rungs, news) {
            return None;
        }
        let unrestored = self.unrestored.tell(self.waits_in_vain(rungs));
        Some(self.interval.report(now, ssrc, highest, rungs, unrestored))
    }
}
