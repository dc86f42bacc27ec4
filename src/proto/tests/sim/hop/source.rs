//! A speaker: 20 ms Opus packets in talk spurts, DTX between them, RED where wanted.

use crate::net::Rng;

pub(super) const SSRC: u32 = 0x5eed_0001;
pub(super) const OPUS: u8 = 111;
pub(super) const RED: u8 = 63;
pub(super) const LEVEL_ID: u8 = 1;
pub(super) const MID_ID: u8 = 4;

/// An original packet and when it is sent.
#[derive(Debug, Clone)]
pub(super) struct Spoken {
    pub(super) at_ms: u64,
    pub(super) sequence: u16,
    pub(super) timestamp: u32,
    pub(super) marker: bool,
    /// The Opus payload; of RED, the primary's.
    pub(super) media: Vec<u8>,
    pub(super) packet: Vec<u8>,
}

/// The Opus payload of original `sequence`: SILK wideband, 20 ms, mono.
pub(super) fn speech(sequence: u16) -> Vec<u8> {
    let mut media = vec![9 << 3];
    media.extend(sequence.to_be_bytes());
    let mut rng = Rng::new(u64::from(sequence));
    media.extend(rng.bytes(70 + usize::from(sequence % 50)));
    // No zeros at the end: they would not be carried.
    media.push(1);
    media
}

fn dtx() -> Vec<u8> {
    vec![9 << 3, 0x0b, 0xe4]
}

/// So many milliseconds of a call that begins at a random place of the sequence numbers.
pub(super) fn call(ms: u64, red: bool, rng: &mut Rng) -> Vec<Spoken> {
    let first = rng.next().to_le_bytes();
    let mut sequence = u16::from_le_bytes([first[0], first[1]]);
    let mut timestamp = u32::from_le_bytes([first[2], first[3], first[4], first[5]]);
    let mut at_ms = 0;
    let mut spoken: Vec<Spoken> = Vec::new();
    let mut spurt = 0;
    let mut marker = true;
    while at_ms < ms {
        if spurt == 0 {
            // A pause: a DTX packet each 400 ms.
            for pause in 0..rng.below(4) {
                let step = if pause == 0 { 20 } else { 400 };
                at_ms += step;
                timestamp = timestamp.wrapping_add(u32::try_from(step).unwrap() * 48);
                push(&mut spoken, at_ms, sequence, timestamp, false, dtx(), red);
                sequence = sequence.wrapping_add(1);
                marker = true;
            }
            spurt = 20 + rng.below(200);
        }
        at_ms += 20;
        timestamp = timestamp.wrapping_add(960);
        push(
            &mut spoken,
            at_ms,
            sequence,
            timestamp,
            marker,
            speech(sequence),
            red,
        );
        marker = false;
        sequence = sequence.wrapping_add(1);
        spurt -= 1;
    }
    spoken
}

fn push(
    spoken: &mut Vec<Spoken>,
    at_ms: u64,
    sequence: u16,
    timestamp: u32,
    marker: bool,
    media: Vec<u8>,
    red: bool,
) {
    let payload_type = if red { RED } else { OPUS };
    let mut packet = vec![0x90, u8::from(marker) << 7 | payload_type];
    packet.extend(sequence.to_be_bytes());
    packet.extend(timestamp.to_be_bytes());
    packet.extend(SSRC.to_be_bytes());
    if spoken.len() < 40 {
        packet.extend([0xbe, 0xde, 0, 1, LEVEL_ID << 4, 0x85, MID_ID << 4, b'0']);
    } else {
        packet.extend([0xbe, 0xde, 0, 1, LEVEL_ID << 4, 0x85, 0, 0]);
    }
    if red {
        // Chromium's form: the packet before, where it is near enough for 14 bits of ticks.
        let older = spoken
            .last()
            .map(|last| (timestamp.wrapping_sub(last.timestamp), last.media.clone()))
            .filter(|(ticks, _)| *ticks < 1 << 14);
        if let Some((ticks, older)) = &older {
            packet.push(0x80 | OPUS);
            let packed = ticks << 10 | u32::try_from(older.len()).unwrap();
            packet.extend(&packed.to_be_bytes()[1..]);
        }
        packet.push(OPUS);
        packet.extend(older.map(|(_, older)| older).unwrap_or_default());
    }
    packet.extend(&media);
    spoken.push(Spoken {
        at_ms,
        sequence,
        timestamp,
        marker,
        media,
        packet,
    });
}
