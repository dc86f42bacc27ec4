//! Opus through libopus: the rungs from L3 on, the originals' decoder and the local encoder.

use std::ptr::NonNull;

use auralink_proto::ladder::CodecId;
use opusic_c::{Application, Bandwidth, Bitrate, Channels, Encoder, ErrorCode, SampleRate, sys};

use crate::codec::{Codec, CodecError, DecodeTask, EncodeTask, SAMPLE_RATE};

/// Samples by which libopus delays sound at 16 kHz: 2.5 ms of look-ahead and 4 ms of its own compensation.
pub const DELAY: usize = 104;
/// The longest packet that Opus knows, in milliseconds.
const LONGEST_MS: usize = 120;
/// Bits a second from which CELT codes wideband speech as well as SILK does.
const PLENTY: u32 = 48_000;
/// CELT's complexity there: a higher one changes neither ViSQOL nor PESQ by 0.01, and takes half as long again.
const CELT_COMPLEXITY: u8 = 2;
/// Larger than any packet of 60 ms that our settings give; one of 120 ms at a very high rate is made to fit.
const LARGEST: usize = 1500;

/// The library's name and version; LACE's weights are in it.
#[must_use]
pub fn libopus() -> &'static str {
    opusic_c::version()
}

impl From<ErrorCode> for CodecError {
    fn from(error: ErrorCode) -> Self {
        match error {
            ErrorCode::InvalidPacket | ErrorCode::BufferTooSmall => Self::Input("not Opus"),
            other => Self::Failed(format!("libopus: {}", other.message())),
        }
    }
}

/// What the decoder adds to plain decoding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Enhancement {
    /// Nothing.
    None,
    /// LACE, libopus' neural enhancement of coded speech, and its neural loss concealment.
    Lace,
}

/// An Opus decoder to mono, at 16 kHz or the rate of a bundle's codec.
///
/// `opusic-c` offers the decoder's complexity, by which libopus 1.6 is told to use LACE, only together with DRED, which is large
/// and of no use here; and its decoder lets nobody else at the pointer. So this one calls libopus itself.
#[derive(Debug)]
pub struct Decoder {
    inner: NonNull<sys::OpusDecoder>,
    sample_rate: usize,
}

#[allow(unsafe_code)]
mod ffi {
    use super::*;

    // SAFETY: the decoder state is plain memory of its own, tied to no thread, and only used through `&mut`.
    unsafe impl Send for Decoder {}

    impl Decoder {
        /// A decoder to `sample_rate`, of those that libopus has, at the beginning of a stream.
        ///
        /// # Errors
        /// Another rate, or no memory for it.
        pub fn at(sample_rate: usize, enhancement: Enhancement) -> Result<Self, CodecError> {
            let mut error = 0;
            let rate = i32::try_from(sample_rate).unwrap_or(0);
            // SAFETY: libopus refuses rates that it doesn't have, and `error` outlives the call.
            let made = unsafe { sys::opus_decoder_create(rate, 1, &raw mut error) };
            let Some(inner) = NonNull::new(made) else {
                return Err(ErrorCode::from(error).into());
            };
            let decoder = Self { inner, sample_rate };
            let complexity: core::ffi::c_int = match enhancement {
                Enhancement::None => 0,
                Enhancement::Lace => 6,
            };
            // SAFETY: the pointer is a live decoder; this request takes one `int`.
            let result = unsafe {
                sys::opus_decoder_ctl(
                    decoder.inner.as_ptr(),
                    sys::OPUS_SET_COMPLEXITY_REQUEST,
                    complexity,
                )
            };
            if result < 0 {
                return Err(ErrorCode::from(result).into());
            }
            Ok(decoder)
        }

        /// Forgets the stream.
        pub fn reset(&mut self) {
            // SAFETY: the pointer is a live decoder; this request takes no argument and always succeeds.
            unsafe { sys::opus_decoder_ctl(self.inner.as_ptr(), sys::OPUS_RESET_STATE) };
        }

        /// Fills `pcm` with what `packet` decodes to, or with what conceals a packet of that length; returns how many samples.
        pub(super) fn fill(
            &mut self,
            packet: Option<&[u8]>,
            pcm: &mut [f32],
        ) -> Result<usize, CodecError> {
            let (data, length) = packet.map_or((std::ptr::null(), 0), |p| (p.as_ptr(), p.len()));
            let length = i32::try_from(length).map_err(|_| CodecError::Input("too long"))?;
            let room = i32::try_from(pcm.len()).map_err(|_| CodecError::Input("too long"))?;
            // SAFETY: the pointer is a live decoder; `data` is null or `length` bytes; `pcm` has `room` samples of one channel.
            let result = unsafe {
                sys::opus_decode_float(self.inner.as_ptr(), data, length, pcm.as_mut_ptr(), room, 0)
            };
            usize::try_from(result).map_err(|_| ErrorCode::from(result).into())
        }
    }

