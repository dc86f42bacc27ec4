//! Opus coded anew without a hop, packet by packet: one that comes is one that goes, with the same
//! header, so that nobody has to be told. Speech that came at a low rate is handed on enhanced, and
//! what a subscriber can't take at its own rate is handed on at a lower one.
//!
//! Only the payload of RTP changes, after decryption and before encryption. An SRTP index must not be
//! used for two different payloads (RFC 3711 section 9.1): what is asked for again (NACK) goes out as
//! it did the first time.

use super::original::{self, DTX_BYTES, Original, RedBlock};
use super::pack::Refusal;
use crate::description::RecodeRule;
use crate::ladder::Rung;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// A packet whose result isn't there so long after it came goes as it came.
const DEADLINE: Duration = Duration::from_millis(20);

/// Packets that wait for the engine at a time; further ones go as they came.
const MAX_WAITING: usize = 16;

/// Packets in line. The front leaves after [`DEADLINE`] at the latest.
const MAX_LINE: usize = 64;

/// Packets behind the newest that can still be asked for again: 5 s of 20 ms.
const HISTORY: u16 = 256;

/// Recoded payloads that may come again in RED, and more than RED reaches back.
const RECENT: usize = 4;

/// Results missed or refused in a row before the engine is left alone, and for how long.
const FAILURES: u32 = 3;
const REST: Duration = Duration::from_millis(300);
/// The rest after refusals that last doubles so often: up to 4.8 s.
const MAX_DOUBLINGS: u32 = 4;

/// A fraction lost of 2 %, in 1/256, makes a receiver a constrained one ...
const LOSSY: u8 = 5;
/// ... for so long.
const CONSTRAINED: Duration = Duration::from_secs(30);

/// TOC configurations of wideband SILK in frames of 20 ms and more (RFC 6716 section 3.1): what encoders
/// choose for speech at 10 to 13 kbit/s or so. LACE leaves everything else as it is, and then a second
/// coding only costs.
const ENHANCEABLE: std::ops::RangeInclusive<u8> = 9..=11;

/// Names of [`RecodeStats::kept`], by [`Kept`].
pub const KEPT: [&str; 9] = [
    "off", "rate", "dtx", "kind", "resting", "crowded", "missed", "refused", "larger",
];

/// Why a packet went as it came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    /// The receiver isn't constrained, the rule was taken back, or the engine can't do it now.
    Off,
    /// Its rate is near the rung's already, or it isn't what enhancement adds to.
    Rate,
    /// DTX, comfort noise, or LiveKit's silence.
    Dtx,
    /// Not Opus, stereo, or of an odd duration.
    Kind,
    /// The engine failed the last ones.
    Resting,
    /// Too many wait already.
    Crowded,
    /// The result didn't come in time.
    Missed,
    /// The engine refused it.
    Refused,
    /// The result was no smaller.
    Larger,
}

/// Counters of packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RecodeStats {
    /// Sent with another payload.
    pub recoded: u64,
    /// Bytes that these became shorter; those that grew count for nothing.
    pub saved: u64,
    /// Sent as they came, by [`Kept`].
    pub kept: [u64; KEPT.len()],
    /// Asked for again, or overtaken, and sent as the first time.
    pub repeated: u64,
    /// Dropped: so old that nobody knows how they went the first time.
    pub dropped: u64,
}

impl std::ops::AddAssign for RecodeStats {
    fn add_assign(&mut self, other: Self) {
        self.recoded += other.recoded;
        self.saved += other.saved;
        for (sum, kept) in self.kept.iter_mut().zip(other.kept) {
            *sum += kept;
        }
        self.repeated += other.repeated;
        self.dropped += other.dropped;
    }
}

/// A packet to be coded anew. Hand back [`Recoder::recoded`] or [`Recoder::refused`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecodeJob {
    /// Comes back with the result.
    pub id: u64,
    /// Of the source: streams that say the same share the work. None: it is this stream's alone.
    pub key: Option<u128>,
    /// The rung; none: enhanced, at the local rate.
    pub rung: Option<Rung>,
    /// An Opus packet.
    pub payload: Vec<u8>,
    /// Milliseconds of it.
    pub unit_ms: u8,
    /// Packets lost right before it.
    pub lost_before: u16,
}

