//! RED, redundant audio (RFC 2198), as WebRTC clients and LiveKit use it: the primary Opus frame
//! last, older ones before it.

use crate::packet::RtpHeader;

/// Why a RED payload was left as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shed {
    /// Redundancy was dropped; so many bytes became fewer.
    Dropped(usize),
    /// There is only the primary block already.
    PrimaryOnly,
    /// Not readable as RED; passed untouched.
    Malformed,
}

/// Offset of the primary block's header byte and of its data within a RED payload.
fn primary(payload: &[u8]) -> Option<(usize, usize)> {
    let mut at = 0;
    let mut redundant = 0;
    while payload.get(at)? & 0x80 != 0 {
        let header = payload.get(at..at + 4)?;
        redundant += usize::from(u16::from_be_bytes([header[2], header[3]]) & 0x3ff);
        at += 4;
    }
    let data = at + 1 + redundant;
    (data <= payload.len()).then_some((at, data))
}

/// Drops every block but the primary from the RED packet in `packet`. Payload type, sequence
/// number and timestamp stay, so that receivers that are in the middle of a RED stream see a RED
/// stream.
pub fn shed(packet: &mut Vec<u8>, header: &RtpHeader) -> Shed {
    let payload = header.payload(packet);
    let Some((header_at, data_at)) = primary(payload) else {
        return Shed::Malformed;
    };
    if header_at == 0 {
        return Shed::PrimaryOnly;
    }
    // A RED payload that carries only redundancy would become empty: leave it be.
    if data_at == payload.len() {
        return Shed::PrimaryOnly;
    }
    let cut = data_at - 1;
    packet[header.header_len + cut] = packet[header.header_len + header_at];
    packet.copy_within(header.header_len + cut.., header.header_len);
    packet.truncate(packet.len() - cut);
    Shed::Dropped(cut)
}

/// Makes a plain Opus packet a RED packet of payload type `red_pt` that holds only its primary.
pub fn wrap(packet: &mut Vec<u8>, header: &RtpHeader, red_pt: u8) {
    packet.insert(header.header_len, header.payload_type & 0x7f);
    packet[1] = packet[1] & 0x80 | red_pt & 0x7f;
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn rtp(payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x80, 63, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3];
        packet.extend(payload);
        packet
    }

    fn red(old: &[u8], new: &[u8]) -> Vec<u8> {
        let mut payload = vec![0x80 | 111];
        let offset_and_len = 960u32 << 10 | u32::try_from(old.len()).unwrap();
        payload.extend(&offset_and_len.to_be_bytes()[1..]);
        payload.push(111);
        payload.extend(old);
        payload.extend(new);
        rtp(&payload)
    }

    #[test]
    fn shedding_leaves_the_primary_alone() {
        let mut packet = red(b"older", b"primary");
        let header = RtpHeader::parse(&packet).unwrap();
        assert_eq!(shed(&mut packet, &header), Shed::Dropped(9));
        assert_eq!(packet, rtp(b"\x6fprimary"));
        assert_eq!(shed(&mut packet, &header), Shed::PrimaryOnly);
    }

    #[test]
    fn the_silence_that_livekit_injects_stays_as_it_is() {
        let mut packet = rtp(b"\x6f\xf8\xff\xfe\x00\x00");
        let header = RtpHeader::parse(&packet).unwrap();
        assert_eq!(shed(&mut packet, &header), Shed::PrimaryOnly);
        assert_eq!(packet, rtp(b"\x6f\xf8\xff\xfe\x00\x00"));
    }

    #[test]
    fn wrapping_then_reading_gives_the_frame_back() {
        let mut packet = rtp(b"frame");
        packet[1] = 0x80 | 111;
        let header = RtpHeader::parse(&packet).unwrap();
        wrap(&mut packet, &header, 63);
        let header = RtpHeader::parse(&packet).unwrap();
        assert!(header.marker);
        assert_eq!(header.payload_type, 63);
        assert_eq!(header.payload(&packet), b"\x6fframe");
        assert_eq!(shed(&mut packet, &header), Shed::PrimaryOnly);
    }

    proptest! {
        #[test]
        fn any_payload_is_shed_or_left(payload in proptest::collection::vec(any::<u8>(), 0..80)) {
            let mut packet = rtp(&payload);
            let before = packet.clone();
            let header = RtpHeader::parse(&packet).unwrap();
            match shed(&mut packet, &header) {
                Shed::Dropped(cut) => prop_assert_eq!(packet.len() + cut, before.len()),
                _ => prop_assert_eq!(packet, before),
            }
        }
    }
}