    impl Drop for Decoder {
        fn drop(&mut self) {
            // SAFETY: the pointer came from `opus_decoder_create` and is not used again.
            unsafe { sys::opus_decoder_destroy(self.inner.as_ptr()) };
        }
    }
}

impl Decoder {
    /// A decoder to 16 kHz at the beginning of a stream.
    ///
    /// # Errors
    /// Where there is no memory for it.
    pub fn new(enhancement: Enhancement) -> Result<Self, CodecError> {
        Self::at(SAMPLE_RATE, enhancement)
    }

    /// Samples a second that it decodes to.
    #[must_use]
    pub const fn sample_rate(&self) -> usize {
        self.sample_rate
    }

    const fn longest(&self) -> usize {
        self.sample_rate * LONGEST_MS / 1000
    }

    /// Appends what `packet` decodes to, and returns how many samples that is.
    ///
    /// # Errors
    /// The packet is empty or isn't Opus.
    pub fn decode(&mut self, packet: &[u8], pcm: &mut Vec<f32>) -> Result<usize, CodecError> {
        if packet.is_empty() {
            return Err(CodecError::Input("empty"));
        }
        self.append(Some(packet), self.longest(), pcm)
    }

    /// Appends `samples` made up for a packet that is missing.
    ///
    /// # Errors
    /// `samples` isn't a multiple of 2.5 ms up to 120 ms.
    pub fn conceal(&mut self, samples: usize, pcm: &mut Vec<f32>) -> Result<(), CodecError> {
        if samples == 0 || samples > self.longest() {
            return Err(CodecError::Input("no length to conceal"));
        }
        self.append(None, samples, pcm).map(|_| ())
    }

    fn append(
        &mut self,
        packet: Option<&[u8]>,
        room: usize,
        pcm: &mut Vec<f32>,
    ) -> Result<usize, CodecError> {
        let start = pcm.len();
        pcm.resize(start + room, 0.0);
        let filled = pcm
            .get_mut(start..)
            .map_or(Ok(0), |tail| self.fill(packet, tail));
        pcm.truncate(start + filled.as_ref().copied().unwrap_or(0));
        filled
    }
}

/// An Opus encoder from mono, at 16 kHz or the rate of a bundle's codec.
pub struct SpeechEncoder {
    inner: Encoder,
    bitrate: u32,
    /// Samples of 20 ms.
    frame: usize,
}

impl std::fmt::Debug for SpeechEncoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SpeechEncoder")
            .field("bitrate", &self.bitrate)
            .finish_non_exhaustive()
    }
}

impl SpeechEncoder {
    /// An encoder at the beginning of a stream: wideband whatever the rate (by itself libopus falls to narrowband at 8 kbps and
    /// below), constrained variable rate, without DTX and in-band FEC.
    ///
    /// # Errors
    /// Where there is no memory for it, or the complexity is over 10.
    pub fn new(bitrate: u32, complexity: u8) -> Result<Self, CodecError> {
        Self::at(SAMPLE_RATE, bitrate, complexity)
    }

    /// The same from another sample rate, as wide as that is: 16, 24 or 48 kHz.
    ///
    /// # Errors
    /// Another rate, and as [`SpeechEncoder::new`].
    pub fn at(sample_rate: usize, bitrate: u32, complexity: u8) -> Result<Self, CodecError> {
        Self::with(Application::Voip, sample_rate, bitrate, complexity)
    }

    /// An encoder for the listener's side, where bytes are cheap and CPU is not: from [`PLENTY`] on CELT alone, which takes a third of
    /// SILK's time and delays the sound by 4 ms less.
    ///
    /// # Errors
    /// As [`SpeechEncoder::at`].
    pub fn local(sample_rate: usize, bitrate: u32, complexity: u8) -> Result<Self, CodecError> {
        if bitrate < PLENTY {
            return Self::at(sample_rate, bitrate, complexity);
        }
        let complexity = complexity.min(CELT_COMPLEXITY);
        Self::with(Application::LowDelay, sample_rate, bitrate, complexity)
    }

