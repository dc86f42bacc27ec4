//! The speech gate: what isn't speech stays on L4 or higher. Silero VAD on ONNX Runtime says how probable speech is.

use auralink_proto::ladder::Rung;
use ort::environment::Environment;

use crate::agc::level;
use crate::bundle::{Bundle, Kind};
use crate::codec::{FRAME, SAMPLE_RATE};
use crate::onnx::{Row, StatefulGraph};

/// Samples of a window that gets a probability: 32 ms.
pub const WINDOW: usize = 512;
/// Windows that are averaged: 0.5 s.
const WINDOWS: usize = 16;
/// Mean probability over which it is speech; without the two below it passes 99.8 % of speech and 0.22 % of music (measured
/// elsewhere: docs/privacy.md).
const SPEECH: f32 = 0.3;
/// Mean probability of the last [`RECENT`] windows that is speech again at once: 0.13 s after somebody begins to speak.
const RETURN: f32 = 0.6;
const RECENT: usize = 4;
/// Mean probability of the last [`LATE`] windows under which it is no speech any more, without waiting for the long mean.
const END: f32 = 0.12;
/// 0.19 s. The detector itself takes a quarter of a second to let go of speech that turns into music.
const LATE: usize = 6;
/// A window with this probability has a voice in it.
const VOICE: f32 = 0.5;
/// Quieter than this is a pause, whatever it is.
const SILENCE: f32 = -66.0;
/// And so is what is so many dB below the level of the speech heard before: a room between two sentences.
const BELOW: f32 = 15.0;
/// Forget how loud the speech was after so many windows without any: 5 s.
const FORGET: u32 = 156;
/// A pause has to last so many frames of 20 ms before it counts: 0.2 s.
const HANGOVER: u32 = 10;

/// What a track sounds like now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Somebody speaks, or did a moment ago.
    Speech,
    /// Silence, or what is as good as that.
    Pause,
    /// Music, tones, noise: no business of a speech codec's.
    Other,
}

/// Tells how probable speech is in windows of many streams at once.
pub trait Detector: Send {
    /// Sets each `probability`, or leaves it `None` where the model failed.
    fn listen(&mut self, windows: &mut [Window<'_>]);
}

/// One stream's part of a batch to listen to.
#[derive(Debug)]
pub struct Window<'a> {
    /// What the model keeps of the stream.
    pub memory: &'a mut Memory,
    /// 16 kHz mono within ±1.
    pub pcm: &'a [f32; WINDOW],
    /// Result: 0 to 1.
    pub probability: Option<f32>,
}

/// What a model keeps of a stream; empty at its beginning.
#[derive(Debug, Clone, Default)]
pub struct Memory {
    state: Vec<f32>,
    context: Vec<f32>,
}

/// Silero VAD, or another detector with the same bundle format.
#[derive(Debug)]
pub struct Silero {
    graph: StatefulGraph,
    context: usize,
    inputs: Vec<f32>,
}

impl Silero {
    /// Builds the session of a thread.
    ///
    /// # Errors
    /// In words: what of the bundle this engine can't run.
    pub fn new(environment: &Environment, bundle: &Bundle) -> Result<Self, String> {
        let manifest = &bundle.manifest;
        let Kind::Vad { model, context } = &manifest.kind else {
            return Err(format!("{} is no voice detector", manifest.name));
        };
        if (manifest.sample_rate, manifest.frame) != (SAMPLE_RATE, WINDOW) {
            return Err(format!(
                "{} has windows of {} samples at {} Hz; this engine takes {WINDOW} at {SAMPLE_RATE} Hz",
                manifest.name, manifest.frame, manifest.sample_rate
            ));
        }
        let file = bundle.file(&model.file);
        let graph = StatefulGraph::new(environment, "model", model, file, SAMPLE_RATE)?;
        if (graph.input_size(), graph.output_size()) != (context + WINDOW, 1) {
            return Err(format!(
                "{}: the model has to go from {} samples to one probability",
                manifest.name,
                context + WINDOW
            ));
        }
        Ok(Self {
            graph,
            context: *context,
            inputs: Vec::new(),
        })
    }
}

impl Detector for Silero {
    fn listen(&mut self, windows: &mut [Window<'_>]) {
        let size = self.context + WINDOW;
        self.inputs.clear();
        for window in windows.iter_mut() {
            let Memory { state, context } = &mut *window.memory;
            state.resize(self.graph.state_size(), 0.0);
            context.resize(self.context, 0.0);
            self.inputs.extend_from_slice(context);
            self.inputs.extend_from_slice(window.pcm);
            let kept = window
                .pcm
                .get(WINDOW - self.context.min(WINDOW)..)
                .unwrap_or_default();
            context.copy_from_slice(kept);
        }
        let mut outputs = vec![0.0; windows.len()];
        let mut rows: Vec<Row<'_>> = windows
            .iter_mut()
            .zip(
                self.inputs
                    .chunks_exact(size)
                    .zip(outputs.chunks_exact_mut(1)),
            )
            .map(|(window, (input, output))| Row {
                input,
                state: &mut window.memory.state,
                output,
                done: Ok(()),
            })
            .collect();
        self.graph.run(&mut rows);
        let failed: Vec<bool> = rows.iter().map(|row| row.done.is_err()).collect();
        for ((window, probability), failed) in windows.iter_mut().zip(outputs).zip(failed) {
            window.probability = (!failed).then(|| probability.clamp(0.0, 1.0));
        }
    }
}

/// A track's gate: takes probabilities and levels, says what the track sounds like. It begins with the benefit of the doubt.
#[derive(Debug, Clone)]
pub struct Gate {
    /// What the model keeps.
    pub memory: Memory,
    /// Sound not listened to yet: less than a window.
    pending: Vec<f32>,
    /// The last probabilities of what was no pause; the oldest at `next`.
    recent: [f32; WINDOWS],
    next: usize,
    speech: bool,
    voice: bool,
    /// Level of the last windows with a voice in them, dBFS.
    loudness: Option<f32>,
    without_voice: u32,
    /// Frames in a row that are no more than a pause, and that are silent.
    quiet: u32,
    silent: u32,
}

impl Default for Gate {
    fn default() -> Self {
        Self {
            memory: Memory::default(),
            pending: Vec::with_capacity(WINDOW * 2),
            recent: [1.0; WINDOWS],
            next: 0,
            speech: true,
            voice: false,
            loudness: None,
            without_voice: 0,
            quiet: 0,
            silent: 0,
        }
    }
}

impl Gate {
    /// Takes the next sound of the track: whole frames of 20 ms.
    pub fn push(&mut self, pcm: &[f32]) {
        for frame in pcm.chunks_exact(FRAME) {
            let level = level(frame);
            let counts =
                |counter: u32, holds: bool| if holds { counter.saturating_add(1) } else { 0 };
            self.silent = counts(self.silent, level < SILENCE);
            self.quiet = counts(self.quiet, self.is_quiet(level));
        }
        self.pending.extend_from_slice(pcm);
        // Nobody listens (no detector): only the newest matters.
        let surplus = self.pending.len().saturating_sub(WINDOW * 4);
        self.pending.drain(..surplus);
    }

