//! What a datagram is (RFC 7983), and RTP headers read and edited in place (RFC 3550, RFC 8285).

/// What the first bytes of a datagram on a muxed port say it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// STUN, first byte 0..=3.
    Stun,
    /// DTLS, first byte 20..=63.
    Dtls,
    /// RTP, first byte 128..=191 and no RTCP packet type behind it.
    Rtp,
    /// RTCP: second byte 192..=223 (RFC 5761 section 4).
    Rtcp,
    /// Nothing that belongs here.
    Other,
}

/// Classifies a datagram by RFC 7983 and, between RTP and RTCP, RFC 5761.
#[must_use]
pub fn classify(datagram: &[u8]) -> Kind {
    match datagram {
        [0..=3, ..] => Kind::Stun,
        [20..=63, ..] => Kind::Dtls,
        [128..=191, 192..=223, ..] => Kind::Rtcp,
        [128..=191, _, ..] => Kind::Rtp,
        _ => Kind::Other,
    }
}

/// The fixed part of an RTP header and where its variable parts lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RtpHeader {
    /// Payload type, 7 bits.
    pub payload_type: u8,
    /// The marker bit.
    pub marker: bool,
    /// Sequence number.
    pub sequence: u16,
    /// Timestamp in units of the payload's clock.
    pub timestamp: u32,
    /// Synchronisation source.
    pub ssrc: u32,
    /// Bytes before the payload: fixed header, CSRCs and header extension.
    pub header_len: usize,
    /// Offset of the header extension's four-byte prefix, if there is an extension.
    pub extension_at: Option<usize>,
    /// Bytes of padding at the end (the P bit), its count byte included.
    pub padding: usize,
}

impl RtpHeader {
    /// Reads the header of a decrypted RTP packet; `None` where lengths don't add up (RFC 3550 appendix A.1).
    #[must_use]
    pub fn parse(packet: &[u8]) -> Option<Self> {
        let mut header = Self::parse_protected(packet)?;
        header.padding = header.padded(packet)?;
        Some(header)
    }

    /// Reads the header of an RTP packet that is encrypted, and its padding with it: the header never is, and ends where its
    /// lengths say, whatever the elements of its extension say of theirs.
    #[must_use]
    pub fn parse_protected(packet: &[u8]) -> Option<Self> {
        let fixed: &[u8; 12] = packet.first_chunk()?;
        if fixed[0] >> 6 != 2 {
            return None;
        }
        let mut header_len = 12 + 4 * usize::from(fixed[0] & 0x0f);
        let mut extension_at = None;
        if fixed[0] & 0x10 != 0 {
            extension_at = Some(header_len);
            let words = packet.get(header_len + 2..header_len + 4)?;
            header_len += 4 + 4 * usize::from(u16::from_be_bytes([words[0], words[1]]));
        }
        if header_len > packet.len() {
            return None;
        }
        Some(Self {
            payload_type: fixed[1] & 0x7f,
            marker: fixed[1] & 0x80 != 0,
            sequence: u16::from_be_bytes([fixed[2], fixed[3]]),
            timestamp: u32::from_be_bytes([fixed[4], fixed[5], fixed[6], fixed[7]]),
            ssrc: u32::from_be_bytes([fixed[8], fixed[9], fixed[10], fixed[11]]),
            header_len,
            extension_at,
            padding: 0,
        })
    }

    /// Bytes of padding of a decrypted packet with this header; `None` where it says that there is some and its count can't be.
    #[must_use]
    pub fn padded(&self, packet: &[u8]) -> Option<usize> {
        if packet.first()? & 0x20 == 0 {
            return Some(0);
        }
        let count = usize::from(*packet.last()?);
        (count > 0 && self.header_len + count <= packet.len()).then_some(count)
    }

    /// The payload without padding.
    #[must_use]
    pub fn payload<'a>(&self, packet: &'a [u8]) -> &'a [u8] {
        packet
            .get(self.header_len..packet.len().saturating_sub(self.padding))
            .unwrap_or_default()
    }

    /// The data of header extension element `id`, one-byte or two-byte form.
    #[must_use]
    pub fn extension<'a>(&self, packet: &'a [u8], id: u8) -> Option<&'a [u8]> {
        let at = self.extension_at?;
        let body = packet.get(at + 4..self.header_len)?;
        let profile = u16::from_be_bytes([packet[at], packet[at + 1]]);
        Elements::new(profile, body)?.find_map(|(found, data)| (found == id).then_some(data))
    }
}

