//! Automatic gain: speech is brought to the level that low-rate codecs work best at, and the receiver takes it back.

use crate::codec::{FRAME, SAMPLE_RATE};

/// The level of active speech that is aimed at, dBFS.
pub const TARGET: f32 = -18.0;
/// What 6 bits of two's complement hold.
pub const GAINS: std::ops::RangeInclusive<i8> = -32..=31;
/// No sample is amplified beyond this: −1 dBFS.
const CEILING: f32 = 0.891;
/// Quieter than this isn't speech that could be brought up: with the highest gain it would still be 20 dB under the target.
const FLOOR: f32 = -70.0;
/// How much a new frame of speech moves the estimate: a time constant of about 0.5 s ...
const SLOW: f32 = 0.04;
/// ... but 0.1 s until so many frames of speech have been heard.
const FAST: f32 = 0.2;
const LEARNING: u32 = 25;
/// dB that the gain may move from one packet to the next, once learnt.
const STEP: i8 = 2;
/// A new gain is reached within 10 ms.
pub const RAMP: usize = SAMPLE_RATE / 100;

/// [`RAMP`] at another sample rate.
#[must_use]
pub const fn ramp_at(sample_rate: usize) -> usize {
    sample_rate / 100
}

/// The factor of `db` decibels.
#[must_use]
pub fn factor(db: f32) -> f32 {
    10f32.powf(db / 20.0)
}

/// Root mean square in dBFS; −120 for silence.
#[must_use]
pub fn level(pcm: &[f32]) -> f32 {
    let power = pcm.iter().map(|x| x * x).sum::<f32>() / pcm.len().max(1) as f32;
    10.0 * power.max(1e-12).log10()
}

/// A sender's gain control. Causal: a packet's gain follows from it and those before.
#[derive(Debug, Clone, Default)]
pub struct Agc {
    /// Level of active speech, dBFS, once some was heard.
    speech: Option<f32>,
    heard: u32,
    gain: i8,
    /// That of the packet before.
    before: i8,
}

impl Agc {
    /// The level of active speech so far, dBFS.
    #[must_use]
    pub const fn speech_level(&self) -> Option<f32> {
        self.speech
    }

    /// Learns from a packet, amplifies it in place, and returns the gain to be sent along in dB. Without `levels` (a rung that
    /// needs none) it only learns, and brings the gain back to 0.
    pub fn apply(&mut self, pcm: &mut [f32], voice: bool, levels: bool) -> i8 {
        if voice {
            for frame in pcm.chunks_exact(FRAME) {
                self.learn(level(frame));
            }
        }
        self.before = self.gain;
        self.gain = if levels { self.next(pcm) } else { 0 };
        self.again(pcm, SAMPLE_RATE);
        self.gain
    }

    /// Does to the same packet at another sample rate what was done to it.
    pub fn again(&self, pcm: &mut [f32], sample_rate: usize) {
        let (before, gain) = (f32::from(self.before), f32::from(self.gain));
        ramp(pcm, before, gain, ramp_at(sample_rate));
        for sample in pcm {
            *sample = sample.clamp(-1.0, 1.0);
        }
    }

    fn learn(&mut self, level: f32) {
        if level < FLOOR {
            return;
        }
        let Some(speech) = &mut self.speech else {
            self.speech = Some(level);
            return;
        };
        // Pauses between words and unvoiced sounds aren't what makes speech loud: they count the less the quieter they are.
        if level > *speech - 12.0 {
            let rate = if self.heard < LEARNING { FAST } else { SLOW };
            *speech += rate * (level - *speech);
        } else {
            *speech -= 0.02;
        }
        self.heard = self.heard.saturating_add(1);
    }

    fn next(&self, pcm: &[f32]) -> i8 {
        let wanted = self
            .speech
            .map_or(f32::from(self.gain), |speech| TARGET - speech);
        // Hysteresis of half a step, so that it doesn't flutter.
        let mut next = if (wanted - f32::from(self.gain)).abs() > 0.75 {
            wanted
                .round()
                .clamp(f32::from(*GAINS.start()), f32::from(*GAINS.end())) as i8
        } else {
            self.gain
        };
        if self.heard > LEARNING {
            next = next.clamp(
                self.gain.saturating_sub(STEP),
                self.gain.saturating_add(STEP),
            );
        }
        let peak = pcm.iter().fold(0.0f32, |peak, x| peak.max(x.abs()));
        if peak > 0.0 {
            let room = (20.0 * (CEILING / peak).log10()).floor();
            next = next.min(room.clamp(f32::from(*GAINS.start()), f32::from(*GAINS.end())) as i8);
        }
        next
    }
}

/// Multiplies with a gain that goes from one to another within `length` samples, evenly in dB.
fn ramp(pcm: &mut [f32], from: f32, to: f32, length: usize) {
    let target = factor(to);
    let step = factor((to - from) / length as f32);
    let mut current = factor(from);
    let (head, tail) = pcm.split_at_mut(pcm.len().min(if from == to { 0 } else { length }));
    for sample in head {
        current *= step;
        *sample *= current;
    }
    if to != 0.0 {
        for sample in tail {
            *sample *= target;
        }
    }
}

/// A receiver's side: takes the gain back. The codec delays the sound but not the number, so that each change waits as long; else
/// the last milliseconds before it would come out wrong by as much as the gain changed.
#[derive(Debug, Clone, Default)]
pub struct Undo {
    /// The gain of the sound that comes out now.
    current: f32,
}

impl Undo {
    /// Takes `gain` back from a packet's sound that its codec has delayed by `delay` samples.
    pub fn apply(&mut self, pcm: &mut [f32], gain: i8, delay: usize, sample_rate: usize) {
        let next = f32::from(gain);
        let length = ramp_at(sample_rate);
        let (before, after) = pcm.split_at_mut(delay.min(pcm.len().saturating_sub(length)));
        ramp(before, -self.current, -self.current, length);
        ramp(after, -self.current, -next, length);
        self.current = next;
    }

