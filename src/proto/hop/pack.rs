//! From original packets to framed ones.

mod frame;
mod resend;
mod types;

pub use types::{
    EncodeJob, Encoded, NativeReason, PackTiming, PackerConfig, PackerStats, Refusal, Sent,
};

use crate::aic::payload::TICKS_PER_MS;
use crate::aic::{HintPace, RatioPredictor};
use crate::hop::Report;
use crate::hop::header::{self, Elementwise, Fields};
use crate::hop::original::{self, DTX_BYTES, Original, RedBlock};
use crate::hop::redundancy::{Copies, Redundancy};
use crate::hop::run::Run;
use crate::ladder::{Frames, Rung, Rungs};
use frame::{NO_COPY, part};
use resend::Kept;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Groups that wait for the engine at the same time. 16 of 40 ms is more than half a second that
/// came in one burst; what comes above goes native.
const MAX_WAITING: usize = 16;

/// Packets in line, and packets out of order, that nobody has polled.
const MAX_LINE: usize = 64;

/// Groups in a row that the engine missed or refused before the stream leaves it alone.
const FAILURES: u32 = 3;

/// The rest after refusals that last doubles so often: up to 4.8 s.
const MAX_DOUBLINGS: u32 = 4;

/// Recovered packets of which a late original is recognised.
const RECOVERED: usize = 16;

/// The first bytes of the silence that LiveKit injects; zero bytes follow.
const SILENCE: [u8; 3] = [0xf8, 0xff, 0xfe];

#[derive(Debug)]
struct Open {
    originals: Vec<Original>,
    unit_ms: u8,
    lost_before: u16,
    closes_at: Instant,
}

#[derive(Debug)]
enum Slot {
    Waiting {
        id: u64,
        deadline: Instant,
        unit_ms: u8,
        originals: Vec<Original>,
    },
    Native(Original),
    Coded {
        since: Instant,
        originals: Vec<Original>,
        encoded: Encoded,
    },
}

/// One stream's way onto the hop.
#[derive(Debug)]
pub struct Packer {
    config: PackerConfig,
    wanted: Rung,
    peer_rungs: Rungs,
    frames: Frames,
    next_sequence: u16,
    next_id: u64,
    /// Sequence number and timestamp of the newest original.
    newest: Option<(u16, u32)>,
    recovered: VecDeque<u16>,
    lost: u16,
    open: Option<Open>,
    line: VecDeque<Slot>,
    /// Out of order already: they wait for nobody.
    aside: VecDeque<Original>,
    jobs: VecDeque<EncodeJob>,
    failures: u32,
    resting_until: Option<Instant>,
    copies: Copies,
    /// Groups that went coded a moment ago.
    kept: VecDeque<Kept>,
    run: Run,
    pace: HintPace,
    predictor: RatioPredictor,
    /// Counters.
    pub stats: PackerStats,
}

impl Packer {
    /// A packer that sends everything native until [`Packer::set_rung`].
    #[must_use]
    pub fn new(config: PackerConfig) -> Self {
        Self {
            wanted: Rung::NATIVE,
            peer_rungs: config.peer_rungs,
            frames: Frames::LYRA,
            next_sequence: config.first_sequence,
            next_id: 0,
            newest: None,
            recovered: VecDeque::with_capacity(RECOVERED),
            lost: 0,
            open: None,
            line: VecDeque::new(),
            aside: VecDeque::new(),
            jobs: VecDeque::new(),
            failures: 0,
            resting_until: None,
            copies: Copies::new(config.redundancy),
            kept: VecDeque::new(),
            run: Run::default(),
            pace: HintPace::default(),
            predictor: RatioPredictor::default(),
            stats: PackerStats::default(),
            config,
        }
    }

    /// The rung wanted from the next group on.
    pub fn set_rung(&mut self, rung: Rung) {
        self.wanted = rung;
    }

    /// Frames of the bundle behind L1 and L2, from the next result on.
    pub fn set_frames(&mut self, frames: Frames) {
        self.frames = frames;
    }

    /// The rung in use: the wanted one, or the next better one that the receiver can decode.
    #[must_use]
    pub fn rung(&self) -> Rung {
        self.peer_rungs.at_least(self.wanted)
    }

    /// Rungs that the receiver can decode, as it last said.
    #[must_use]
    pub fn peer_rungs(&self) -> Rungs {
        self.peer_rungs
    }