/// `0xBEDE`: one-byte header extension elements (RFC 8285 section 4.2).
pub(crate) const ONE_BYTE: u16 = 0xbede;

/// Two-byte header extension elements (RFC 8285 section 4.3), application bits ignored.
fn is_two_byte(profile: u16) -> bool {
    profile & 0xfff0 == 0x1000
}

/// Iterates over header extension elements as `(id, data)`; stops at what cannot be read.
pub(crate) struct Elements<'a> {
    two_byte: bool,
    rest: &'a [u8],
}

impl<'a> Elements<'a> {
    pub(crate) fn new(profile: u16, body: &'a [u8]) -> Option<Self> {
        let two_byte = is_two_byte(profile);
        (two_byte || profile == ONE_BYTE).then_some(Self {
            two_byte,
            rest: body,
        })
    }
}

impl<'a> Iterator for Elements<'a> {
    type Item = (u8, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        while let [0, rest @ ..] = self.rest {
            self.rest = rest;
        }
        let (id, len, rest) = if self.two_byte {
            let [id, len, rest @ ..] = self.rest else {
                return None;
            };
            (*id, usize::from(*len), rest)
        } else {
            let [head, rest @ ..] = self.rest else {
                return None;
            };
            // Id 15, or 0 with a length, ends the processing of one-byte elements (RFC 8285
            // section 4.2).
            if matches!(head >> 4, 0 | 15) {
                return None;
            }
            (head >> 4, usize::from(head & 0x0f) + 1, rest)
        };
        let data = rest.get(..len)?;
        self.rest = &rest[len..];
        Some((id, data))
    }
}

/// Appends one element to the header extension of the RTP packet in `packet`, creating the
/// extension or turning one-byte elements into two-byte ones where `id` or the data's length
/// needs it (`extmap-allow-mixed` has to be negotiated for ids above 14). Returns `false`, with
/// the packet untouched, where the packet's extension cannot be extended. Needs no allocation
/// while the packet's capacity suffices.
pub fn append_extension(packet: &mut Vec<u8>, header: &RtpHeader, id: u8, data: &[u8]) -> bool {
    let Ok(len) = u8::try_from(data.len()) else {
        return false;
    };
    if id == 0 {
        return false;
    }
    let fits_one_byte = id <= 14 && (1..=16).contains(&len);
    let mut body = [0u8; 256];
    let mut used = 0;
    let mut push = |id: u8, data: &[u8], two_byte: bool| -> bool {
        let head = if two_byte { 2 } else { 1 };
        let Some(room) = body.get_mut(used..used + head + data.len()) else {
            return false;
        };
        // Lengths were checked by the caller or read from the same form.
        let len = u8::try_from(data.len()).unwrap_or(u8::MAX);
        if two_byte {
            room[0] = id;
            room[1] = len;
        } else {
            room[0] = id << 4 | len.wrapping_sub(1) & 0x0f;
        }
        room[head..].copy_from_slice(data);
        used += room.len();
        true
    };
    let (at, two_byte) = match header.extension_at {
        None => {
            let two_byte = !fits_one_byte;
            if !push(id, data, two_byte) {
                return false;
            }
            (header.header_len, two_byte)
        }
        Some(at) => {
            let Some(prefix) = packet.get(at..at + 4) else {
                return false;
            };
            let profile = u16::from_be_bytes([prefix[0], prefix[1]]);
            let two_byte = !fits_one_byte || is_two_byte(profile);
            let Some(elements) = Elements::new(
                profile,
                packet.get(at + 4..header.header_len).unwrap_or_default(),
            ) else {
                return false;
            };
            for (id, data) in elements {
                if !push(id, data, two_byte) {
                    return false;
                }
            }
            if !push(id, data, two_byte) {
                return false;
            }
            (at, two_byte)
        }
    };
    let used = used.next_multiple_of(4);
    let profile = if two_byte { 0x1000 } else { ONE_BYTE };
    let words = u16::try_from(used / 4).unwrap_or(u16::MAX);
    let old = header.header_len - at;
    let new = used + 4;
    let tail = packet.len();
    if new >= old {
        packet.resize(tail + (new - old), 0);
        packet.copy_within(header.header_len..tail, at + new);
    } else {
        packet.copy_within(header.header_len..tail, at + new);
        packet.truncate(tail - (old - new));
    }
    packet[0] |= 0x10;
    packet[at..at + 2].copy_from_slice(&u16::to_be_bytes(profile));
    packet[at + 2..at + 4].copy_from_slice(&u16::to_be_bytes(words));
    packet[at + 4..at + 4 + used].copy_from_slice(&body[..used]);
    true
}

