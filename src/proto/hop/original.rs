//! What an original packet is to a hop: speech that may be coded, or something that goes as it is.

use crate::packet::RtpHeader;
use std::ops::Range;

/// Payloads up to this many bytes are DTX or comfort noise: nothing to be saved by a codec.
pub(super) const DTX_BYTES: usize = 8;

/// Trailing zero bytes from this number on are not carried: the length that tells them takes 2.
const TRIM_FROM: usize = 3;

/// An original packet and where its Opus payload lies.
#[derive(Debug, Clone)]
pub(super) struct Original {
    pub(super) packet: Vec<u8>,
    pub(super) header: RtpHeader,
    /// Payload type of the media: of RED, its primary block's.
    pub(super) payload_type: u8,
    /// The media: of RED, its primary block's data.
    pub(super) media: Range<usize>,
    pub(super) red: bool,
    /// Bytes that it took on the wire of its sender.
    pub(super) wire_len: usize,
}

/// Older payloads carried in a RED packet.
#[derive(Debug, Clone)]
pub(super) struct RedBlock {
    pub(super) payload_type: u8,
    /// Timestamp of the packet less that of the block.
    pub(super) ticks_back: u32,
    pub(super) data: Range<usize>,
}

impl Original {
    pub(super) fn media(&self) -> &[u8] {
        self.packet.get(self.media.clone()).unwrap_or_default()
    }

    /// Length of the media without zero bytes at its end, where leaving them out saves something.
    pub(super) fn trimmed(&self) -> Option<usize> {
        let media = self.media();
        let len = media
            .iter()
            .rposition(|byte| *byte != 0)
            .map_or(0, |last| last + 1);
        (media.len() - len >= TRIM_FROM).then_some(len)
    }
}

/// Reads an RTP packet. The older blocks of RED are handed out, the oldest first; RED that can't
/// be read or has no primary data is taken as a whole.
pub(super) fn read(
    packet: &[u8],
    red_pt: Option<u8>,
    wire_len: usize,
) -> Option<(Original, Vec<RedBlock>)> {
    let header = RtpHeader::parse(packet)?;
    let end = packet.len() - header.padding;
    let whole = header.header_len..end;
    let red = red_pt == Some(header.payload_type);
    let parsed = red
        .then(|| red_blocks(packet, whole.clone()))
        .flatten()
        .filter(|(_, media, _)| !media.is_empty());
    let (payload_type, media, blocks, red) = match parsed {
        Some((payload_type, media, blocks)) => (payload_type, media, blocks, true),
        None => (header.payload_type, whole, Vec::new(), false),
    };
    let original = Original {
        packet: packet.to_vec(),
        header,
        payload_type,
        media,
        red,
        wire_len,
    };
    Some((original, blocks))
}

/// A RED payload (RFC 2198 section 3): the primary's payload type and data, and the blocks before.
type Red = (u8, Range<usize>, Vec<RedBlock>);

fn red_blocks(packet: &[u8], whole: Range<usize>) -> Option<Red> {
    let mut at = whole.start;
    let mut blocks = Vec::new();
    while packet.get(at..whole.end)?.first()? & 0x80 != 0 {
        let &[first, a, b, c] = packet.get(at..whole.end)?.first_chunk()?;
        let packed = u32::from_be_bytes([0, a, b, c]);
        // Ten bits of length, fourteen of timestamp offset.
        blocks.push((first & 0x7f, packed >> 10, (packed & 0x3ff) as usize));
        at += 4;
    }
    let payload_type = packet.get(at)? & 0x7f;
    let mut data = at + 1;
    let blocks: Vec<RedBlock> = blocks
        .into_iter()
        .map(|(payload_type, ticks_back, len)| {
            let start = data;
            data += len;
            RedBlock {
                payload_type,
                ticks_back,
                data: start..data,
            }
        })
        .collect();
    (data <= whole.end).then_some((payload_type, data..whole.end, blocks))
}