    /// Rungs that the receiver can decode, from a new `a=aic`.
    pub fn set_peer_rungs(&mut self, rungs: Rungs) {
        self.peer_rungs = rungs;
    }

    /// When copies go along from now on.
    pub fn set_redundancy(&mut self, redundancy: Redundancy) {
        self.copies.set_mode(redundancy);
    }

    /// Distance of the copies that go along now.
    #[must_use]
    pub fn copy_distance(&self) -> Option<u8> {
        self.copies.distance()
    }

    /// Sequence number of the next framed packet.
    #[must_use]
    pub fn next_sequence(&self) -> u16 {
        self.next_sequence
    }

    /// The receiver's report about this stream.
    pub fn report(&mut self, now: Instant, report: &Report) {
        self.peer_rungs = report.rungs;
        self.copies.report(now, report.fraction_lost);
        self.resend(now, report);
    }

    /// Takes a decrypted original RTP packet, which took `wire_len` bytes on its sender's wire.
    pub fn take(&mut self, now: Instant, packet: &[u8], wire_len: usize) {
        self.handle_timeout(now);
        self.stats.originals += 1;
        let Some((original, blocks)) = original::read(packet, self.config.red_pt, wire_len) else {
            self.stats.unreadable += 1;
            return;
        };
        let (sequence, timestamp) = (original.header.sequence, original.header.timestamp);
        let ahead = match self.newest {
            None => 1,
            Some((newest, _)) => sequence.wrapping_sub(newest).cast_signed(),
        };
        if ahead <= 0 {
            if self.recovered.contains(&sequence) {
                self.stats.recovered_came += 1;
                self.recovered.retain(|recovered| *recovered != sequence);
            } else {
                self.count(NativeReason::OutOfOrder, 1);
                push_bounded(&mut self.aside, original, &mut self.stats.dropped);
            }
            return;
        }
        let missing = ahead.unsigned_abs() - 1;
        if missing > 0 {
            self.recover(now, &original, &blocks, missing);
        }
        self.newest = Some((sequence, timestamp));
        self.accept(now, original);
    }

    /// Puts those of the `missing` originals before `original` in line that its RED blocks hold.
    fn recover(&mut self, now: Instant, original: &Original, blocks: &[RedBlock], missing: u16) {
        let Some((newest, newest_timestamp)) = self.newest else {
            return;
        };
        let header = original.header;
        let gap = header.timestamp.wrapping_sub(newest_timestamp);
        let mut expected = newest.wrapping_add(1);
        for (index, block) in blocks.iter().enumerate() {
            // The last block is of the packet before, and so on.
            let Ok(back) = u16::try_from(blocks.len() - index) else {
                continue;
            };
            let plausible = (1..gap).contains(&block.ticks_back) && !block.data.is_empty();
            if back > missing || !plausible {
                continue;
            }
            let sequence = header.sequence.wrapping_sub(back);
            self.note_lost(sequence.wrapping_sub(expected));
            expected = sequence.wrapping_add(1);
            let mut packet = Vec::with_capacity(12 + block.data.len());
            let fields = Fields {
                payload_type: block.payload_type,
                marker: false,
                sequence,
                timestamp: header.timestamp.wrapping_sub(block.ticks_back),
            };
            let none = Elementwise {
                none: true,
                ..Elementwise::default()
            };
            header::write(&original.packet, &header, fields, none, &mut packet);
            packet.extend(original.packet.get(block.data.clone()).unwrap_or_default());
            let Some((mut recovered, _)) = original::read(&packet, None, 0) else {
                continue;
            };
            recovered.red = true;
            self.stats.recovered += 1;
            if self.recovered.len() >= RECOVERED {
                self.recovered.pop_front();
            }
            self.recovered.push_back(sequence);
            self.accept(now, recovered);
        }
        self.note_lost(header.sequence.wrapping_sub(expected));
    }

    fn note_lost(&mut self, lost: u16) {
        self.lost = self.lost.saturating_add(lost);
        self.stats.lost += u64::from(lost);
    }