/// Calls `f(source SSRC, fraction lost)` for each report block of a compound RTCP packet
/// (RFC 3550 section 6.4); the fraction is in 1/256. Unreadable rests are ignored.
pub fn report_blocks(compound: &[u8], mut f: impl FnMut(u32, u8)) {
    let mut rest = compound;
    while let [first, packet_type, l1, l2, ..] = *rest {
        let len = 4 * (usize::from(u16::from_be_bytes([l1, l2])) + 1);
        let Some(packet) = rest.get(..len) else {
            return;
        };
        rest = &rest[len..];
        let blocks_at = match packet_type {
            200 => 28, // SR: sender info before the blocks
            201 => 8,  // RR
            _ => continue,
        };
        let blocks = packet.get(blocks_at..).unwrap_or_default();
        for block in blocks.chunks_exact(24).take(usize::from(first & 0x1f)) {
            f(
                u32::from_be_bytes([block[0], block[1], block[2], block[3]]),
                block[4],
            );
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn packet(extension: Option<(u16, &[u8])>, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x80, 111, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3];
        if let Some((profile, body)) = extension {
            packet[0] |= 0x10;
            packet.extend(profile.to_be_bytes());
            packet.extend(u16::try_from(body.len() / 4).unwrap().to_be_bytes());
            packet.extend(body);
        }
        packet.extend(payload);
        packet
    }

    #[test]
    fn demux_follows_rfc_7983() {
        assert_eq!(classify(&[]), Kind::Other);
        assert_eq!(classify(&[0, 1]), Kind::Stun);
        assert_eq!(classify(&[22, 254, 253]), Kind::Dtls);
        assert_eq!(classify(&[0x80, 111]), Kind::Rtp);
        assert_eq!(classify(&[0x80, 0x80 | 111]), Kind::Rtp);
        assert_eq!(classify(&[0x81, 201]), Kind::Rtcp);
        assert_eq!(classify(&[200]), Kind::Other);
    }

    #[test]
    fn an_extension_is_created_where_there_was_none() {
        let mut p = packet(None, b"voice");
        let header = RtpHeader::parse(&p).unwrap();
        assert!(append_extension(&mut p, &header, 3, b"abcdefg"));
        let after = RtpHeader::parse(&p).unwrap();
        assert_eq!(after.extension(&p, 3).unwrap(), b"abcdefg");
        assert_eq!(after.payload(&p), b"voice");
    }

    #[test]
    fn one_byte_elements_become_two_byte_ones_for_a_high_id() {
        let mut p = packet(
            Some((ONE_BYTE, &[0x10, 0x55, 0x41, b'1', b'2', 0, 0, 0])),
            b"voice",
        );
        let header = RtpHeader::parse(&p).unwrap();
        assert_eq!(header.extension(&p, 4).unwrap(), b"12");
        assert!(append_extension(&mut p, &header, 16, b"abcdefg"));
        let after = RtpHeader::parse(&p).unwrap();
        assert_eq!(after.extension(&p, 1).unwrap(), &[0x55]);
        assert_eq!(after.extension(&p, 4).unwrap(), b"12");
        assert_eq!(after.extension(&p, 16).unwrap(), b"abcdefg");
        assert_eq!(after.payload(&p), b"voice");
    }

    #[test]
    fn report_blocks_of_a_compound_are_found() {
        let mut compound = vec![0x81, 201, 0, 7, 0, 0, 0, 1];
        compound.extend([0, 0, 0, 9, 13, 0, 0, 0]);
        compound.extend([0; 16]);
        compound.extend([0x80, 202, 0, 0]);
        let mut seen = vec![];
        report_blocks(&compound, |ssrc, lost| seen.push((ssrc, lost)));
        assert_eq!(seen, [(9, 13)]);
    }

    proptest! {
        #[test]
        fn garbage_never_panics(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), id in 0u8..=255) {
            let _ = classify(&bytes);
            report_blocks(&bytes, |_, _| {});
            if let Some(first) = bytes.first_mut() { *first = *first & 0x3f | 0x80; }
            if let Some(header) = RtpHeader::parse(&bytes) {
                let payload = header.payload(&bytes).to_vec();
                let _ = header.extension(&bytes, id);
                if append_extension(&mut bytes, &header, id, b"1234567") {
                    let after = RtpHeader::parse(&bytes).unwrap();
                    prop_assert_eq!(after.payload(&bytes), &payload[..]);
                }
            }
        }
    }
}