    fn with(
        application: Application,
        sample_rate: usize,
        bitrate: u32,
        complexity: u8,
    ) -> Result<Self, CodecError> {
        let (rate, bandwidth) = match sample_rate {
            SAMPLE_RATE => (SampleRate::Hz16000, Bandwidth::Wide),
            24_000 => (SampleRate::Hz24000, Bandwidth::Superwide),
            48_000 => (SampleRate::Hz48000, Bandwidth::Full),
            _ => return Err(CodecError::Input("no sample rate of Opus")),
        };
        let mut inner = Encoder::new(Channels::Mono, rate, application)?;
        inner.set_bandwidth(bandwidth)?;
        inner.set_bitrate(Bitrate::Value(bitrate))?;
        inner.set_complexity(complexity)?;
        inner.set_vbr(true)?;
        inner.set_vbr_constraint(true)?;
        Ok(Self {
            inner,
            bitrate,
            frame: sample_rate / 50,
        })
    }

    /// Encodes 10, 20, 40, 60 or 120 ms as one packet.
    ///
    /// # Errors
    /// Another length.
    pub fn encode(&mut self, pcm: &[f32]) -> Result<Vec<u8>, CodecError> {
        let frame = self.frame;
        if ![frame / 2, frame, 2 * frame, 3 * frame, 6 * frame].contains(&pcm.len()) {
            return Err(CodecError::Input("not 10, 20, 40, 60 or 120 ms"));
        }
        let mut packet = vec![0; LARGEST];
        let length = self.inner.encode_float_to_slice(pcm, &mut packet)?;
        packet.truncate(length);
        packet.shrink_to_fit();
        Ok(packet)
    }

    /// Changes the rate from the next packet on.
    fn set_bitrate(&mut self, bitrate: u32) -> Result<(), CodecError> {
        if self.bitrate != bitrate {
            self.inner.set_bitrate(Bitrate::Value(bitrate))?;
            self.bitrate = bitrate;
        }
        Ok(())
    }

    /// Forgets the stream.
    pub(crate) fn reset(&mut self) {
        // Fails for no encoder that was made.
        let _ = self.inner.reset();
    }
}

/// The Opus rungs as a [`Codec`]: one packet for a whole group, LACE at the receiver. Streams aren't batched.
#[derive(Debug, Default)]
pub struct Opus;

impl Codec for Opus {
    type Encoder = SpeechEncoder;
    type Decoder = Decoder;

    fn encoder(&self) -> Result<SpeechEncoder, CodecError> {
        SpeechEncoder::new(12_000, 10)
    }

    fn decoder(&self) -> Result<Decoder, CodecError> {
        Decoder::new(Enhancement::Lace)
    }