/// What a packet that [`Recoder::poll_packet`] gave was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Passed {
    /// Bytes on the wire of its sender.
    pub wire_len: usize,
    /// Bytes that it became shorter.
    pub saved: usize,
}

#[derive(Debug)]
enum State {
    Waiting {
        id: u64,
        deadline: Instant,
    },
    /// With another payload, or as it came.
    Ready(Option<Vec<u8>>),
}

#[derive(Debug)]
struct Slot {
    original: Original,
    blocks: Vec<RedBlock>,
    state: State,
}

/// One stream.
#[derive(Debug)]
pub struct Recoder {
    opus_pt: u8,
    red_pt: Option<u8>,
    rule: Option<RecodeRule>,
    /// The engine can do what the rule says.
    able: bool,
    constrained_until: Option<Instant>,
    newest: Option<u16>,
    lost: u16,
    /// Bits a second of the source, a moving average over half a second or so; none: not known.
    rate: Option<u32>,
    /// The rate is worth it.
    worth: bool,
    next_id: u64,
    line: VecDeque<Slot>,
    aside: VecDeque<Slot>,
    jobs: VecDeque<RecodeJob>,
    failures: u32,
    resting_until: Option<Instant>,
    /// Payloads sent in place of others, by sequence number, the oldest first.
    sent: VecDeque<(u16, Vec<u8>)>,
    /// Recoded Opus by timestamp, for RED.
    recent: VecDeque<(u32, Vec<u8>)>,
    /// Some were sent recoded: what is too old to be known may be one of them.
    ever: bool,
    /// Counters.
    pub stats: RecodeStats,
}

impl Recoder {
    /// For a stream of Opus with this payload type, perhaps in RED.
    #[must_use]
    pub fn new(opus_pt: u8, red_pt: Option<u8>, rule: RecodeRule, able: bool) -> Self {
        Self {
            opus_pt,
            red_pt,
            rule: Some(rule),
            able,
            constrained_until: None,
            newest: None,
            lost: 0,
            rate: None,
            worth: false,
            next_id: 0,
            line: VecDeque::new(),
            aside: VecDeque::new(),
            jobs: VecDeque::new(),
            failures: 0,
            resting_until: None,
            sent: VecDeque::new(),
            recent: VecDeque::new(),
            ever: false,
            stats: RecodeStats::default(),
        }
    }

    /// The stream has gone on up to this number: what has is not to be coded.
    pub fn begin_after(&mut self, newest: Option<u16>) {
        self.newest = newest;
    }

    /// Another rule; none: everything goes as it comes, what waits too.
    pub fn set_rule(&mut self, rule: Option<RecodeRule>) {
        if rule.is_none() {
            self.release(Kept::Off);
        }
        self.rule = rule;
    }

    /// Payload types of Opus and RED from the next packet on.
    pub fn set_pts(&mut self, opus_pt: u8, red_pt: Option<u8>) {
        (self.opus_pt, self.red_pt) = (opus_pt, red_pt);
    }

    /// The highest sequence number that came.
    #[must_use]
    pub fn newest(&self) -> Option<u16> {
        self.newest
    }

    /// Whether packets have gone with other payloads than they came with.
    #[must_use]
    pub fn was_active(&self) -> bool {
        self.ever
    }

    /// Whether the engine can do it from now on.
    pub fn set_able(&mut self, able: bool) {
        self.able = able;
    }

    /// What the rule asks of the engine: a rung, or enhancement.
    #[must_use]
    pub fn wants(&self) -> Option<Option<Rung>> {
        self.rule.map(|rule| rule.rung)
    }

    /// The receiver reported this fraction lost (1/256).
    pub fn report(&mut self, now: Instant, fraction_lost: u8) {
        if fraction_lost >= LOSSY {
            self.constrained_until = Some(now + CONSTRAINED);
        }
    }

    fn active(&self, now: Instant) -> Option<RecodeRule> {
        let constrained = self.constrained_until.is_some_and(|until| now < until);
        self.rule
            .filter(|rule| self.able && (constrained || !rule.lossy_only))
    }

