//! What went coded and was not restored goes once more, as it came.

use super::{NativeReason, Packer, push_bounded};
use crate::hop::Report;
use crate::hop::original::Original;
use crate::ladder::Rungs;
use std::time::{Duration, Instant};

/// How long after it was coded speech is of use to a listener. It is late by then: a decoder that hangs shows
/// after 50 ms, and the report takes its way. Jitter buffers of browsers go that far.
const KEEP: Duration = Duration::from_millis(250);

/// Groups that are kept at most: [`KEEP`] in groups of 20 ms.
const MOST_KEPT: usize = 13;

/// Places that a report can name: those that its receiver tells apart.
const MOST_NAMED: u16 = 64;

/// Packets that may have been sent since a report's highest; a report from before, or from nowhere, is of no use. Seconds of
/// speech in groups of 20 ms.
const MOST_UNDER_WAY: u16 = 256;

/// A group that went coded.
#[derive(Debug)]
pub(super) struct Kept {
    /// When it was coded.
    since: Instant,
    /// Its sequence number on the hop.
    sequence: u16,
    originals: Vec<Original>,
}

impl Packer {
    /// Remembers a group that goes coded as `sequence` of the hop.
    pub(super) fn keep(&mut self, since: Instant, sequence: u16, originals: Vec<Original>) {
        let old = |kept: &Kept| since.saturating_duration_since(kept.since) > KEEP;
        while self.kept.len() >= MOST_KEPT || self.kept.front().is_some_and(old) {
            self.kept.pop_front();
        }
        self.kept.push_back(Kept {
            since,
            sequence,
            originals,
        });
    }

    /// Sends again, natively, what the receiver says that it couldn't restore, and what is still on its way there;
    /// nothing twice. Where it has no codec left, nothing waits for one here either.
    pub(super) fn resend(&mut self, now: Instant, report: &Report) {
        if report.rungs == Rungs::NONE {
            self.close(now);
            while let Some(at) = self.first_waiting() {
                self.go_native(at, NativeReason::Rung);
            }
        }
        let under_way = self.next_sequence.wrapping_sub(report.highest);
        let Some(back) = report.unrestored.min(MOST_NAMED).checked_sub(1) else {
            return;
        };
        if under_way > MOST_UNDER_WAY {
            return;
        }
        let from = report.highest.wrapping_sub(back);
        for kept in std::mem::take(&mut self.kept) {
            if now.saturating_duration_since(kept.since) > KEEP {
                continue;
            }
            if kept.sequence.wrapping_sub(from).cast_signed() < 0 {
                // Not named, but may be yet.
                self.kept.push_back(kept);
                continue;
            }
            for mut original in kept.originals {
                // Its bytes were counted when it went the first time.
                original.wire_len = 0;
                self.stats.resent += 1;
                push_bounded(&mut self.aside, original, &mut self.stats.dropped);
            }
        }
    }
}
