//! Single behaviours of both ends; whole calls over a lossy network are in `tests/sim/hop`.
#![allow(clippy::unwrap_used, clippy::panic, clippy::disallowed_methods)]

mod pack;
mod recode;
mod restore;
mod spec;

use super::{
    DecodeJob, Decoded, EncodeJob, Encoded, PackTiming, Packer, PackerConfig, Redundancy,
    RestoreTiming, Restorer, RestorerConfig,
};
use crate::ladder::{CodecId, Frames, Rung, Rungs};
use std::time::{Duration, Instant};

const OPUS: u8 = 111;
const RED: u8 = 63;
const AIC: u8 = 35;
const HINT: u8 = 5;
const LEVEL: u8 = 1;

/// A clock that is told what time it is.
#[derive(Clone, Copy)]
struct Clock(Instant);

impl Clock {
    fn new() -> Self {
        Self(Instant::now())
    }

    fn at(self, ms: u64) -> Instant {
        self.0 + Duration::from_millis(ms)
    }
}

fn packer(rung: Rung) -> Packer {
    packer_from(rung, 1000)
}

fn packer_from(rung: Rung, first_sequence: u16) -> Packer {
    let mut packer = Packer::new(config(first_sequence));
    packer.set_rung(rung);
    packer
}

/// What an older AuraLink at the other end takes.
fn config(first_sequence: u16) -> PackerConfig {
    PackerConfig {
        opus_pt: OPUS,
        red_pt: Some(RED),
        aic_pt: AIC,
        hint_id: Some(HINT),
        level_id: Some(LEVEL),
        first_sequence,
        peer_rungs: Rungs::ALL,
        short_headers: false,
        more_units: false,
        redundancy: Redundancy::Never,
        timing: PackTiming::default(),
    }
}

fn restorer() -> Restorer {
    Restorer::new(RestorerConfig {
        opus_pt: OPUS,
        red_pt: Some(RED),
        hint_id: Some(HINT),
        level_id: Some(LEVEL),
        rungs: Rungs::ALL,
        timing: RestoreTiming::default(),
    })
}

fn rtp(payload_type: u8, sequence: u16, timestamp: u32, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x80, payload_type];
    packet.extend(sequence.to_be_bytes());
    packet.extend(timestamp.to_be_bytes());
    packet.extend([0, 0, 0, 7]);
    packet.extend(payload);
    packet
}

/// Speech of 20 ms: number `n` of a stream.
fn speech(n: u16) -> Vec<u8> {
    rtp(OPUS, n, u32::from(n) * 960, &[0x48; 60])
}

fn lyra6(job: &EncodeJob) -> Encoded {
    Encoded {
        codec: CodecId::Lyra6,
        payload: vec![6; 15 * job.packets.len()],
        gain: 3,
        unit_ms: 20,
        voice: true,
        rung: Rung::L2,
    }
}

fn opus(job: &DecodeJob) -> Decoded {
    Decoded {
        packets: vec![vec![0x48, 1]; usize::from(job.count)],
        levels: vec![30; usize::from(job.count)],
        voice: true,
    }
}

/// Everything that a packer has ready.
fn sent(packer: &mut Packer) -> Vec<Vec<u8>> {
    let mut out = Vec::new();
    let mut packets = Vec::new();
    while packer.poll_packet(0, &mut out).is_some() {
        packets.push(out.clone());
    }
    packets
}

/// Sequence numbers of everything that a restorer has ready.
fn heard(restorer: &mut Restorer) -> Vec<u16> {
    let mut out = Vec::new();
    let mut heard = Vec::new();
    while restorer.poll_packet(&mut out).is_some() {
        heard.push(u16::from_be_bytes([out[2], out[3]]));
    }
    heard
}
