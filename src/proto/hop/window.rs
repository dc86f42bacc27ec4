//! The order of framed packets: what came, what is held back, what is missing.

use crate::aic::payload::Part;
use crate::ladder::Rung;
use crate::packet::RtpHeader;
use std::collections::BTreeMap;
use std::time::Instant;

/// Packets behind or ahead of the newest that are told apart; further away is another stream.
pub(super) const SPAN: u64 = 64;

/// So many packets in a row from far behind mean that the sender began anew.
const RESTART: u32 = 8;

/// A framed packet, or a copy of one.
#[derive(Debug, Clone)]
pub(super) struct Frame {
    /// The packet that its header fields come from; of a copy, the one that carried it.
    pub(super) packet: Vec<u8>,
    pub(super) header: RtpHeader,
    pub(super) timestamp: u32,
    pub(super) part: Part<Vec<u8>>,
    /// Where it belongs in the order of the hop.
    pub(super) place: u64,
    /// It is a copy: the header says nothing of it but the SSRC.
    pub(super) copied: bool,
    /// From the hint.
    pub(super) rung: Option<Rung>,
}

/// What a sequence number is to the window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Arrival {
    /// To be held or delivered, at this place.
    New(u64),
    /// The same, far ahead of all before: everything held is to be delivered first.
    Jump(u64),
    /// Its place has passed without it.
    Late,
    /// Its place has passed, filled by a copy.
    Filled,
    /// It came before.
    Duplicate,
    /// From far behind.
    Old,
}

/// Hop sequence numbers around the newest one.
#[derive(Debug, Default)]
pub(super) struct Window {
    /// Highest place seen; places are sequence numbers that don't wrap.
    highest: Option<u64>,
    /// The next place to be delivered.
    next: u64,
    /// Bit `n`: place `highest − n` came.
    received: u64,
    /// Bit `n`: place `highest − n` was delivered.
    delivered: u64,
    old_in_a_row: u32,
    held: BTreeMap<u64, (Instant, Frame)>,
}

impl Window {
    pub(super) fn highest(&self) -> Option<u64> {
        self.highest
    }

    pub(super) fn next(&self) -> u64 {
        self.next
    }

    /// Takes note that `sequence` came.
    pub(super) fn arrive(&mut self, sequence: u16) -> Arrival {
        let Some(highest) = self.highest else {
            // Far from 0, so that places before the first have numbers too.
            let place = 1 << 32 | u64::from(sequence);
            self.begin(place);
            return Arrival::New(place);
        };
        // The low 16 bits of a place are its sequence number.
        let ahead = sequence.wrapping_sub(
            highest
                .to_le_bytes()
                .first_chunk()
                .map_or(0, |low| u16::from_le_bytes(*low)),
        );
        let place = highest.wrapping_add_signed(i64::from(ahead.cast_signed()));
        if place > highest {
            self.old_in_a_row = 0;
            let ahead = place - highest;
            if place >= self.next + SPAN {
                self.highest = Some(place);
                self.received = 1;
                self.delivered = 0;
                return Arrival::Jump(place);
            }
            self.highest = Some(place);
            self.received = self.received.checked_shl(low(ahead)).unwrap_or(0) | 1;
            self.delivered = self.delivered.checked_shl(low(ahead)).unwrap_or(0);
            return Arrival::New(place);
        }
        let back = highest - place;
        if back >= SPAN {
            self.old_in_a_row += 1;
            if self.old_in_a_row < RESTART {
                return Arrival::Old;
            }
            let place = highest + (1 << 16) - back;
            self.highest = Some(place);
            self.received = 1;
            self.delivered = 0;
            self.old_in_a_row = 0;
            return Arrival::Jump(place);
        }
        self.old_in_a_row = 0;
        let bit = 1 << back;
        if self.received & bit != 0 {
            return Arrival::Duplicate;
        }
        self.received |= bit;
        if place >= self.next {
            Arrival::New(place)
        } else if self.delivered & bit != 0 {
            Arrival::Filled
        } else {
            Arrival::Late
        }
    }

    fn begin(&mut self, place: u64) {
        self.highest = Some(place);
        self.next = place;
        self.received = 1;
        self.delivered = 0;
    }

    /// Whether `place` came itself.
    pub(super) fn has_come(&self, place: u64) -> bool {
        let back = self.highest.and_then(|highest| highest.checked_sub(place));
        back.is_some_and(|back| back < SPAN && self.received & 1 << back != 0)
    }

    /// Whether a copy for `place` is of use.
    pub(super) fn wants_copy(&self, place: u64) -> bool {
        place >= self.next && !self.has_come(place) && !self.held.contains_key(&place)
    }

    /// Holds a frame; one that came itself takes the place of its copy.
    pub(super) fn hold(&mut self, now: Instant, place: u64, frame: Frame) {
        self.held.insert(place, (now, frame));
    }

    /// The frame that is next, if it is there.
    pub(super) fn take_next(&mut self) -> Option<Frame> {
        let (_, frame) = self.held.remove(&self.next)?;
        let back = self
            .highest
            .and_then(|highest| highest.checked_sub(self.next));
        if let Some(back) = back.filter(|back| *back < SPAN) {
            self.delivered |= 1 << back;
        }
        self.next += 1;
        Some(frame)
    }

    /// When the first of the held frames came: since then a gap is known.
    pub(super) fn gap_since(&self) -> Option<Instant> {
        self.held.values().map(|(came, _)| *came).min()
    }

    /// Gives up the next place.
    pub(super) fn skip(&mut self) {
        self.next += 1;
    }

    /// Gives up everything before `place`, of which nothing is held.
    pub(super) fn skip_to(&mut self, place: u64) {
        self.next = place;
    }
}

fn low(shift: u64) -> u32 {
    u32::try_from(shift).unwrap_or(u32::MAX)
}