    fn encode(&mut self, batch: &mut [EncodeTask<'_, SpeechEncoder>]) {
        for task in batch {
            task.done = task
                .state
                .set_bitrate(task.rung.bitrate())
                .and_then(|()| task.state.encode(task.pcm))
                .map(|packet| task.payload = packet);
            if task.done.is_err() {
                task.state.reset();
            }
        }
    }

    fn decode(&mut self, batch: &mut [DecodeTask<'_, Decoder>]) {
        for task in batch {
            task.done = match task.payload {
                Some(_) if task.codec != CodecId::Opus => Err(CodecError::Input("another codec's")),
                Some(payload) => match task.state.decode(payload, &mut task.pcm) {
                    Ok(samples) if samples != task.samples => {
                        Err(CodecError::Input("another duration than said"))
                    }
                    other => other.map(|_| ()),
                },
                None => task.state.conceal(task.samples, &mut task.pcm),
            };
            if task.done.is_err() {
                task.pcm.clear();
                task.state.reset();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use auralink_proto::ladder::Rung;

    use super::*;
    use crate::codec::FRAME;
    use crate::testing::{signal_to_noise, speech};

    /// Through the codec in packets of `frames` × 20 ms; returns the sound and the bytes.
    fn through(
        rung: Rung,
        enhancement: Enhancement,
        frames: usize,
        pcm: &[f32],
    ) -> (Vec<f32>, usize) {
        let mut codec = Opus;
        let mut encoder = codec.encoder().unwrap();
        let mut decoder = Decoder::new(enhancement).unwrap();
        let (mut heard, mut bytes) = (Vec::new(), 0);
        for group in pcm.chunks_exact(frames * FRAME) {
            let mut batch = [EncodeTask::new(&mut encoder, rung, group)];
            codec.encode(&mut batch);
            let [task] = batch;
            task.done.unwrap();
            bytes += task.payload.len();
            let payload = task.payload;
            let mut batch = [DecodeTask::new(
                &mut decoder,
                CodecId::Opus,
                Some(&payload),
                group.len(),
            )];
            codec.decode(&mut batch);
            let [task] = batch;
            task.done.unwrap();
            heard.extend(task.pcm);
        }
        (heard, bytes)
    }

    #[test]
    fn rungs_keep_their_rate_and_get_better() {
        let pcm = speech("talker-a", 20);
        let mut before = 0.0;
        for rung in [Rung::L3, Rung::L4, Rung::L5, Rung::L6] {
            let (heard, bytes) = through(rung, Enhancement::Lace, 2, &pcm);
            let rate = bytes as f32 * 8.0 / (pcm.len() as f32 / SAMPLE_RATE as f32);
            let wanted = rung.bitrate() as f32;
            assert!(rate < wanted * 1.1 && rate > wanted * 0.6, "{rung}: {rate}");
            let snr = signal_to_noise(&pcm, &heard);
            assert!(snr > before && snr > 3.0, "{rung}: {snr} dB after {before}");
            before = snr;
        }
    }

    #[test]
    fn the_delay_is_what_is_said() {
        assert_eq!(
            SpeechEncoder::new(12_000, 10)
                .unwrap()
                .inner
                .get_look_ahead()
                .unwrap() as usize,
            DELAY
        );
        let pcm = speech("talker-a", 10);
        let (heard, _) = through(Rung::L6, Enhancement::Lace, 2, &pcm);
        let product = |delay: usize| {
            pcm.iter()
                .zip(&heard[delay..])
                .map(|(a, b)| f64::from(a * b))
                .sum::<f64>()
        };
        let best = (0..400)
            .max_by(|a, b| product(*a).total_cmp(&product(*b)))
            .unwrap();
        assert!(best.abs_diff(DELAY) <= 8, "{best} samples");
    }

    #[test]
    fn other_sample_rates_are_as_good() {
        for rate in [SAMPLE_RATE, 24_000, 48_000] {
            let packets = crate::testing::client("talker-a", 5, 20);
            let mut decoder = Decoder::at(rate, Enhancement::Lace).unwrap();
            let mut encoder = SpeechEncoder::at(rate, 64_000, 5).unwrap();
            let mut again = Vec::new();
            for packet in &packets {
                let mut pcm = Vec::new();
                assert_eq!(decoder.decode(packet, &mut pcm).unwrap(), rate / 50);
                again.push(encoder.encode(&pcm).unwrap());
            }
            let mut pcm = Vec::new();
            decoder.conceal(rate / 50, &mut pcm).unwrap();
            assert_eq!(pcm.len(), rate / 50);
            assert!(decoder.conceal(rate / 50 * 7, &mut pcm).is_err(), "140 ms");
            let said = crate::testing::heard(&packets);
            let like = crate::testing::likeness(&said, &crate::testing::heard(&again));
            assert!(like > 0.97, "{rate} Hz: {like}");
        }
        assert!(SpeechEncoder::at(44_100, 64_000, 5).is_err());
        assert!(Decoder::at(44_100, Enhancement::None).is_err());
    }

    #[test]
    fn lace_is_reached() {
        let pcm = speech("talker-a", 5);
        let (plain, _) = through(Rung::L3, Enhancement::None, 2, &pcm);
        let (lace, _) = through(Rung::L3, Enhancement::Lace, 2, &pcm);
        assert_ne!(plain, lace, "complexity 6 must change what is heard");
    }

    #[test]
    fn what_is_not_its_own_is_refused() {
        let mut codec = Opus;
        let mut decoder = codec.decoder().unwrap();
        for (id, payload, samples) in [
            (CodecId::Lyra6, &[0u8; 15][..], FRAME),
            (CodecId::Opus, &[], FRAME),
            (CodecId::Opus, &[0xff, 0xff, 0xff], FRAME),
            (CodecId::Opus, &[0x48, 1, 2, 3], FRAME * 2),
        ] {
            let mut batch = [DecodeTask::new(&mut decoder, id, Some(payload), samples)];
            codec.decode(&mut batch);
            assert!(
                matches!(batch[0].done, Err(CodecError::Input(_))),
                "{payload:?}: {:?}",
                batch[0].done
            );
            assert!(batch[0].pcm.is_empty());
        }
        let mut encoder = codec.encoder().unwrap();
        let mut batch = [EncodeTask::new(&mut encoder, Rung::L4, &[0.0; 100])];
        codec.encode(&mut batch);
        assert!(batch[0].done.is_err());
    }
}
