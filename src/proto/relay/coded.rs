//! What the coding of a direction has ready.

use super::{Relay, Scratch, Side, Transmit};
use crate::coding::Coded;
use crate::relay::{Now, wire_len};

impl Relay {
    /// Sends what the coding of the direction that comes from `side` has ready.
    pub(super) fn pass_coded(
        &mut self,
        now: Now,
        side: Side,
        scratch: &mut Scratch,
        out: &mut impl Transmit,
    ) {
        let (from, to, flow, coding) = match side {
            Side::Client => (
                &mut self.client,
                &mut self.server,
                &mut self.up,
                &mut self.up_coding,
            ),
            Side::Server => (
                &mut self.server,
                &mut self.client,
                &mut self.down,
                &mut self.down_coding,
            ),
        };
        while let Some(coded) = coding.poll_packet(now, &mut scratch.plain) {
            let newest = |ssrc| to.newest_sent(ssrc);
            let applied = match coded {
                Coded::Framed { .. } => Some(0),
                Coded::Restored => {
                    let len = scratch.plain.len();
                    flow.apply(&mut scratch.plain, len, now.ntp, newest)
                }
                Coded::Passed(passed) => {
                    flow.apply(&mut scratch.plain, passed.wire_len, now.ntp, newest)
                }
            };
            let Some(saved) = applied else {
                flow.stats.dropped_unsent += 1;
                continue;
            };
            let Some(path) = to.protect_rtp(&scratch.plain, &mut scratch.protected) else {
                flow.stats.dropped_unsent += 1;
                continue;
            };
            out.transmit(side.other(), path, &scratch.protected);
            flow.stats.rtp_packets += 1;
            let bytes = wire_len(&path, scratch.protected.len()) as u64;
            match coded {
                Coded::Framed { native_bytes } => {
                    flow.stats.bytes += bytes;
                    flow.stats.native_bytes += native_bytes;
                }
                Coded::Restored => flow.stats.native_bytes += bytes,
                // The books are kept on the client's wire, as for what isn't coded.
                Coded::Passed(passed) if side == Side::Client => {
                    flow.stats.bytes += passed.wire_len as u64;
                    flow.stats.native_bytes += passed.wire_len as u64 + saved;
                }
                Coded::Passed(passed) => {
                    flow.stats.bytes += bytes;
                    flow.stats.native_bytes += bytes + saved + passed.saved as u64;
                }
            }
        }
        if coding.poll_report(&mut scratch.plain)
            && let Some(path) = from.protect_rtcp(&scratch.plain, &mut scratch.protected)
        {
            out.transmit(side, path, &scratch.protected);
        }
    }
}