    /// Puts an original, newer than all before, into a group or in line.
    fn accept(&mut self, now: Instant, original: Original) {
        let unit_ms = match self.speech(now, &original) {
            Ok(unit_ms) => unit_ms,
            Err(reason) => {
                self.close(now);
                self.lost = 0;
                self.count(reason, 1);
                self.push(Slot::Native(original));
                return;
            }
        };
        let unit = Duration::from_millis(u64::from(unit_ms));
        let closes_at = now + unit + self.config.timing.partner_late;
        match &mut self.open {
            Some(open) if self.lost == 0 && continues(open, unit_ms, &original) => {
                open.originals.push(original);
                open.closes_at = closes_at;
            }
            _ => {
                self.close(now);
                self.open = Some(Open {
                    originals: vec![original],
                    unit_ms,
                    lost_before: std::mem::take(&mut self.lost),
                    closes_at,
                });
            }
        }
        if let Some(open) = &self.open {
            // At most 4 of them.
            let count = u32::try_from(open.originals.len()).unwrap_or(u32::MAX);
            if unit * (count + 1) > self.config.timing.group || count >= 4 {
                self.close(now);
            }
        }
    }

    /// Milliseconds of an original that can be coded now, or why it goes as it is.
    fn speech(&mut self, now: Instant, original: &Original) -> Result<u8, NativeReason> {
        if self.rung() == Rung::NATIVE {
            return Err(NativeReason::Rung);
        }
        if original.payload_type != self.config.opus_pt {
            return Err(NativeReason::PayloadType);
        }
        let media = original.media();
        if media.len() <= DTX_BYTES {
            return Err(NativeReason::Dtx);
        }
        if media
            .strip_prefix(&SILENCE)
            .is_some_and(|rest| rest.iter().all(|byte| *byte == 0))
        {
            return Err(NativeReason::Silence);
        }
        let (unit_ms, stereo) = original::opus_unit(media).ok_or(NativeReason::Duration)?;
        if matches!(unit_ms, 10 | 120) && !self.config.more_units {
            return Err(NativeReason::Duration);
        }
        if stereo {
            return Err(NativeReason::Stereo);
        }
        if self.resting_until.is_some_and(|until| now < until) {
            return Err(NativeReason::Resting);
        }
        Ok(unit_ms)
    }

    /// Ends the open group: hands it to the engine, or sends it as it is.
    fn close(&mut self, now: Instant) {
        let Some(mut open) = self.open.take() else {
            return;
        };
        // Codecs have frames of 20 ms.
        let left_over = if open.unit_ms == 10 && !open.originals.len().is_multiple_of(2) {
            open.originals.pop()
        } else {
            None
        };
        if !open.originals.is_empty() {
            self.hand_out(now, open);
        }
        if let Some(original) = left_over {
            self.count(NativeReason::Duration, 1);
            self.push(Slot::Native(original));
        }
    }

    fn hand_out(&mut self, now: Instant, open: Open) {
        let rung = self.rung();
        let crowded = self.waiting() >= MAX_WAITING;
        let probing = self.failures >= FAILURES && self.waiting() > 0;
        if rung == Rung::NATIVE || crowded || probing {
            let reason = if rung == Rung::NATIVE {
                NativeReason::Rung
            } else if crowded {
                NativeReason::Crowded
            } else {
                NativeReason::Resting
            };
            self.count(reason, open.originals.len());
            for original in open.originals {
                self.push(Slot::Native(original));
            }
            return;
        }
        let id = self.next_id;
        self.next_id += 1;
        self.jobs.push_back(EncodeJob {
            id,
            rung,
            packets: open
                .originals
                .iter()
                .map(|original| original.media().to_vec())
                .collect(),
            unit_ms: open.unit_ms,
            lost_before: open.lost_before,
        });
        self.push(Slot::Waiting {
            id,
            deadline: now + self.config.timing.deadline,
            unit_ms: open.unit_ms,
            originals: open.originals,
        });
    }

    fn waiting(&self) -> usize {
        let waits = |slot: &&Slot| matches!(slot, Slot::Waiting { .. });
        self.line.iter().filter(waits).count()
    }

    fn push(&mut self, slot: Slot) {
        push_bounded(&mut self.line, slot, &mut self.stats.dropped);
    }

    fn count(&mut self, reason: NativeReason, originals: usize) {
        if let Some(count) = self.stats.natives.get_mut(reason as usize) {
            *count += originals as u64;
        }
    }

    /// The next group to be coded.
    pub fn poll_job(&mut self) -> Option<EncodeJob> {
        self.jobs.pop_front()
    }