/// Duration of an Opus packet in milliseconds where it is 10, 20, 40, 60 or 120 (RFC 6716 section 3.1), and whether it is stereo.
/// Packets of 2.5 and 5 ms are below the `minptime=10` that everybody negotiates (RFC 7587 section 6.1).
pub(super) fn opus_unit(media: &[u8]) -> Option<(u8, bool)> {
    let &toc = media.first()?;
    let config = toc >> 3;
    // In half milliseconds.
    let frame: u32 = match config {
        // SILK: 10, 20, 40, 60 ms.
        0..=11 => [20, 40, 80, 120][usize::from(config & 3)],
        // Hybrid: 10, 20 ms.
        12..=15 => [20, 40][usize::from(config & 1)],
        // CELT: 2.5, 5, 10, 20 ms.
        _ => [5, 10, 20, 40][usize::from(config & 3)],
    };
    let frames = match toc & 3 {
        0 => 1,
        1 | 2 => 2,
        _ => u32::from(media.get(1)? & 0x3f),
    };
    let unit = match frame * frames {
        20 => 10,
        40 => 20,
        80 => 40,
        120 => 60,
        240 => 120,
        _ => return None,
    };
    Some((unit, toc & 4 != 0))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn durations_are_those_of_the_opus_specification() {
        // Table 2 of RFC 6716: configuration, and the code that says how many frames.
        for (toc, second, unit) in [
            (0 << 3, None, Some(10)),
            (1 << 3, None, Some(20)),
            (2 << 3, None, Some(40)),
            (3 << 3, None, Some(60)),
            (9 << 3, None, Some(20)),
            (9 << 3 | 1, None, Some(40)),
            (10 << 3 | 2, None, None),
            (11 << 3 | 1, None, Some(120)),
            (13 << 3, None, Some(20)),
            (14 << 3 | 1, None, Some(20)),
            (16 << 3, None, None),
            (31 << 3, None, Some(20)),
            (31 << 3 | 3, Some(3), Some(60)),
            (31 << 3 | 3, Some(48), None),
            (31 << 3 | 3, Some(6), Some(120)),
            (18 << 3, None, Some(10)),
            (31 << 3 | 3, None, None),
            (28 << 3 | 3, Some(8 | 0xc0), Some(20)),
        ] {
            let mut media = vec![toc];
            media.extend(second);
            assert_eq!(
                opus_unit(&media).map(|(unit, _)| unit),
                unit,
                "{toc:#x} {second:?}"
            );
        }
        assert_eq!(opus_unit(&[0xfc]), Some((20, true)));
        assert_eq!(opus_unit(&[]), None);
    }

    #[test]
    fn red_is_taken_apart() {
        let mut packet = vec![0x80, 63, 0, 9, 0, 0, 9, 0, 0, 0, 0, 7];
        packet.extend([0x80 | 111, 0x0f, 0x00, 5, 111]);
        packet.extend(b"oldernewer!");
        let (original, blocks) = read(&packet, Some(63), 100).unwrap();
        assert_eq!((original.payload_type, original.red), (111, true));
        assert_eq!(original.media(), b"newer!");
        assert_eq!(blocks.len(), 1);
        assert_eq!((blocks[0].payload_type, blocks[0].ticks_back), (111, 960));
        assert_eq!(&packet[blocks[0].data.clone()], b"older");
        // Not RED here, and RED that is too short: the whole payload as it is.
        let (plain, blocks) = read(&packet, None, 100).unwrap();
        assert_eq!(
            (plain.payload_type, plain.red, blocks.len()),
            (63, false, 0)
        );
        let (broken, blocks) = read(&packet[..20], Some(63), 100).unwrap();
        assert_eq!(
            (broken.payload_type, broken.red, blocks.len()),
            (63, false, 0)
        );
    }

    #[test]
    fn zeros_at_the_end_are_seen() {
        let trimmed = |media: &[u8]| {
            let mut packet = vec![0x80, 111, 0, 9, 0, 0, 9, 0, 0, 0, 0, 7];
            packet.extend(media);
            read(&packet, None, 0).unwrap().0.trimmed()
        };
        let mut silence = vec![0xf8, 0xff, 0xfe];
        silence.resize(80, 0);
        assert_eq!(trimmed(&silence), Some(3));
        assert_eq!(trimmed(&[1, 0, 0]), None);
        assert_eq!(trimmed(&[0, 0, 0]), Some(0));
        assert_eq!(trimmed(&[]), None);
    }
}
