//! What a listener hears where speech changes from its originals to coded speech and back, through both ends of a hop with
//! real codecs, and a decoder that plays all of it as a stock client's does.

use std::time::{Duration, Instant};

use auralink_proto::hop::{
    Decoded, Encoded, PackTiming, Packer, PackerConfig, Redundancy, Refusal, RestoreTiming,
    Restorer, RestorerConfig,
};
use auralink_proto::ladder::{Rung, Rungs};
use auralink_proto::packet::RtpHeader;

use super::call::{config, next, port};
use crate::opus::{Decoder, Enhancement};
use crate::testing::{client, packets_of};
use crate::{Decode, Encode, Engine, Job, Outcome, Port, Skipped};

const LONG: Duration = Duration::from_secs(10);
const OPUS: u8 = 111;
/// What the listener's decoder runs at.
const RATE: usize = 48_000;

/// What happens to an original of 20 ms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    /// It goes at this rung; native: as it came.
    At(Rung),
    /// Coded, but the result comes too late.
    Late,
}

/// Both ends of the hop; the engine is asked at once, whatever it takes.
struct Hop {
    packer: Packer,
    restorer: Restorer,
    codecs: Port,
    start: Instant,
    /// The codecs are told of what was skipped.
    tells: bool,
}

impl Hop {
    fn new(codecs: Port, tells: bool) -> Self {
        Self {
            packer: Packer::new(PackerConfig {
                opus_pt: OPUS,
                red_pt: None,
                aic_pt: 35,
                hint_id: Some(5),
                level_id: None,
                first_sequence: 1,
                peer_rungs: Rungs::ALL,
                short_headers: true,
                more_units: true,
                redundancy: Redundancy::Never,
                timing: PackTiming::default(),
            }),
            restorer: Restorer::new(RestorerConfig {
                opus_pt: OPUS,
                red_pt: None,
                hint_id: Some(5),
                level_id: None,
                rungs: Rungs::ALL,
                timing: RestoreTiming::default(),
            }),
            codecs,
            tells,
            start: Instant::now(),
        }
    }

    fn ask(&self, job: Job) -> Outcome {
        self.codecs.try_send(job).unwrap();
        next(&self.codecs, LONG)
    }

    fn encode(&mut self, now: Instant, late: bool) {
        while let Some(job) = self.packer.poll_job() {
            let skipped = job.skipped.into_iter().filter(|_| self.tells);
            let skipped = skipped.map(|one| Skipped {
                job: one.job,
                payload: one.payload,
            });
            let outcome = self.ask(Job::Encode(Encode {
                track: 1,
                id: job.id,
                rung: job.rung,
                packets: job.packets,
                lost_before: job.lost_before,
                skipped: skipped.collect(),
            }));
            if late {
                self.packer.handle_timeout(now + Duration::from_millis(20));
            }
            match outcome {
                Outcome::Encoded(done) => self.packer.encoded(
                    now,
                    done.id,
                    Encoded {
                        codec: done.codec,
                        payload: done.payload,
                        gain: done.gain,
                        unit_ms: done.unit_ms,
                        voice: done.voice,
                        rung: done.rung,
                    },
                ),
                Outcome::Refused { id, .. } => self.packer.refused(now, id, Refusal::Failed),
                other => panic!("{other:?}"),
            }
        }
    }

    fn decode(&mut self, now: Instant) {
        while let Some(job) = self.restorer.poll_job() {
            let outcome = self.ask(Job::Decode(Decode {
                track: 1,
                id: job.id,
                codec: job.codec,
                payload: job.payload,
                gain: job.gain,
                unit_ms: job.unit_ms,
                count: job.count,
                lost: job.lost,
                skipped: if self.tells { job.skipped } else { Vec::new() },
            }));
            let Outcome::Decoded(done) = outcome else {
                panic!("{outcome:?}");
            };
            let decoded = Decoded {
                packets: done.packets,
                levels: done.levels,
                voice: done.voice,
            };
            self.restorer.decoded(now, done.id, decoded);
        }
    }
}

/// What a listener hears of these packets of 20 ms, at 48 kHz, and how many of them went as they came.
fn heard(packets: &[Vec<u8>], tells: bool, how: impl Fn(usize) -> How) -> (Vec<f32>, usize) {
    let engine = Engine::start(config()).unwrap();
    let (codecs, _) = port(&engine);
    let mut hop = Hop::new(codecs, tells);
    let mut listener = Decoder::at(RATE, Enhancement::None).unwrap();
    let (mut sound, mut out, mut expected, mut natives) = (Vec::new(), Vec::new(), 0u16, 0);
    let mut play = |restorer: &mut Restorer| {
        let mut out = Vec::new();
        while let Some(restored) = restorer.poll_packet(&mut out) {
            let header = RtpHeader::parse(&out).unwrap();
            assert_eq!(header.sequence, expected, "in order, and none is missing");
            expected += 1;
            natives += usize::from(restored.native);
            listener.decode(header.payload(&out), &mut sound).unwrap();
        }
    };
    for (n, payload) in packets.iter().enumerate() {
        let now = hop.start + Duration::from_millis(20 * n as u64);
        let (rung, late) = match how(n) {
            How::At(rung) => (rung, false),
            How::Late => (Rung::L4, true),
        };
        hop.packer.set_rung(rung);
        let mut packet = vec![0x80, OPUS];
        packet.extend((n as u16).to_be_bytes());
        packet.extend((n as u32 * 960).to_be_bytes());
        packet.extend([0, 0, 0, 7]);
        packet.extend(payload);
        hop.packer.take(now, &packet, packet.len());
        hop.encode(now, late);
        while hop.packer.poll_packet(0, &mut out).is_some() {
            hop.restorer.take(now, 0, &out, out.len());
            hop.decode(now);
            play(&mut hop.restorer);
        }
    }
    (sound, natives)
}

