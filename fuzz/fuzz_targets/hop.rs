//! One direction of a relay whose peers hold its keys: streams that are packed, restored, coded anew, wrapped and shed by rules that
//! come and go, framed packets and reports of any content, engine answers of any kind, streams that end and come again. The bytes
//! are a script: a command, then what it needs.
//!
//! Whatever is sent, no framed packet goes on as it is, no number of a stream goes on with two payloads, and what waits is bounded.
#![cfg_attr(fuzzing, no_main)]

use auralink_fuzz::fuzz_target;
use auralink_proto::coding::{Coding, EngineRungs, Job, Outcome, Taken};
use auralink_proto::description::{PackRule, RecodeRule, RestoreRule, TrackRule};
use auralink_proto::flow::Flow;
use auralink_proto::hop::report::{self, Report};
use auralink_proto::hop::{Decoded, Encoded, Refusal};
use auralink_proto::ladder::{CodecId, Rung, Rungs};
use auralink_proto::packet::RtpHeader;
use auralink_proto::relay::Now;
use std::collections::HashMap;
use std::time::{Duration, Instant};

const OPUS: u8 = 111;
const RED: u8 = 63;
/// Header extension id of MID.
const MID: u8 = 3;
/// Streams that are known at a time.
const MOST: usize = 4;

const ENGINE: EngineRungs = EngineRungs {
    encodes: Rungs::ALL,
    decodes: Rungs::ALL,
    ..EngineRungs::NONE
};

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

/// What went out under the leg's keys: the payload of each index (RFC 3711 section 3.3.1).
#[derive(Default)]
struct Wire {
    newest: HashMap<u32, (i64, u16)>,
    payloads: HashMap<(u32, i64), Vec<u8>>,
}

impl Wire {
    fn newest(&self, ssrc: u32) -> Option<u16> {
        self.newest.get(&ssrc).map(|(_, newest)| *newest)
    }

    fn sends(&mut self, packet: &[u8]) {
        let header = RtpHeader::parse(packet).expect("a packet");
        let sequence = header.sequence;
        let (rollovers, newest) = self.newest.entry(header.ssrc).or_insert((0, sequence));
        let ahead = i64::from(sequence.wrapping_sub(*newest).cast_signed());
        let index = *rollovers * 65_536 + i64::from(*newest) + ahead;
        if ahead > 0 {
            (*rollovers, *newest) = (index.div_euclid(65_536), sequence);
        }
        let payload = header.payload(packet).to_vec();
        let first = self
            .payloads
            .entry((header.ssrc, index))
            .or_insert_with(|| payload.clone());
        assert_eq!(
            *first, payload,
            "{} of {} goes on with two payloads",
            index, header.ssrc
        );
    }
}

/// What a sender sends under a number is the same each time: as itself, or in RED.
fn original(ssrc: u32, sequence: u16, mid: Option<u8>) -> Vec<u8> {
    let red = ssrc % 3 == 2;
    let mut packet = vec![0x80, if red { RED } else { OPUS }];
    packet.extend(sequence.to_be_bytes());
    packet.extend((u32::from(sequence) * 960).to_be_bytes());
    packet.extend(ssrc.to_be_bytes());
    if let Some(mid) = mid {
        packet[0] |= 0x10;
        packet.extend([0xbe, 0xde, 0, 1, MID << 4, b'0' + mid, 0, 0]);
    }
    let [hi, lo] = sequence.to_be_bytes();
    if red {
        packet.extend([0x80 | OPUS, 0x0f, 0x00, 4, OPUS, 0x48, hi, lo, 1]);
    }
    packet.push(0x48);
    packet.extend([hi, lo]);
    packet.extend([0x55; 40]);
    packet
}

