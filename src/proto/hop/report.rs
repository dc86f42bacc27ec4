//! What the receiver of a hop tells its sender: an RTCP APP packet (RFC 3550 section 6.7) named
//! `AIC1`. docs/protocol.md is its specification.

use crate::ladder::{Rung, Rungs};

/// RTCP packet type of APP.
const APP: u8 = 204;

/// RTCP packet type of BYE.
const BYE: u8 = 203;

const NAME: &[u8; 4] = b"AIC1";

/// Bytes of one block.
const BLOCK_LEN: usize = 16;

/// Blocks that fit one packet: five bits count them.
pub const MAX_BLOCKS: usize = 31;

/// One stream's state as its receiver on the hop sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Report {
    /// The stream.
    pub ssrc: u32,
    /// Framed packets that hadn't come when their turn was over, in 1/256 of those whose turn came.
    pub fraction_lost: u8,
    /// Of the same, those that no copy made good either.
    pub fraction_missing: u8,
    /// Rungs that the receiver can decode now.
    pub rungs: Rungs,
    /// Highest sequence number of the hop.
    pub highest: u16,
    /// Variation of the one-way delay in 1/65,536 s, smoothed as in RFC 3550 section 6.4.1.
    pub jitter: u32,
    /// Bytes on the hop over bytes of what was restored from them, headers included, in 1/255.
    pub ratio: u8,
    /// Nothing coded was restored of so many of the hop's last sequence numbers, up to `highest`; 0: of none that it holds for.
    pub unrestored: u16,
}

fn to_mask(rungs: Rungs) -> u8 {
    rungs.iter().fold(0, |mask, rung| mask | 1 << rung.number())
}

fn from_mask(mask: u8) -> Rungs {
    Rung::CODED
        .into_iter()
        .filter(|rung| mask & 1 << rung.number() != 0)
        .fold(Rungs::NONE, Rungs::with)
}

/// Appends RTCP packets that hold `reports` to `out`, as many as they need; none for no report.
pub fn write(sender_ssrc: u32, reports: &[Report], out: &mut Vec<u8>) {
    for blocks in reports.chunks(MAX_BLOCKS) {
        // At most 31 blocks: 2 + 31 × 4 words.
        let count = u8::try_from(blocks.len()).unwrap_or(0);
        let words = u16::from(count) * 4 + 2;
        out.extend([0x80 | count, APP]);
        out.extend(words.to_be_bytes());
        out.extend(sender_ssrc.to_be_bytes());
        out.extend(NAME);
        for block in blocks {
            out.extend(block.ssrc.to_be_bytes());
            out.extend([block.fraction_lost, to_mask(block.rungs)]);
            out.extend(block.highest.to_be_bytes());
            out.extend(block.jitter.to_be_bytes());
            out.extend([block.ratio, block.fraction_missing]);
            out.extend(block.unrestored.to_be_bytes());
        }
    }
}

/// Calls `f` for each packet of a compound until one can't be read: first byte, type, whole packet.
fn packets<'a>(compound: &'a [u8], mut f: impl FnMut(u8, u8, &'a [u8])) {
    let mut rest = compound;
    while let [first, kind, l1, l0, ..] = *rest {
        let len = 4 * (usize::from(u16::from_be_bytes([l1, l0])) + 1);
        let Some((packet, after)) = rest.split_at_checked(len) else {
            return;
        };
        if first >> 6 != 2 {
            return;
        }
        f(first, kind, packet);
        rest = after;
    }
}

fn is_report(kind: u8, packet: &[u8]) -> bool {
    kind == APP && packet.get(8..12) == Some(NAME)
}

/// Calls `f` for each block of a compound RTCP packet. Blocks that aren't whole, rungs that this
/// version doesn't know and reserved bytes are ignored.
pub fn read(compound: &[u8], mut f: impl FnMut(Report)) {
    packets(compound, |first, kind, packet| {
        if !is_report(kind, packet) {
            return;
        }
        let blocks = packet.get(12..).unwrap_or_default();
        let count = usize::from(first & 0x1f);
        for block in blocks.as_chunks::<BLOCK_LEN>().0.iter().take(count) {
            let &[
                s0,
                s1,
                s2,
                s3,
                lost,
                mask,
                h1,
                h0,
                j0,
                j1,
                j2,
                j3,
                ratio,
                missing,
                u1,
                u0,
            ] = block;
            f(Report {
                ssrc: u32::from_be_bytes([s0, s1, s2, s3]),
                fraction_lost: lost,
                fraction_missing: missing,
                rungs: from_mask(mask),
                highest: u16::from_be_bytes([h1, h0]),
                jitter: u32::from_be_bytes([j0, j1, j2, j3]),
                ratio,
                unrestored: u16::from_be_bytes([u1, u0]),
            });
        }
    });
}

