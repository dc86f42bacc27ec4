//! The codec engine: speech codecs on threads of their own, behind bounded queues.
//!
//! A media worker hands in groups of original packets and payloads to restore ([`Port::try_send`]), goes on, and takes what
//! became of them when it is woken ([`Port::try_recv`]). Nothing here ever blocks it, whatever a model does.
//!
//! All speech inside is 16 kHz mono `f32` within ±1. No resampler is needed: libopus decodes to 16 kHz and encodes from it by
//! itself, Lyra and the voice detector work at that rate, and no rung carries more than wideband.

pub mod agc;
pub mod bits;
pub mod breaker;
pub mod bundle;
pub mod codec;
mod desk;
mod engine;
pub mod gate;
mod job;
pub mod lyra;
pub mod onnx;
pub mod opus;
mod pool;
pub mod quantizer;
mod source;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod track;
mod verify;

pub use breaker::Settings as BreakerSettings;
pub use engine::{Counters, Engine, EngineConfig, Port, StartError, Status};
pub use job::{
    Busy, Decode, Decoded, Direction, Encode, Encoded, Job, Outcome, Recode, Recoded, Refusal,
};
pub use opus::libopus;
pub use verify::{Report, Timing, VerifyError, verify};