    /// The engine coded group `id`.
    pub fn encoded(&mut self, now: Instant, id: u64, encoded: Encoded) {
        self.handle_timeout(now);
        let Some(at) = self.position(id) else {
            self.stats.late_results += 1;
            return;
        };
        let Some(slot) = self.line.get_mut(at) else {
            return;
        };
        let Slot::Waiting {
            unit_ms, originals, ..
        } = slot
        else {
            return;
        };
        let Some(first) = originals.first() else {
            return;
        };
        // At most 4 of them.
        let packets = u8::try_from(originals.len()).unwrap_or(u8::MAX);
        let usable = encoded.unit_ms == *unit_ms
            && self.peer_rungs.has(encoded.rung)
            && part(first, packets, &encoded)
                .write(NO_COPY, self.frames, &mut Vec::new())
                .is_ok();
        if !usable {
            self.refused(now, id, Refusal::Failed);
            return;
        }
        self.failures = 0;
        self.stats.coded += u64::from(packets);
        *slot = Slot::Coded {
            since: now,
            originals: std::mem::take(originals),
            encoded,
        };
    }

    /// The engine doesn't code group `id`.
    pub fn refused(&mut self, now: Instant, id: u64, reason: Refusal) {
        match self.position(id) {
            Some(at) => {
                self.give_up(now, at, NativeReason::Refused);
                let lasts = matches!(
                    reason,
                    Refusal::Undecodable | Refusal::Stereo | Refusal::Duration
                );
                if lasts && self.resting_until.is_some() {
                    // What isn't speech of this kind seldom becomes it: tried less and less often.
                    let doublings =
                        (self.failures - FAILURES.min(self.failures)).min(MAX_DOUBLINGS);
                    self.resting_until = Some(now + self.config.timing.rest * (1 << doublings));
                }
            }
            None => self.stats.late_results += 1,
        }
    }

    fn position(&self, id: u64) -> Option<usize> {
        let is_it =
            |slot: &Slot| matches!(slot, Slot::Waiting { id: waiting, .. } if *waiting == id);
        self.line.iter().position(is_it)
    }

    fn first_waiting(&self) -> Option<usize> {
        let waits = |slot: &Slot| matches!(slot, Slot::Waiting { .. });
        self.line.iter().position(waits)
    }

    /// Sends the waiting group at `at` as it came, for the engine's fault.
    fn give_up(&mut self, now: Instant, at: usize, reason: NativeReason) {
        self.go_native(at, reason);
        self.failures = self.failures.saturating_add(1);
        if self.failures >= FAILURES {
            self.resting_until = Some(now + self.config.timing.rest);
        }
    }

    fn go_native(&mut self, at: usize, reason: NativeReason) {
        let Some(Slot::Waiting { id, originals, .. }) = self.line.remove(at) else {
            return;
        };
        self.jobs.retain(|job| job.id != id);
        self.count(reason, originals.len());
        for (offset, original) in originals.into_iter().enumerate() {
            self.line.insert(at + offset, Slot::Native(original));
        }
        // A group is one in line, its originals are several.
        while self.line.len() > 2 * MAX_LINE {
            self.line.pop_front();
            self.stats.dropped += 1;
        }
    }

    /// When [`Packer::handle_timeout`] is to be called at the latest.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        let open = self.open.as_ref().map(|open| open.closes_at);
        let waiting = self.line.iter().find_map(|slot| match slot {
            Slot::Waiting { deadline, .. } => Some(*deadline),
            _ => None,
        });
        open.into_iter().chain(waiting).min()
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Instant) {
        if self.open.as_ref().is_some_and(|open| open.closes_at <= now) {
            self.close(now);
        }
        loop {
            let due =
                |slot: &Slot| matches!(slot, Slot::Waiting { deadline, .. } if *deadline <= now);
            let Some(at) = self.line.iter().position(due) else {
                return;
            };
            self.stats.missed += 1;
            self.give_up(now, at, NativeReason::Missed);
        }
    }
}

/// Whether `original` is the next of the open group: it follows without a gap, is of the same kind,
/// and doesn't begin a talk spurt.
fn continues(open: &Open, unit_ms: u8, original: &Original) -> bool {
    let Some(last) = open.originals.last() else {
        return false;
    };
    let ticks = u32::from(unit_ms) * TICKS_PER_MS;
    open.unit_ms == unit_ms
        && last.red == original.red
        && !original.header.marker
        && original.header.sequence == last.header.sequence.wrapping_add(1)
        && original.header.timestamp == last.header.timestamp.wrapping_add(ticks)
}

fn push_bounded<T>(queue: &mut VecDeque<T>, item: T, dropped: &mut u64) {
    if queue.len() >= MAX_LINE {
        queue.pop_front();
        *dropped += 1;
    }
    queue.push_back(item);
}