/// A tone of −20 dBFS at 48 kHz.
fn tone(hertz: f64, seconds: usize) -> Vec<i16> {
    (0..48_000 * seconds)
        .map(|k| {
            let phase = std::f64::consts::TAU * hertz * k as f64 / 48_000.0;
            (phase.sin() * 0.1 * std::f64::consts::SQRT_2 * 32_767.0) as i16
        })
        .collect()
}

/// Power above `hertz` of each 5 ms: a click has all frequencies, a voice or a tone few so high.
fn high(pcm: &[f32], hertz: f32) -> Vec<f32> {
    const HALF: usize = 32;
    let cutoff = hertz / RATE as f32;
    let taps: Vec<f32> = (0..=2 * HALF)
        .map(|k| {
            let x = k as f32 - HALF as f32;
            let sinc = if x == 0.0 {
                2.0 * cutoff
            } else {
                (std::f32::consts::TAU * cutoff * x).sin() / (std::f32::consts::PI * x)
            };
            let at = std::f32::consts::PI * k as f32 / HALF as f32;
            // Blackman's window: what is below is down by more than 70 dB.
            let window = 0.42 - 0.5 * at.cos() + 0.08 * (2.0 * at).cos();
            f32::from(u8::from(x == 0.0)) - sinc * window
        })
        .collect();
    let filtered: Vec<f32> = pcm
        .windows(taps.len())
        .map(|window| window.iter().zip(&taps).map(|(x, tap)| x * tap).sum())
        .collect();
    filtered
        .chunks_exact(RATE / 200)
        .map(|part| part.iter().map(|x| x * x).sum::<f32>() / part.len() as f32)
        .collect()
}

/// The loudest that a sound has above `hertz` and that neither of the `steady` ones has within 40 ms, dBFS, and when, in seconds.
fn click(found: &[f32], steady: &[&[f32]], hertz: f32) -> (f32, f32) {
    let usual: Vec<Vec<f32>> = steady.iter().map(|pcm| high(pcm, hertz)).collect();
    let found = high(found, hertz);
    let mut worst = (0.0f32, 0);
    // The codecs find into the sound at the beginning.
    for (at, power) in found.iter().enumerate().skip(100) {
        let around = usual
            .iter()
            .flat_map(|usual| {
                usual
                    .get(at - 8..(at + 9).min(usual.len()))
                    .unwrap_or_default()
            })
            .fold(0.0f32, |most, power| most.max(*power));
        if power - around > worst.0 {
            worst = (power - around, at);
        }
    }
    (10.0 * (worst.0 + 1e-12).log10(), worst.1 as f32 / 200.0)
}

/// A rung for every so many packets in turn, at odd moments.
fn in_turn(hows: &[How], packets: usize) -> impl Fn(usize) -> How {
    let hows = hows.to_vec();
    move |n| hows[n / packets % hows.len()]
}

fn at(rung: Rung) -> impl Fn(usize) -> How {
    move |_| How::At(rung)
}

const NATIVE: How = How::At(Rung::NATIVE);

/// The most that may be added at a switch, dBFS.
const CLICK: f32 = -50.0;

fn no_click(name: &str, packets: &[Vec<u8>], hertz: f32, plans: &[&[How]]) {
    let native = heard(packets, true, at(Rung::NATIVE)).0;
    let mut loudest = (f32::MIN, String::new());
    for plan in plans {
        let mut steady = vec![native.clone()];
        for how in *plan {
            let rung = match how {
                How::At(rung) => *rung,
                How::Late => Rung::L4,
            };
            if rung != Rung::NATIVE {
                steady.push(heard(packets, true, at(rung)).0);
            }
        }
        let steady: Vec<&[f32]> = steady.iter().map(Vec::as_slice).collect();
        let (untold, _) = heard(packets, false, in_turn(plan, 23));
        let (sound, natives) = heard(packets, true, in_turn(plan, 23));
        assert!(
            natives * 4 > packets.len() || !plan.contains(&NATIVE),
            "{name}: {natives} native"
        );
        let (level, when) = click(&sound, &steady, hertz);
        let (before, _) = click(&untold, &steady, hertz);
        let said = format!(
            "{name}, {plan:?}: {level:.1} dBFS at {when:.2} s; {before:.1} where the codecs know of nothing"
        );
        eprintln!("{said}");
        if level > loudest.0 {
            loudest = (level, said);
        }
    }
    assert!(loudest.0 < CLICK, "{}", loudest.1);
}

#[test]
fn switches_between_originals_and_codecs_do_not_click_in_tones() {
    for hertz in [425.0, 1000.0] {
        let packets = packets_of(&tone(hertz, 8), 48_000, 20);
        no_click(
            &format!("{hertz} Hz"),
            &packets,
            4_000.0,
            &[
                &[NATIVE, How::At(Rung::L4)],
                &[NATIVE, How::At(Rung::L6)],
                &[How::At(Rung::L4), How::Late],
                &[How::At(Rung::L2), How::At(Rung::L4), NATIVE],
            ],
        );
    }
}

#[test]
fn switches_between_originals_and_codecs_do_not_click_in_speech() {
    let packets = client("talker-a", 12, 20);
    no_click(
        "speech",
        &packets,
        // Coded speech has nothing there, so that no fricative of a codec is taken for a click.
        10_000.0,
        &[
            &[NATIVE, How::At(Rung::L2)],
            &[NATIVE, How::At(Rung::L4)],
            &[How::At(Rung::L2), How::Late],
            &[How::At(Rung::L2), How::At(Rung::L4), NATIVE],
        ],
    );
}
