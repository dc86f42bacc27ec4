//! What a speech codec has to be able to do. Two are built in: [`crate::lyra::Lyra`] and [`crate::opus::Opus`].

use auralink_proto::ladder::{CodecId, Frames, Rung};

/// Samples a second of the speech in the engine: of the ladder's Opus, the detector and the gain control. A bundle's codec may work
/// at a higher rate ([`Format`]).
pub const SAMPLE_RATE: usize = 16_000;
/// Samples of 20 ms, the unit that everything is a multiple of.
pub const FRAME: usize = SAMPLE_RATE / 50;

/// Why a codec couldn't do it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// The payload isn't one of this codec's, or the speech has an impossible length.
    #[error("not a payload of this codec: {0}")]
    Input(&'static str),
    /// The model or library gave up, or its result is no sound (NaN).
    #[error("the codec failed: {0}")]
    Failed(String),
}

/// What a codec's speech and payloads are measured in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Format {
    /// Samples a second: [`SAMPLE_RATE`] or a multiple of 8 kHz above it.
    pub sample_rate: usize,
    /// Samples of a frame.
    pub frame: usize,
    /// Samples by which sound comes out later than it went in.
    pub delay: usize,
    /// Frames on the wire.
    pub wire: Frames,
}

impl Format {
    /// Lyra's: 20 ms of 16 kHz.
    pub const LYRA: Self = Self {
        sample_rate: SAMPLE_RATE,
        frame: FRAME,
        delay: 0,
        wire: Frames::LYRA,
    };

    /// Samples of `ms` milliseconds.
    #[must_use]
    pub const fn samples(&self, ms: usize) -> usize {
        self.sample_rate * ms / 1000
    }
}

/// One stream's part of a batch to encode.
#[derive(Debug)]
pub struct EncodeTask<'a, S> {
    /// The stream's state; after an error it has been reset.
    pub state: &'a mut S,
    /// A rung of this codec.
    pub rung: Rung,
    /// Mono within ±1 at the codec's rate: whole frames, of 60 ms in all at most.
    pub pcm: &'a [f32],
    /// Result: the coded speech.
    pub payload: Vec<u8>,
    /// Result: whether there is any.
    pub done: Result<(), CodecError>,
}

/// One stream's part of a batch to decode.
#[derive(Debug)]
pub struct DecodeTask<'a, S> {
    /// The stream's state; after an error it has been reset.
    pub state: &'a mut S,
    /// What the payload is coded with.
    pub codec: CodecId,
    /// The payload; `None` where it never came and has to be concealed.
    pub payload: Option<&'a [u8]>,
    /// Samples that it stands for at the codec's rate: whole frames; what is concealed may end anywhere.
    pub samples: usize,
    /// Result: `samples` of mono within ±1.
    pub pcm: Vec<f32>,
    /// Result: whether there are any.
    pub done: Result<(), CodecError>,
}

impl<'a, S> EncodeTask<'a, S> {
    /// A task with empty results.
    pub fn new(state: &'a mut S, rung: Rung, pcm: &'a [f32]) -> Self {
        Self {
            state,
            rung,
            pcm,
            payload: Vec::new(),
            done: Ok(()),
        }
    }
}

impl<'a, S> DecodeTask<'a, S> {
    /// A task with empty results.
    pub fn new(
        state: &'a mut S,
        codec: CodecId,
        payload: Option<&'a [u8]>,
        samples: usize,
    ) -> Self {
        Self {
            state,
            codec,
            payload,
            samples,
            pcm: Vec::new(),
            done: Ok(()),
        }
    }
}

/// A speech codec: one instance serves every stream of a thread, the state of each stream is outside of it.
pub trait Codec: Send {
    /// What a sender keeps of a stream.
    type Encoder: Send;
    /// What a receiver keeps of a stream.
    type Decoder: Send;

    /// What its speech and payloads are measured in.
    fn format(&self) -> Format {
        Format::LYRA
    }

    /// The state of a stream that begins.
    ///
    /// # Errors
    /// Where there is no memory for it.
    fn encoder(&self) -> Result<Self::Encoder, CodecError>;

    /// The state of a stream that begins.
    ///
    /// # Errors
    /// Where there is no memory for it.
    fn decoder(&self) -> Result<Self::Decoder, CodecError>;

    /// Encodes the next packet of each stream. A failure of one doesn't touch the others.
    fn encode(&mut self, batch: &mut [EncodeTask<'_, Self::Encoder>]);

    /// Decodes, or conceals, the next packet of each stream. A failure of one doesn't touch the others.
    fn decode(&mut self, batch: &mut [DecodeTask<'_, Self::Decoder>]);
}
