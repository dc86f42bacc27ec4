//! The hop of AIC: framed payloads, a packer and a restorer fed with any packets at any time, engine
//! answers of any kind, and reports. The bytes are a script: a command, then what it needs.
#![cfg_attr(fuzzing, no_main)]

use auralink_fuzz::fuzz_target;
use auralink_proto::aic::payload::Payload;
use auralink_proto::hop::{
    Anchors, Decoded, Encoded, PackTiming, Packer, PackerConfig, Redundancy, Refusal,
    RestoreTiming, Restorer, RestorerConfig, report,
};
use auralink_proto::ladder::{CodecId, Frames, Rung, Rungs};
use auralink_proto::packet::RtpHeader;
use std::time::{Duration, Instant};

struct Script<'a>(&'a [u8]);

impl<'a> Script<'a> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn bytes(&mut self) -> Option<&'a [u8]> {
        let len = usize::from(self.byte()?).min(self.0.len());
        let (bytes, rest) = self.0.split_at(len);
        self.0 = rest;
        Some(bytes)
    }
}

/// An RTP packet of which the script says the rest; most are near enough to the last to be of use.
fn rtp(script: &mut Script<'_>, payload_type: u8, last: &mut (u16, u32)) -> Option<Vec<u8>> {
    let step = script.byte()?;
    let first = script.byte()?;
    let ahead = u16::from(step & 7).wrapping_sub(1);
    last.0 = last.0.wrapping_add(ahead);
    last.1 = last
        .1
        .wrapping_add(u32::from(ahead) * 960 + u32::from(step >> 5));
    let mut packet = vec![0x80 | first & 0x1f, payload_type | first & 0x80];
    packet.extend(last.0.to_be_bytes());
    packet.extend(last.1.to_be_bytes());
    packet.extend([0, 0, 0, 7]);
    packet.extend(script.bytes()?);
    Some(packet)
}

fn run(data: &[u8]) -> Option<()> {
    let mut script = Script(data);
    let flags = script.byte()?;
    // Lyra's frames, or those of another bundle.
    let frames = if flags & 128 != 0 {
        Frames::new(1920, 16, 30).expect("frames")
    } else {
        Frames::LYRA
    };
    let start = Instant::now();
    let mut ms = 0u64;
    let mut packer = Packer::new(PackerConfig {
        opus_pt: 111,
        red_pt: (flags & 1 != 0).then_some(63),
        aic_pt: 35,
        hint_id: (flags & 2 != 0).then_some(if flags & 4 != 0 { 5 } else { 16 }),
        level_id: (flags & 8 != 0).then_some(1),
        first_sequence: u16::MAX - 3,
        peer_rungs: Rungs::ALL,
        short_headers: flags & 1 == 0,
        more_units: flags & 1 == 0,
        redundancy: if flags & 16 != 0 {
            Redundancy::Always {
                distance: flags >> 5,
            }
        } else {
            Redundancy::default()
        },
        timing: PackTiming::default(),
    });
    packer.set_rung(Rung::L2);
    packer.set_frames(frames);
    let mut restorer = Restorer::new(RestorerConfig {
        opus_pt: 111,
        red_pt: (flags & 32 != 0).then_some(63),
        hint_id: (flags & 2 != 0).then_some(if flags & 4 != 0 { 5 } else { 16 }),
        level_id: (flags & 64 != 0).then_some(1),
        rungs: Rungs::ALL,
        timing: RestoreTiming::default(),
    });
    restorer.set_frames(frames);
    let (mut original, mut framed) = ((9, 9), (u16::MAX - 3, 9));
    let (mut anchors, mut out) = (Anchors::default(), Vec::new());
    loop {
        let now = start + Duration::from_millis(ms);
        match script.byte()? & 15 {
            0..=2 => {
                let packet = rtp(&mut script, 111, &mut original)?;
                packer.take(now, &packet, packet.len());
            }
            3 => {
                let packet = rtp(&mut script, 63, &mut original)?;
                packer.take(now, &packet, packet.len());
            }
            4 | 5 => {
                let packet = rtp(&mut script, 35, &mut framed)?;
                if let Some(header) = RtpHeader::parse(&packet)
                    && let Ok(payload) = Payload::parse(header.payload(&packet), frames)
                {
                    let mut again = Vec::new();
                    let copy = payload.redundant.as_ref();
                    payload
                        .part
                        .write(copy, frames, &mut again)
                        .expect("it was read");
                }
                restorer.take(now, 0, &packet, packet.len());
            }
            6 => {
                let bytes = script.bytes()?;
                packer.take(now, bytes, bytes.len());
                restorer.take(now, 0, bytes, bytes.len());
            }
            7 => {
                let bytes = script.bytes()?;
                let mut rest = bytes.to_vec();
                report::take_out(&mut rest);
                assert!(!report::is_in(&rest));
                report::read(bytes, |report| packer.report(now, &report));
            }
            8 | 9 => {
                if let Some(job) = packer.poll_job() {
                    let how = script.byte()?;
                    let frames = job.packets.len();
                    let encoded = Encoded {
                        codec: CodecId::from_wire(how & 7).unwrap_or(CodecId::Lyra6),
                        payload: vec![how; [15, 8, 60, 0][usize::from(how >> 6)] * frames],
                        gain: how.cast_signed() >> 3,
                        unit_ms: if how & 8 != 0 { 40 } else { 20 },
                        voice: true,
                        rung: job.rung,
                    };
                    packer.encoded(now, job.id, encoded);
                }
            }
            10 => {
                let id = u64::from(script.byte()?);
                packer.refused(now, id, Refusal::Undecodable);
                restorer.failed(now, id);
            }
            11 | 12 => {
                if let Some(job) = restorer.poll_job() {
                    assert!((1..=4).contains(&job.count));
                    let count = usize::from(job.count) + usize::from(script.byte()? == 9);
                    let decoded = Decoded {
                        packets: vec![vec![0x48, 1, 2]; count],
                        levels: vec![200; count],
                        voice: true,
                    };
                    restorer.decoded(now, job.id, decoded);
                }
            }
            // Everything that is framed goes over the hop, or every second one does.
            13 => {
                let keep = script.byte()?;
                let mut at = 0u32;
                while packer.poll_packet(0, &mut out).is_some() {
                    let header = RtpHeader::parse(&out).expect("a packet");
                    let position = (header.sequence, header.timestamp);
                    anchors
                        .read(position, header.payload(&out), frames)
                        .expect("a payload of ours");
                    if keep >> (at % 8) & 1 != 0 {
                        restorer.take(now, 0, &out, out.len());
                    }
                    at += 1;
                    assert!(at <= 192, "bounded");
                }
            }
            14 => ms += u64::from(script.byte()?),
            _ => {
                packer.handle_timeout(now);
                restorer.handle_timeout(now);
                if let Some(due) = packer.poll_timeout() {
                    assert!(due > now, "a timeout that is handled is over");
                }
                if let Some(report) = restorer.poll_report(now) {
                    let mut rtcp = Vec::new();
                    report::write(1, &[report], &mut rtcp);
                    report::read(&rtcp, |read| assert_eq!(read, report));
                }
                if let Some(due) = restorer.poll_timeout() {
                    assert!(due > now, "a timeout that is handled is over");
                }
            }
        }
        let mut polled = 0;
        while restorer.poll_packet(&mut out).is_some() {
            let header = RtpHeader::parse(&out).expect("a packet");
            assert!(header.payload(&out).len() <= 4000);
            polled += 1;
            assert!(polled <= 256, "bounded");
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let _ = run(data);
});