/// Calls `f` for each stream that a compound says goodbye to (RTCP BYE, RFC 3550 section 6.6).
pub fn goodbyes(compound: &[u8], mut f: impl FnMut(u32)) {
    packets(compound, |first, kind, packet| {
        if kind != BYE {
            return;
        }
        let sources = packet.get(4..).unwrap_or_default();
        let count = usize::from(first & 0x1f);
        for source in sources.as_chunks::<4>().0.iter().take(count) {
            f(u32::from_be_bytes(*source));
        }
    });
}

/// Whether a compound holds an `AIC1` packet.
#[must_use]
pub fn is_in(compound: &[u8]) -> bool {
    let mut some = false;
    packets(compound, |_, kind, packet| some |= is_report(kind, packet));
    some
}

/// Takes the `AIC1` packets out of a compound: they belong to the hop and are not passed on. What else is in it stays, also
/// what can't be read.
pub fn take_out(compound: &mut Vec<u8>) {
    let mut ours = Vec::new();
    let mut at = 0;
    packets(compound, |_, kind, packet| {
        let range = at..at + packet.len();
        at = range.end;
        if is_report(kind, packet) {
            ours.push(range);
        }
    });
    // From the end on, so that the places of the others stay.
    for range in ours.into_iter().rev() {
        compound.drain(range);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn report(ssrc: u32) -> Report {
        Report {
            ssrc,
            fraction_lost: 26,
            fraction_missing: 3,
            rungs: Rungs::OPUS,
            highest: 0xfffe,
            jitter: 655,
            ratio: 40,
            unrestored: 3,
        }
    }

    #[test]
    fn more_blocks_than_fit_one_packet_take_two() {
        let reports: Vec<Report> = (0..40).map(report).collect();
        let mut out = Vec::new();
        write(9, &reports, &mut out);
        assert!(is_in(&out));
        let mut seen = Vec::new();
        read(&out, |report| seen.push(report));
        assert_eq!(seen, reports);
        take_out(&mut out);
        assert!(out.is_empty());
    }

    #[test]
    fn reports_are_taken_out_from_among_other_packets() {
        let rr = [0x80, 201, 0, 1, 0, 0, 0, 1];
        let other = [0x80, 204, 0, 2, 0, 0, 0, 1, b'T', b'E', b'S', b'T'];
        let odd = [0x80, 204, 0, 200, 1];
        let mut gone = Vec::new();
        let bye = [0x82, 203, 0, 2, 0, 0, 0, 5, 0, 0, 0, 6];
        goodbyes(&[&rr[..], &bye, &odd].concat(), |ssrc| gone.push(ssrc));
        assert_eq!(gone, [5, 6]);
        let mut compound = rr.to_vec();
        write(9, &[report(7)], &mut compound);
        compound.extend(other);
        let mut twice = compound.clone();
        write(9, &[report(8)], &mut twice);
        twice.extend(odd);
        assert!(is_in(&twice));
        take_out(&mut twice);
        assert_eq!(twice, [&rr[..], &other, &odd].concat());
        assert!(!is_in(&twice));
        assert!(is_in(&compound));
        let mut seen = Vec::new();
        read(&compound, |report| seen.push(report));
        assert_eq!(seen, [report(7)]);
        assert!(!is_in(&[]));
    }

    #[test]
    fn unknown_rungs_are_ignored() {
        let mut out = Vec::new();
        write(9, &[report(7)], &mut out);
        out[17] |= 0x81;
        let mut rungs = None;
        read(&out, |report| rungs = Some(report.rungs));
        assert_eq!(rungs, Some(Rungs::OPUS));
    }

    proptest! {
        #[test]
        fn garbage_is_read_or_left(mut bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            read(&bytes, |_| {});
            let mut rest = bytes.clone();
            take_out(&mut rest);
            prop_assert!(rest == bytes || is_in(&bytes));
            prop_assert!(!is_in(&rest));
            // The same with a header that leads further in.
            for (at, byte) in [0x9f, APP, 0, 7].into_iter().enumerate() {
                if let Some(old) = bytes.get_mut(at) { *old = byte; }
            }
            if let Some(name) = bytes.get_mut(8..12) { name.copy_from_slice(NAME); }
            let mut blocks = 0;
            read(&bytes, |_| blocks += 1);
            prop_assert!(blocks <= 1);
        }
    }
}
