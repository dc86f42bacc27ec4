//! What went coded and was not restored goes once more, as it came.

use super::{Packer, push_bounded};
use crate::hop::Report;
use crate::hop::original::Original;
use crate::ladder::Rungs;
use std::time::{Duration, Instant};

/// How long after it was coded speech is of use to a listener. It is late by then: a decoder that hangs shows
/// after 50 ms, and the report takes its way. Jitter buffers of browsers go that far.
const KEEP: Duration = Duration::from_millis(250);

/// Groups that are kept at most: [`KEEP`] in groups of 20 ms.
const MOST_KEPT: usize = 13;

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
    /// nothing twice. A group that is open waits for no partner where the receiver has no codec left.
    pub(super) fn resend(&mut self, now: Instant, report: &Report) {
        let Some(back) = report.unrestored.checked_sub(1) else {
            return;
        };
        let from = report.highest.wrapping_sub(back);
        for kept in std::mem::take(&mut self.kept) {
            let ahead = kept.sequence.wrapping_sub(from).cast_signed();
            if ahead < 0 || now.saturating_duration_since(kept.since) > KEEP {
                continue;
            }
            for mut original in kept.originals {
                // Its bytes were counted when it went the first time.
                original.wire_len = 0;
                self.stats.resent += 1;
                push_bounded(&mut self.aside, original, &mut self.stats.dropped);
            }
        }
        if report.rungs == Rungs::NONE {
            self.close(now);
        }
    }
}