    /// The same for sound that was made up: it is as loud as what came before.
    pub fn keep(&self, pcm: &mut [f32]) {
        ramp(pcm, -self.current, -self.current, RAMP);
    }

    /// Starts with `gain`, as the first packet of a codec does.
    pub fn restart(&mut self, gain: i8) {
        self.current = f32::from(gain);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::speech;

    /// Speech at `db` relative to the recording through the gain control in packets of 40 ms: what the codec would get, the gains.
    fn through(db: f32) -> (Vec<f32>, Vec<f32>, Vec<i8>) {
        let mut pcm = speech("talker-a", 12);
        for x in &mut pcm {
            *x *= factor(db);
        }
        let before = pcm.clone();
        let mut agc = Agc::default();
        let gains = pcm
            .chunks_exact_mut(2 * FRAME)
            .map(|packet| agc.apply(packet, true, true))
            .collect();
        (before, pcm, gains)
    }

    /// Mean level of the frames within 15 dB of the loudest.
    fn active(pcm: &[f32]) -> f32 {
        let levels: Vec<f32> = pcm.chunks_exact(FRAME).map(level).collect();
        let loudest = levels.iter().copied().fold(f32::MIN, f32::max);
        let active: Vec<f32> = levels.into_iter().filter(|l| *l > loudest - 15.0).collect();
        active.iter().sum::<f32>() / active.len() as f32
    }

    #[test]
    fn quiet_and_loud_speech_come_to_the_same_level() {
        // The recording is at about −26 dBFS; 31 dB more is all that 6 bits hold.
        for db in [0.0, -10.0, -20.0, -23.0, 6.0] {
            let (_, pcm, gains) = through(db);
            let tail = &pcm[pcm.len() / 4..];
            let found = active(tail);
            assert!(
                (found - TARGET).abs() < 3.5,
                "{db} dB: {found} dBFS, gains {gains:?}"
            );
            assert!(pcm.iter().all(|x| x.abs() <= 1.0));
            assert!(gains.iter().all(|g| GAINS.contains(g)), "{gains:?}");
        }
    }

    #[test]
    fn the_gain_is_learnt_within_half_a_second_of_speech_and_then_moves_slowly() {
        let (before, _, gains) = through(-28.0);
        let onset = before
            .chunks_exact(2 * FRAME)
            .position(|p| level(p) > -55.0)
            .unwrap();
        let settled = gains[gains.len() / 2..]
            .iter()
            .map(|g| i32::from(*g))
            .sum::<i32>()
            / (gains.len() / 2) as i32;
        assert!(
            i32::from(gains[onset + 13]) > settled - 6,
            "{} of {settled}",
            gains[onset + 13]
        );
        assert!(gains[onset + 20..].windows(2).all(|w| w[1] - w[0] <= STEP));
    }

    #[test]
    fn the_receiver_takes_it_back_exactly() {
        for delay in [0, 104] {
            let (before, pcm, gains) = through(-20.0);
            let mut delayed = vec![0.0; delay];
            delayed.extend(&pcm[..pcm.len() - delay]);
            let mut undo = Undo::default();
            for (packet, gain) in delayed.chunks_exact_mut(2 * FRAME).zip(gains) {
                undo.apply(packet, gain, delay, SAMPLE_RATE);
            }
            let worst = delayed[delay..]
                .iter()
                .zip(&before)
                .map(|(a, b)| (a - b).abs())
                .fold(0.0, f32::max);
            assert!(worst < 1e-4, "delay {delay}: off by {worst}");
        }
    }

    #[test]
    fn the_same_sound_at_another_rate_gets_the_same_gains() {
        // Each sample three times: 48 kHz.
        let (rate, wide) = (48_000, |pcm: &[f32]| -> Vec<f32> {
            pcm.iter().flat_map(|x| [*x; 3]).collect()
        });
        let mut agc = Agc::default();
        let (mut undo, mut worst, mut apart) = (Undo::default(), 0.0f32, 0.0f32);
        let mut gains = Vec::new();
        for packet in speech("talker-a", 12).chunks_exact(2 * FRAME) {
            let mut pcm: Vec<f32> = packet.iter().map(|x| x * 0.1).collect();
            let before = wide(&pcm);
            let mut again = before.clone();
            let gain = agc.apply(&mut pcm, true, true);
            agc.again(&mut again, rate);
            for (narrow, wide) in pcm.iter().zip(again.as_chunks::<3>().0) {
                apart = apart.max((narrow - wide[2]).abs());
            }
            undo.apply(&mut again, gain, 0, rate);
            for (a, b) in again.iter().zip(&before) {
                worst = worst.max((a - b).abs());
            }
            gains.push(gain);
        }
        assert!(gains.windows(2).any(|w| w[0] != w[1]), "{gains:?}");
        assert!(apart < 1e-4 && worst < 1e-4, "{apart}, {worst}");
    }

    #[test]
    fn silence_and_rungs_without_a_level_leave_it_alone() {
        let mut agc = Agc::default();
        let mut silence = vec![0.0; 2 * FRAME];
        assert_eq!(agc.apply(&mut silence, true, true), 0);
        assert!(silence.iter().all(|x| *x == 0.0));
        let mut quiet = vec![0.01; 2 * FRAME];
        assert_eq!(agc.apply(&mut quiet, true, false), 0);
        assert!(quiet.iter().all(|x| *x == 0.01));
        assert!(
            agc.speech_level()
                .is_some_and(|level| (level + 40.0).abs() < 0.01)
        );
    }
}