    /// Nothing is to be done with what comes now: no need to [`Recoder::take`] it.
    #[must_use]
    pub fn is_idle(&self, now: Instant) -> bool {
        self.line.is_empty() && self.sent.is_empty() && self.active(now).is_none()
    }

    /// A packet goes by that nothing is to be done with. It isn't coded when it is asked for again either. `false`: it must not go,
    /// because it may have gone with another payload and nobody knows any more.
    #[must_use]
    pub fn skip(&mut self, sequence: u16) -> bool {
        let ahead = self
            .newest
            .map_or(1, |newest| sequence.wrapping_sub(newest).cast_signed());
        if ahead > 0 {
            self.newest = Some(sequence);
        } else if self.ever && ahead.unsigned_abs() > HISTORY {
            self.stats.dropped += 1;
            return false;
        }
        self.lost = 0;
        true
    }

    /// Takes a decrypted packet, which took `wire_len` bytes on its sender's wire.
    pub fn take(&mut self, now: Instant, packet: &[u8], wire_len: usize) {
        self.handle_timeout(now);
        let Some((original, blocks)) = original::read(packet, self.red_pt, wire_len) else {
            self.stats.dropped += 1;
            return;
        };
        let sequence = original.header.sequence;
        let ahead = self
            .newest
            .map_or(1, |newest| sequence.wrapping_sub(newest).cast_signed());
        let mut slot = Slot {
            original,
            blocks,
            state: State::Ready(None),
        };
        if ahead <= 0 {
            self.again(slot, ahead.unsigned_abs());
            return;
        }
        self.newest = Some(sequence);
        while self
            .sent
            .front()
            .is_some_and(|(old, _)| sequence.wrapping_sub(*old) > HISTORY)
        {
            self.sent.pop_front();
        }
        self.lost = self.lost.saturating_add(ahead.unsigned_abs() - 1);
        match self.judge(now, &slot.original) {
            Ok((rule, unit_ms)) => {
                let id = self.next_id;
                self.next_id += 1;
                self.jobs.push_back(RecodeJob {
                    id,
                    key: rule.key,
                    rung: rule.rung,
                    payload: slot.original.media().to_vec(),
                    unit_ms,
                    lost_before: std::mem::take(&mut self.lost),
                });
                slot.state = State::Waiting {
                    id,
                    deadline: now + DEADLINE,
                };
            }
            Err(kept) => {
                self.lost = 0;
                self.count(kept);
            }
        }
        if self.line.len() >= MAX_LINE {
            // Its turn would have come long ago: nobody polls.
            self.line.pop_front();
            self.stats.dropped += 1;
        }
        self.line.push_back(slot);
    }

    /// A packet that isn't newer than all before.
    fn again(&mut self, mut slot: Slot, behind: u16) {
        let sequence = slot.original.header.sequence;
        let in_line = |waiting: &Slot| waiting.original.header.sequence == sequence;
        if self.line.iter().any(in_line) {
            self.stats.dropped += 1;
            return;
        }
        let known = self.sent.iter().find(|(old, _)| *old == sequence);
        if let Some((_, payload)) = known {
            slot.state = State::Ready(Some(payload.clone()));
        } else if self.ever && behind > HISTORY {
            self.stats.dropped += 1;
            return;
        }
        self.stats.repeated += 1;
        if self.aside.len() >= MAX_LINE {
            self.aside.pop_front();
            self.stats.dropped += 1;
        }
        self.aside.push_back(slot);
    }

