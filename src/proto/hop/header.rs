//! RTP headers of framed and restored packets, written anew from that of another packet.

use crate::packet::{Elements, ONE_BYTE, RtpHeader};

/// Bytes that an extension written here has at most.
const MAX_EXTENSION: usize = 512;

/// What a new header takes from the old one besides CSRCs and extension elements.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fields {
    pub(super) payload_type: u8,
    pub(super) marker: bool,
    pub(super) sequence: u16,
    pub(super) timestamp: u32,
}

/// The header up to its extension: what is left of it when another packet is made up in its place.
pub(super) fn without_extension(packet: &[u8], header: &RtpHeader) -> (Vec<u8>, RtpHeader) {
    let header_len = header.extension_at.unwrap_or(header.header_len);
    let header = RtpHeader {
        header_len,
        extension_at: None,
        ..*header
    };
    let kept = packet.get(..header_len).unwrap_or_default();
    (kept.to_vec(), header)
}

/// Which extension elements of the old header go over, and what is added.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Elementwise<'a> {
    /// Ids left out.
    pub(super) without: [Option<u8>; 2],
    /// Leaves all of them out.
    pub(super) none: bool,
    /// Added at the end: id and data.
    pub(super) add: Option<(u8, &'a [u8])>,
}

/// Replaces `out` by an RTP header with `fields` and the SSRC and CSRCs of `packet`. Extension
/// elements go over as `elements` says, in one-byte form where they fit it; an extension of another
/// profile than RFC 8285's goes over as it is.
pub(super) fn write(
    packet: &[u8],
    header: &RtpHeader,
    fields: Fields,
    elements: Elementwise<'_>,
    out: &mut Vec<u8>,
) {
    out.clear();
    let csrcs_end = header.extension_at.unwrap_or(header.header_len);
    let csrcs = packet.get(12..csrcs_end).unwrap_or_default();
    // At most 15 of them: they were read by a header.
    let csrc_count = u8::try_from(csrcs.len() / 4).unwrap_or(0);
    out.push(0x80 | csrc_count & 0x0f);
    out.push(u8::from(fields.marker) << 7 | fields.payload_type & 0x7f);
    out.extend(fields.sequence.to_be_bytes());
    out.extend(fields.timestamp.to_be_bytes());
    out.extend(header.ssrc.to_be_bytes());
    out.extend(csrcs);
    extension(packet, header, elements, out);
}

fn extension(packet: &[u8], header: &RtpHeader, wanted: Elementwise<'_>, out: &mut Vec<u8>) {
    let at = header.extension_at;
    let old = at
        .filter(|_| !wanted.none)
        .and_then(|at| packet.get(at..header.header_len))
        .and_then(|whole| whole.split_at_checked(4));
    let (profile, body) = old.map_or((ONE_BYTE, &[][..]), |(prefix, body)| {
        (u16::from_be_bytes([prefix[0], prefix[1]]), body)
    });
    if Elements::new(profile, body).is_none() {
        // An extension of its own kind: there can be no other beside it.
        if let Some(whole) = at.and_then(|at| packet.get(at..header.header_len)) {
            out.extend(whole);
            set_x(out);
        }
        return;
    }
    let kept = || {
        Elements::new(profile, body)
            .into_iter()
            .flatten()
            .filter(|(id, _)| !wanted.without.contains(&Some(*id)))
            .chain(wanted.add)
    };
    if kept().next().is_none() {
        return;
    }
    let one_byte = kept().all(|(id, data)| id <= 14 && (1..=16).contains(&data.len()));
    let start = out.len();
    out.extend(if one_byte { ONE_BYTE } else { 0x1000 }.to_be_bytes());
    out.extend([0, 0]);
    for (id, data) in kept() {
        if out.len() - start + 2 + data.len() > MAX_EXTENSION {
            break;
        }
        // Lengths fit: read from the same form, or checked above.
        let len = u8::try_from(data.len()).unwrap_or(u8::MAX);
        if one_byte {
            out.push(id << 4 | len.wrapping_sub(1) & 0x0f);
        } else {
            out.extend([id, len]);
        }
        out.extend(data);
    }
    while !(out.len() - start).is_multiple_of(4) {
        out.push(0);
    }
    let words = u16::try_from((out.len() - start) / 4 - 1).unwrap_or(0);
    if let Some(length) = out.get_mut(start + 2..start + 4) {
        length.copy_from_slice(&words.to_be_bytes());
    }
    set_x(out);
}