    /// The next window to be listened to, if there is a whole one; then tell [`Gate::heard`]. Silence that lasts is passed over:
    /// it needs no model to be known, and is half of a conversation.
    pub fn window(&mut self) -> Option<Box<[f32; WINDOW]>> {
        while self.silent > HANGOVER && self.pending.len() >= WINDOW {
            self.pending.drain(..WINDOW);
            self.voice = false;
            self.without();
        }
        let window = Box::new(*self.pending.first_chunk::<WINDOW>()?);
        self.pending.drain(..WINDOW);
        Some(window)
    }

    /// What the detector made of a window.
    pub fn heard(&mut self, window: &[f32; WINDOW], probability: f32) {
        let level = level(window);
        self.voice = probability > VOICE;
        if self.voice && level > SILENCE {
            let before = self.loudness.unwrap_or(level);
            self.loudness = Some(before + 0.1 * (level - before));
            self.without_voice = 0;
        } else {
            self.without();
        }
        // A pause says nothing about what comes after it.
        if !self.voice && self.is_quiet(level) {
            return;
        }
        if let Some(place) = self.recent.get_mut(self.next) {
            *place = probability;
        }
        self.next = (self.next + 1) % WINDOWS;
        let mean = self.recent.iter().sum::<f32>() / WINDOWS as f32;
        self.speech = (mean > SPEECH && self.newest(LATE) > END) || self.newest(RECENT) > RETURN;
    }

    /// What it sounds like now.
    #[must_use]
    pub const fn content(&self) -> Content {
        if self.quiet >= HANGOVER {
            Content::Pause
        } else if self.speech {
            Content::Speech
        } else {
            Content::Other
        }
    }

    /// Somebody spoke in the last window.
    #[must_use]
    pub const fn voice(&self) -> bool {
        self.voice
    }

    /// The rung to use where `wanted` was asked for.
    #[must_use]
    pub fn rung(&self, wanted: Rung) -> Rung {
        match self.content() {
            Content::Other => wanted.max(Rung::L4),
            Content::Pause if wanted == Rung::L2 && self.speech => Rung::L1,
            Content::Pause if !self.speech => wanted.max(Rung::L4),
            Content::Pause | Content::Speech => wanted,
        }
    }

    /// Mean of the newest so many probabilities.
    fn newest(&self, windows: usize) -> f32 {
        let places = (1..=windows).map(|back| (self.next + WINDOWS - back) % WINDOWS);
        places
            .filter_map(|place| self.recent.get(place))
            .sum::<f32>()
            / windows as f32
    }

    /// A window went by without a voice.
    fn without(&mut self) {
        self.without_voice = self.without_voice.saturating_add(1);
        if self.without_voice > FORGET {
            self.loudness = None;
        }
    }