fn rule(n: u8, how: u8, pt: u8) -> TrackRule {
    TrackRule {
        // The last one is known by its MID only.
        ssrcs: if n < 2 {
            vec![u32::from(n), u32::from(n) + 3]
        } else {
            Vec::new()
        },
        mid: n.to_string(),
        opus_pts: (Some(OPUS), Some(RED)),
        wrap_red: (how & 1 != 0).then_some((OPUS, RED)),
        shed_red: (how & 2 != 0).then_some(RED),
        shed_always: how & 4 != 0,
        pack: (how & 8 != 0).then_some(PackRule {
            pt: 35,
            rungs: Rungs::ALL,
            short_headers: how & 32 != 0,
            more_units: how & 32 != 0,
            models: None,
            rung: Rung::L4,
            hint_id: 5,
            level_id: None,
        }),
        restore: (how & 16 != 0).then_some(RestoreRule {
            pt,
            models: None,
            hint_id: 5,
            level_id: None,
        }),
        recode: (how & 32 != 0).then_some(RecodeRule {
            rung: (how & 64 != 0).then_some(Rung::L4),
            key: None,
            lossy_only: how & 128 != 0,
        }),
        ..TrackRule::default()
    }
}

fn run(data: &[u8]) -> Option<()> {
    let mut script = Script(data);
    let start = Instant::now();
    let mut ms = 0u64;
    let mut coding = Coding::new(1 << 16, MOST, ENGINE);
    let mut flow = Flow::default();
    let (mut wire, mut out) = (Wire::default(), Vec::new());
    let mut numbers: HashMap<u32, u16> = HashMap::new();
    let (mut framed, mut told) = (Vec::new(), None);
    let mut asked: Vec<Job> = Vec::new();
    loop {
        let now = Now {
            instant: start + Duration::from_millis(ms),
            ntp: (ms * 65_536 / 1000) as u32,
        };
        match script.byte()? & 15 {
            kind @ 0..=6 => {
                let which = script.byte()?;
                let ssrc = u32::from(which & 7);
                let step = script.byte()?;
                let next = numbers
                    .entry(ssrc | u32::from(kind > 4) << 8)
                    .or_insert(u16::MAX - 20);
                let ahead = match step {
                    0..=199 => u16::from(step % 4),
                    200..=250 => u16::from(step - 199).wrapping_neg(),
                    _ => 300 * u16::from(step - 250),
                };
                *next = next.wrapping_add(ahead);
                let mid = (which & 8 != 0).then_some(which >> 4 & 3);
                let mut packet = original(ssrc, *next, mid);
                if kind > 4 {
                    let header = RtpHeader::parse(&packet)?.header_len;
                    packet.truncate(header);
                    packet[1] = if which & 128 != 0 { 20 } else { 21 };
                    packet.extend(script.bytes()?);
                }
                let taken = coding.take(now, &packet, packet.len(), |ssrc| wire.newest(ssrc));
                if taken == Taken::Not {
                    let pt = packet[1] & 0x7f;
                    assert!(!framed.contains(&pt), "a framed packet goes on as it is");
                    assert!(told != Some(pt), "a framed packet goes on as it is");
                    // What isn't framed to anybody yet isn't the hop's: such a peer sends nonsense, and its numbers with it.
                    if kind <= 4
                        && flow
                            .apply(&mut packet, 60, now.ntp, |ssrc| wire.newest(ssrc))
                            .is_some()
                    {
                        wire.sends(&packet);
                    }
                }
            }
            7 => {
                let pt = 20 + (script.byte()? & 1);
                let mut rules = Vec::new();
                for n in 0..3 {
                    match script.byte()? {
                        0 => {}
                        how => rules.push(rule(n, how, pt)),
                    }
                }
                coding.set_rules(now.instant, &rules, Some(MID));
                flow.set_rules(&rules, Some(MID));
                framed = rules
                    .iter()
                    .filter_map(|rule| rule.restore)
                    .map(|r| r.pt)
                    .collect();
            }
            8 => {
                told = [None, Some(20), Some(21)][usize::from(script.byte()? % 3)];
                coding.set_told(told);
            }
            9 | 10 => {
                let how = script.byte()?;
                if asked.is_empty() {
                    continue;
                }
                let at = usize::from(how) % asked.len();
                let payload = |len: usize| {
                    let mut opus = vec![0x48, how];
                    opus.resize(len, how);
                    opus
                };
                let outcome = match asked.remove(at) {
                    Job::Encode(track, job) if how & 3 != 0 => {
                        let encoded = Encoded {
                            codec: CodecId::Opus,
                            payload: payload(9),
                            gain: 0,
                            unit_ms: job.unit_ms,
                            voice: true,
                            rung: job.rung,
                        };
                        Outcome::Encoded(track, job.id, encoded)
                    }
                    Job::Encode(track, job) => Outcome::Refused(track, job.id, Refusal::Stereo),
                    Job::Decode(track, job) if how & 3 != 0 => {
                        let count = usize::from(job.count);
                        let decoded = Decoded {
                            packets: vec![payload(20); count],
                            levels: vec![30; count],
                            voice: true,
                        };
                        Outcome::Decoded(track, job.id, decoded)
                    }
                    Job::Decode(track, job) if how & 4 != 0 => Outcome::Hangs(track, job.id),
                    Job::Decode(track, job) => Outcome::Failed(track, job.id),
                    Job::Recode(track, job) if how & 3 != 0 => {
                        Outcome::Recoded(track, job.id, payload(12))
                    }
                    Job::Recode(track, job) => Outcome::Refused(track, job.id, Refusal::Busy),
                    Job::Close(..) => continue,
                };
                coding.outcome(now, outcome);
            }
            11 => {
                let byte = script.byte()?;
                // Up to 30 ms, or as long as it takes to be forgotten.
                ms += u64::from(byte & 31) + if byte > 250 { 61_000 } else { 0 };
            }
            12 => {
                let bytes = script.bytes()?;
                coding.report(now, bytes);
                coding.goodbyes(bytes);
            }
            13 => {
                let ssrc = u32::from(script.byte()? & 7);
                let mut rtcp = Vec::new();
                let report = Report {
                    ssrc,
                    fraction_lost: script.byte()?,
                    fraction_missing: 0,
                    rungs: if script.byte()? & 3 == 0 {
                        Rungs::NONE
                    } else {
                        Rungs::ALL
                    },
                    highest: u16::from(script.byte()?).wrapping_sub(64),
                    jitter: 0,
                    ratio: 9,
                    unrestored: u16::from(script.byte()? & 31),
                };
                report::write(1, &[report], &mut rtcp);
                coding.report(now, &rtcp);
                coding.loss(now.instant, ssrc, report.fraction_lost);
                flow.report(ssrc, report.fraction_lost);
            }
            14 => {
                let able = script.byte()? & 1 != 0;
                let engine = if able { ENGINE } else { EngineRungs::NONE };
                coding.set_engine(now.instant, engine);
            }
            _ => coding.goodbyes(&[0x81, 203, 0, 1, 0, 0, 0, script.byte()? & 7]),
        }
        let now = Now {
            instant: start + Duration::from_millis(ms),
            ..now
        };
        if coding.poll_timeout().is_some_and(|due| due <= now.instant) {
            coding.handle_timeout(now);
            let due = coding.poll_timeout();
            assert!(
                due.is_none_or(|due| due > now.instant),
                "what is due is done"
            );
        }
        let mut jobs = 0;
        while let Some(job) = coding.poll_job() {
            jobs += 1;
            asked.push(job);
        }
        assert!(jobs <= 1024, "{jobs} jobs");
        let newest = asked.len().saturating_sub(200);
        asked.drain(..newest);
        let mut packets = 0;
        while coding.poll_packet(now, &mut out).is_some() {
            packets += 1;
            let pt = out[1] & 0x7f;
            if matches!(pt, 20 | 21) {
                // As above: not framed to anybody.
                assert!(!framed.contains(&pt) && told != Some(pt));
                continue;
            }
            let framed = pt == 35;
            if framed
                || flow
                    .apply(&mut out, 60, now.ntp, |ssrc| wire.newest(ssrc))
                    .is_some()
            {
                wire.sends(&out);
            }
        }
        assert!(packets <= 1024, "{packets} packets");
        assert!(coding.in_use().1 <= MOST);
        coding.poll_report(&mut out);
    }
}

fuzz_target!(|data: &[u8]| {
    let _ = run(data);
});