fn set_x(out: &mut [u8]) {
    if let Some(first) = out.first_mut() {
        *first |= 0x10;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::packet::append_extension;
    use proptest::prelude::*;

    fn fields(header: &RtpHeader) -> Fields {
        Fields {
            payload_type: header.payload_type,
            marker: header.marker,
            sequence: header.sequence,
            timestamp: header.timestamp,
        }
    }

    fn rtp(extension: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x81, 0x80 | 111, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3, 9, 9, 9, 9];
        if !extension.is_empty() {
            packet[0] |= 0x10;
            packet.extend(extension);
        }
        packet
    }

    #[test]
    fn a_hint_that_was_appended_goes_again_and_nothing_else_changes() {
        for before in [
            rtp(&[]),
            rtp(&[0xbe, 0xde, 0, 1, 0x10, 0x85, 0, 0]),
            rtp(&[0xbe, 0xde, 0, 2, 0x41, b'1', b'2', 0x10, 0x00, 0, 0, 0]),
            rtp(&[0xab, 0xcd, 0, 1, 1, 2, 3, 4]),
        ] {
            for id in [5, 16] {
                let mut packet = before.clone();
                let header = RtpHeader::parse(&packet).unwrap();
                append_extension(&mut packet, &header, id, &[0; 7]);
                let header = RtpHeader::parse(&packet).unwrap();
                let mut out = vec![];
                let elements = Elementwise {
                    without: [Some(id), None],
                    ..Elementwise::default()
                };
                write(&packet, &header, fields(&header), elements, &mut out);
                assert_eq!(out, before, "id {id}");
            }
        }
    }

    #[test]
    fn elements_are_left_out_and_added() {
        let packet = rtp(&[0xbe, 0xde, 0, 2, 0x41, b'1', b'2', 0x10, 0x85, 0, 0, 0]);
        let header = RtpHeader::parse(&packet).unwrap();
        let mut out = vec![];
        let elements = Elementwise {
            without: [Some(1), None],
            none: false,
            add: Some((1, &[0x07])),
        };
        write(&packet, &header, fields(&header), elements, &mut out);
        let header = RtpHeader::parse(&out).unwrap();
        assert_eq!(header.extension(&out, 4), Some(&b"12"[..]));
        assert_eq!(header.extension(&out, 1), Some(&[0x07][..]));
        let elements = Elementwise {
            none: true,
            ..Elementwise::default()
        };
        write(&packet, &header, fields(&header), elements, &mut out);
        assert_eq!(out, rtp(&[]));
    }

    proptest! {
        #[test]
        fn any_header_is_written_anew(mut bytes in proptest::collection::vec(any::<u8>(), 12..600), id in 1u8..=255) {
            bytes[0] = bytes[0] & 0x3f | 0x80;
            let Some(header) = RtpHeader::parse(&bytes) else { return Ok(()) };
            let mut out = vec![];
            let elements = Elementwise { without: [Some(id), None], none: false, add: Some((id, b"ab")) };
            write(&bytes, &header, fields(&header), elements, &mut out);
            let after = RtpHeader::parse(&out).unwrap();
            prop_assert_eq!(after.header_len, out.len());
            prop_assert_eq!((after.ssrc, after.sequence, after.timestamp), (header.ssrc, header.sequence, header.timestamp));
        }
    }
}