    fn is_quiet(&self, level: f32) -> bool {
        level < SILENCE
            || self
                .loudness
                .is_some_and(|loudness| level < loudness - BELOW)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{environment, heard, music, packets_of, speech, vad_bundle};

    fn silero() -> Silero {
        Silero::new(&environment(), &Bundle::read(&vad_bundle()).unwrap()).unwrap()
    }

    /// The content after each frame of 20 ms.
    fn contents(gate: &mut Gate, pcm: &[f32]) -> Vec<Content> {
        let mut silero = silero();
        pcm.chunks_exact(FRAME)
            .map(|frame| {
                gate.push(frame);
                while let Some(pcm) = gate.window() {
                    let mut windows = [Window {
                        memory: &mut gate.memory,
                        pcm: &pcm,
                        probability: None,
                    }];
                    silero.listen(&mut windows);
                    let probability = windows[0].probability.unwrap();
                    gate.heard(&pcm, probability);
                }
                gate.content()
            })
            .collect()
    }

    fn share(contents: &[Content], of: Content) -> f32 {
        contents.iter().filter(|c| **c == of).count() as f32 / contents.len() as f32
    }

    #[test]
    fn speech_passes() {
        for name in ["talker-a", "talker-b", "dialogue-a", "dialogue-b"] {
            let found = contents(&mut Gate::default(), &speech(name, 60));
            let other = share(&found, Content::Other);
            assert!(
                other < 0.01,
                "{name}: {other} of speech is taken for something else"
            );
        }
    }

    #[test]
    fn music_is_lifted_within_half_a_second_and_speech_returns() {
        let talk = speech("talker-a", 10);
        let tune = heard(&packets_of(&music(10), 64_000, 20));
        let mut gate = Gate::default();
        contents(&mut gate, &talk);
        let found = contents(&mut gate, &tune);
        let last = found.iter().rposition(|c| *c == Content::Speech);
        assert!(
            last.is_none_or(|last| last < 25),
            "taken for speech up to frame {last:?}"
        );
        assert!(share(&found[25..], Content::Other) > 0.5);
        assert!(gate.rung(Rung::L2) >= Rung::L4 && gate.rung(Rung::L5) == Rung::L5);
        let found = contents(&mut gate, &talk);
        let back = found.iter().position(|c| *c == Content::Speech).unwrap();
        let onset = talk
            .chunks_exact(FRAME)
            .position(|f| level(f) > -40.0)
            .unwrap();
        assert!(
            back <= onset + 25,
            "speech begins in frame {onset}, is seen in {back}"
        );
    }

    #[test]
    fn tones_are_lifted_from_the_start() {
        for frequency in [200.0, 440.0, 1000.0, 3000.0] {
            let tone: Vec<f32> = (0..SAMPLE_RATE * 4)
                .map(|k| {
                    0.3 * (std::f32::consts::TAU * frequency * k as f32 / SAMPLE_RATE as f32).sin()
                })
                .collect();
            let found = contents(&mut Gate::default(), &tone);
            assert!(
                found[25..].iter().all(|c| *c == Content::Other),
                "{frequency} Hz"
            );
        }
    }

    #[test]
    fn lasting_silence_is_not_listened_to_and_speech_after_it_is() {
        let mut gate = Gate::default();
        let windows = |gate: &mut Gate, pcm: &[f32]| {
            let mut count = 0;
            for frame in pcm.chunks_exact(FRAME) {
                gate.push(frame);
                while gate.window().is_some() {
                    count += 1;
                }
            }
            count
        };
        assert_eq!(windows(&mut gate, &[0.1; SAMPLE_RATE]), 31);
        let few = windows(&mut gate, &[0.0; 4 * SAMPLE_RATE]);
        assert!(few <= 8, "{few}");
        assert!(!gate.voice());
        assert!(windows(&mut gate, &[0.1; SAMPLE_RATE]) >= 31);
    }

    #[test]
    fn silence_is_a_pause_that_changes_nothing() {
        let mut gate = Gate::default();
        contents(&mut gate, &speech("talker-a", 10));
        let found = contents(&mut gate, &vec![1e-4; SAMPLE_RATE * 20]);
        assert!(found[10..].iter().all(|c| *c == Content::Pause));
        assert_eq!(gate.rung(Rung::L2), Rung::L1, "the pauses of L2");
        assert_eq!(gate.rung(Rung::L3), Rung::L3);
    }

    #[test]
    fn noise_behind_speech_is_no_reason_to_leave_the_rung() {
        let mut pcm = speech("talker-a", 20);
        let mut seed = 1u32;
        let (mut slow, mut rows) = (0.0f32, [0.0f32; 3]);
        for x in &mut pcm {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let white = (seed >> 8) as f32 / (1 << 23) as f32 - 1.0;
            // Paul Kellet's pink filter, shortened.
            rows[0] = 0.99765 * rows[0] + white * 0.099_046;
            rows[1] = 0.963 * rows[1] + white * 0.296_516;
            rows[2] = 0.57 * rows[2] + white * 1.052_691;
            slow += rows.iter().sum::<f32>().abs() * 1e-6;
            *x += 0.008 * (rows.iter().sum::<f32>() + white * 0.1848);
        }
        assert!(slow > 0.0);
        let found = contents(&mut Gate::default(), &pcm);
        let other = share(&found, Content::Other);
        assert!(
            other < 0.1,
            "{other} of noisy speech is taken for something else"
        );
    }
}