    /// What is to be done with a packet, and its milliseconds; or why nothing is.
    fn judge(&mut self, now: Instant, original: &Original) -> Result<(RecodeRule, u8), Kept> {
        let rule = self.active(now).ok_or(Kept::Off)?;
        if original.payload_type != self.opus_pt {
            return Err(Kept::Kind);
        }
        let media = original.media();
        if media.len() <= DTX_BYTES || original.trimmed().is_some_and(|len| len <= DTX_BYTES) {
            return Err(Kept::Dtx);
        }
        let (unit_ms, stereo) = original::opus_unit(media).ok_or(Kept::Kind)?;
        if stereo {
            return Err(Kept::Kind);
        }
        if !self.is_worth(rule, media, unit_ms) {
            return Err(Kept::Rate);
        }
        if self.resting_until.is_some_and(|until| now < until) {
            return Err(Kept::Resting);
        }
        let waits = |slot: &&Slot| matches!(slot.state, State::Waiting { .. });
        let waiting = self.line.iter().filter(waits).count();
        // After failures one is tried at a time.
        if waiting >= MAX_WAITING {
            return Err(Kept::Crowded);
        }
        if self.failures >= FAILURES && waiting > 0 {
            return Err(Kept::Resting);
        }
        Ok((rule, unit_ms))
    }

    /// Whether the source's rate lets the rule do any good.
    fn is_worth(&mut self, rule: RecodeRule, media: &[u8], unit_ms: u8) -> bool {
        let Some(rung) = rule.rung else {
            return media
                .first()
                .is_some_and(|toc| ENHANCEABLE.contains(&(toc >> 3)));
        };
        // At most 1,500 bytes in 20 ms.
        let bits = u32::try_from(media.len() * 8_000 / usize::from(unit_ms)).unwrap_or(u32::MAX);
        let rate = self.rate.map_or(bits, |rate| {
            (rate.saturating_mul(15).saturating_add(bits)) / 16
        });
        self.rate = Some(rate);
        // A second coding costs quality. It begins where it saves a third, and goes on while a fifth.
        let least = if self.worth { 5 } else { 6 };
        self.worth = u64::from(rate) * 4 >= u64::from(rung.bitrate()) * least;
        self.worth
    }

    fn count(&mut self, kept: Kept) {
        if let Some(count) = self.stats.kept.get_mut(kept as usize) {
            *count += 1;
        }
    }

    /// The next packet to be coded.
    pub fn poll_job(&mut self) -> Option<RecodeJob> {
        self.jobs.pop_front()
    }

    fn position(&self, id: u64) -> Option<usize> {
        let is_it = |slot: &Slot| matches!(slot.state, State::Waiting { id: of, .. } if of == id);
        self.line.iter().position(is_it)
    }

    /// The engine coded packet `id`.
    pub fn recoded(&mut self, now: Instant, id: u64, opus: Vec<u8>) {
        self.handle_timeout(now);
        let Some(at) = self.position(id) else {
            return;
        };
        let shrinks = self.rule.is_some_and(|rule| rule.rung.is_some());
        let Some(slot) = self.line.get_mut(at) else {
            return;
        };
        self.failures = 0;
        let unit = |media: &[u8]| original::opus_unit(media).map(|(unit, _)| unit);
        let useless = shrinks && opus.len() >= slot.original.media().len();
        if useless || unit(&opus) != unit(slot.original.media()) {
            slot.state = State::Ready(None);
            self.count(if useless { Kept::Larger } else { Kept::Refused });
            return;
        }
        let timestamp = slot.original.header.timestamp;
        let payload = if slot.original.red {
            red(&slot.blocks, &self.recent, timestamp, self.opus_pt, &opus)
        } else {
            opus.clone()
        };
        let sequence = slot.original.header.sequence;
        slot.state = State::Ready(Some(payload.clone()));
        if self.recent.len() >= RECENT {
            self.recent.pop_front();
        }
        self.recent.push_back((timestamp, opus));
        // They end in another order than they came, by the line at most.
        if self.sent.len() >= usize::from(HISTORY) + MAX_LINE {
            self.sent.pop_front();
        }
        self.sent.push_back((sequence, payload));
        self.ever = true;
    }

    /// The engine doesn't code packet `id`.
    pub fn refused(&mut self, now: Instant, id: u64, reason: Refusal) {
        let Some(at) = self.position(id) else {
            return;
        };
        let shared = self.rule.is_some_and(|rule| rule.key.is_some());
        if reason == Refusal::Stale || shared && reason == Refusal::Busy {
            // Others are ahead, or so many that the queue is full of them: nothing against the engine.
            self.give_up(at, Kept::Refused);
            return;
        }
        self.fail(now, at, Kept::Refused);
        let lasts = matches!(
            reason,
            Refusal::Undecodable | Refusal::Stereo | Refusal::Duration
        );
        if lasts && self.resting_until.is_some() {
            let doublings = self.failures.saturating_sub(FAILURES).min(MAX_DOUBLINGS);
            self.resting_until = Some(now + REST * (1 << doublings));
        }
    }

    fn fail(&mut self, now: Instant, at: usize, kept: Kept) {
        self.give_up(at, kept);
        self.failures = self.failures.saturating_add(1);
        if self.failures >= FAILURES {
            self.resting_until = Some(now + REST);
        }
    }

    fn give_up(&mut self, at: usize, kept: Kept) {
        let Some(slot) = self.line.get_mut(at) else {
            return;
        };
        if let State::Waiting { id, .. } = slot.state {
            self.jobs.retain(|job| job.id != id);
        }
        slot.state = State::Ready(None);
        self.count(kept);
    }

    /// Everything that waits goes as it came.
    fn release(&mut self, kept: Kept) {
        for at in 0..self.line.len() {
            let waits = |slot: &Slot| matches!(slot.state, State::Waiting { .. });
            if self.line.get(at).is_some_and(waits) {
                self.give_up(at, kept);
            }
        }
    }

    /// Writes the next packet that is to go on into `out`.
    pub fn poll_packet(&mut self, out: &mut Vec<u8>) -> Option<Passed> {
        let first = !self.aside.is_empty();
        let queue = if first {
            &mut self.aside
        } else {
            &mut self.line
        };
        let ready = |slot: &&Slot| matches!(slot.state, State::Ready(_));
        queue.front().filter(ready)?;
        let Slot {
            original, state, ..
        } = queue.pop_front()?;
        out.clear();
        let State::Ready(Some(payload)) = state else {
            out.extend_from_slice(&original.packet);
            return Some(Passed {
                wire_len: original.wire_len,
                saved: 0,
            });
        };
        let header = original.packet.get(..original.header.header_len);
        out.extend_from_slice(header.unwrap_or_default());
        out.extend_from_slice(&payload);
        if let Some(first) = out.first_mut() {
            // The padding is gone.
            *first &= !0x20;
        }
        let saved = original.packet.len().saturating_sub(out.len());
        if !first {
            self.stats.recoded += 1;
            self.stats.saved += saved as u64;
        }
        Some(Passed {
            wire_len: original.wire_len,
            saved,
        })
    }

    /// When [`Recoder::handle_timeout`] is to be called at the latest.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.line.iter().find_map(|slot| match slot.state {
            State::Waiting { deadline, .. } => Some(deadline),
            State::Ready(_) => None,
        })
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Instant) {
        let due =
            |slot: &Slot| matches!(slot.state, State::Waiting { deadline, .. } if deadline <= now);
        while let Some(at) = self.line.iter().position(due) {
            self.fail(now, at, Kept::Missed);
        }
    }
}

/// A RED payload (RFC 2198) around `opus`, with those of the older blocks that were recoded themselves.
fn red(
    blocks: &[RedBlock],
    recent: &VecDeque<(u32, Vec<u8>)>,
    timestamp: u32,
    opus_pt: u8,
    opus: &[u8],
) -> Vec<u8> {
    let older = blocks.iter().filter_map(|block| {
        let of = timestamp.wrapping_sub(block.ticks_back);
        let (_, data) = recent.iter().find(|(at, _)| *at == of)?;
        // Ten bits of length, fourteen of timestamp offset.
        let len = u32::try_from(data.len())
            .ok()
            .filter(|len| *len < 1 << 10)?;
        Some((block.ticks_back << 10 | len, data))
    });
    let mut payload = Vec::with_capacity(opus.len() + 1);
    for (packed, _) in older.clone() {
        payload.push(0x80 | opus_pt);
        payload.extend_from_slice(&packed.to_be_bytes()[1..]);
    }
    payload.push(opus_pt);
    for (_, data) in older {
        payload.extend_from_slice(data);
    }
    payload.extend_from_slice(opus);
    payload
}
