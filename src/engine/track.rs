//! What a thread keeps of a track: a sender's side and a receiver's.

use auralink_proto::ladder::{CodecId, Rung};
use opusic_c::SampleRate;

use crate::agc::{self, Agc, Undo, ramp_at};
use crate::codec::{Codec, CodecError, DecodeTask, FRAME, SAMPLE_RATE};
use crate::gate::{Content, Gate};
use crate::job::{Decode, Refusal};
use crate::lyra::{LyraDecoder, LyraEncoder};
use crate::opus::{Decoder, Enhancement, Opus, SpeechEncoder};

/// The longest group of several: 60 ms.
const LONGEST: usize = 3 * FRAME;
/// Lost originals that are worth concealing to keep the decoder's state near the sender's.
const CONCEALED: u16 = 3;
/// Louder than this is taken for somebody speaking where no detector is at hand, dBFS.
const LOUD: f32 = -50.0;

/// Codecs that share a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Family {
    /// Both rates of the bundle's codec.
    Neural,
    /// Every rate of Opus.
    Opus,
}

impl Family {
    pub(crate) const fn of(codec: CodecId) -> Self {
        match codec {
            CodecId::Lyra3 | CodecId::Lyra6 => Self::Neural,
            _ => Self::Opus,
        }
    }
}

/// The sender's side.
#[derive(Debug)]
pub(crate) struct Sender {
    /// Of the originals.
    decoder: Decoder,
    /// Of the same to the rate of a codec that wants more than 16 kHz.
    wide: Option<Decoder>,
    pub(crate) gate: Gate,
    agc: Agc,
    pub(crate) lyra: Option<LyraEncoder>,
    pub(crate) opus: Option<SpeechEncoder>,
    family: Option<Family>,
    loud: bool,
}

impl Sender {
    pub(crate) fn new() -> Result<Self, CodecError> {
        Self::hearing(Enhancement::None)
    }

    /// With a decoder of the originals that enhances what it decodes, or not.
    pub(crate) fn hearing(enhancement: Enhancement) -> Result<Self, CodecError> {
        Ok(Self {
            decoder: Decoder::new(enhancement)?,
            wide: None,
            gate: Gate::default(),
            agc: Agc::default(),
            lyra: None,
            opus: None,
            family: None,
            loud: false,
        })
    }

    pub(crate) fn forget_models(&mut self) {
        self.lyra = None;
        self.gate = Gate::default();
        if self.family == Some(Family::Neural) {
            self.family = None;
        }
    }

    /// Decodes a group of originals into `pcm` and returns the milliseconds of each.
    pub(crate) fn take(
        &mut self,
        packets: &[Vec<u8>],
        lost_before: u16,
        pcm: &mut Vec<f32>,
    ) -> Result<u8, Refusal> {
        let unit = unit_of(packets)?;
        let mut made_up = Vec::new();
        for _ in 0..lost_before.min(CONCEALED) {
            // Its sound isn't wanted, only what it does to the state.
            if self.decoder.conceal(unit, &mut made_up).is_err() {
                break;
            }
        }
        for packet in packets {
            if self.decoder.decode(packet, pcm).ok() != Some(unit) {
                self.decoder.reset();
                self.wide = None;
                return Err(Refusal::Undecodable);
            }
        }
        tame(pcm);
        self.loud = agc::level(pcm) > LOUD;
        u8::try_from(unit * 20 / FRAME).map_err(|_| Refusal::Duration)
    }

    /// Decodes the group that [`Sender::take`] took once more, to another rate; with `None` the next such group begins anew.
    pub(crate) fn take_wide(
        &mut self,
        packets: &[Vec<u8>],
        (unit_ms, lost_before): (u8, u16),
        sample_rate: Option<usize>,
        pcm: &mut Vec<f32>,
    ) -> Result<(), CodecError> {
        let Some(rate) = sample_rate else {
            self.wide = None;
            return Ok(());
        };
        let mut decoder = match self.wide.take() {
            Some(decoder) if decoder.sample_rate() == rate => decoder,
            _ => Decoder::at(rate, Enhancement::None)?,
        };
        let mut made_up = Vec::new();
        for _ in 0..lost_before.min(CONCEALED) {
            decoder.conceal(rate * usize::from(unit_ms) / 1000, &mut made_up)?;
        }
        for packet in packets {
            decoder.decode(packet, pcm)?;
        }
        tame(pcm);
        self.wide = Some(decoder);
        Ok(())
    }

    /// Brings the same sound at another rate to the level that [`Sender::level`] brought it to.
    pub(crate) fn level_wide(&self, pcm: &mut [f32], sample_rate: usize) {
        self.agc.again(pcm, sample_rate);
    }

    /// Brings the sound to the rung's level; returns the gain.
    pub(crate) fn level(&mut self, pcm: &mut [f32], rung: Rung) -> i8 {
        let voice = self.gate.content() == Content::Speech;
        self.agc.apply(pcm, voice, rung.levels())
    }

    /// Somebody speaks in the last group.
    pub(crate) fn voice(&self, listened: bool) -> bool {
        if listened {
            self.gate.voice()
        } else {
            self.loud
        }
    }

    /// Readies the encoder of a family. After a change it begins anew, as the receiver's decoder does, so that both agree from the
    /// first packet on.
    pub(crate) fn begin(
        &mut self,
        family: Family,
        neural: Option<&dyn Codec<Encoder = LyraEncoder, Decoder = LyraDecoder>>,
    ) -> Result<(), CodecError> {
        if self.family == Some(family) {
            return Ok(());
        }
        match (family, neural) {
            (Family::Opus, _) => match &mut self.opus {
                Some(encoder) => encoder.reset(),
                empty => *empty = Some(Opus.encoder()?),
            },
            (Family::Neural, Some(neural)) => match &mut self.lyra {
                Some(encoder) => encoder.reset(),
                empty => *empty = Some(neural.encoder()?),
            },
            (Family::Neural, None) => return Err(CodecError::Failed("no model".to_owned())),
        }
        self.family = Some(family);
        Ok(())
    }
}

/// Sound within ±1.
fn tame(pcm: &mut [f32]) {
    for sample in pcm {
        *sample = if sample.is_finite() {
            sample.clamp(-1.0, 1.0)
        } else {
            0.0
        };
    }
}

/// The samples of each packet, where all are mono Opus of one length that the ladder carries.
fn unit_of(packets: &[Vec<u8>]) -> Result<usize, Refusal> {
    let mut unit = None;
    for packet in packets {
        // One or two bytes are DTX: the packer sends them as they are.
        let (Some(toc), 3..) = (packet.first(), packet.len()) else {
            return Err(Refusal::Duration);
        };
        if is_encrypted(packet) {
            return Err(Refusal::Undecodable);
        }
        if toc & 0x04 != 0 {
            return Err(Refusal::Stereo);
        }
        let samples = opusic_c::utils::get_nb_samples(packet, SampleRate::Hz16000)
            .map_err(|_| Refusal::Undecodable)?;
        if ![FRAME / 2, FRAME, 2 * FRAME, 3 * FRAME, 6 * FRAME].contains(&samples)
            || unit.is_some_and(|unit| unit != samples)
        {
            return Err(Refusal::Duration);
        }
        unit = Some(samples);
    }
    unit.filter(|unit| packets.len() == 1 || unit * packets.len() <= LONGEST)
        .ok_or(Refusal::Duration)
}

/// LiveKit's end-to-end encryption leaves the first byte readable, so that the rest would decode to noise; but it ends with the
/// length of its initialization vector, 12, and the index of the key, below 16. One packet in 4,000 of plain Opus looks alike and
/// goes as it came, which does no harm.
fn is_encrypted(packet: &[u8]) -> bool {
    packet.len() > 14 && matches!(packet, [.., 12, 0..16])
}

/// The receiver's side.
#[derive(Debug)]
pub(crate) struct Receiver {
    /// Samples a second from the codecs to the local encoder: those of the neural codec that it knew last.
    rate: usize,
    /// What the neural codec delays by.
    delay: usize,
    pub(crate) lyra: Option<LyraDecoder>,
    opus: Option<Decoder>,
    family: Option<Family>,
    undo: Undo,
    /// To the listener's side.
    local: Option<SpeechEncoder>,
    /// The first packet of a codec is still to come out.
    fresh: bool,
}

impl Receiver {
    /// One at the beginning of a stream, for codecs of this rate.
    pub(crate) fn new(rate: usize) -> Self {
        Self {
            rate,
            delay: 0,
            lyra: None,
            opus: None,
            family: None,
            undo: Undo::default(),
            local: None,
            fresh: false,
        }
    }

    /// Samples a second of its sound.
    pub(crate) const fn rate(&self) -> usize {
        self.rate
    }

    const fn delay(&self, family: Family) -> usize {
        match family {
            Family::Neural => self.delay,
            Family::Opus => crate::opus::DELAY * self.rate / SAMPLE_RATE,
        }
    }

    pub(crate) const fn family(&self) -> Option<Family> {
        self.family
    }

    pub(crate) fn forget_models(&mut self) {
        self.lyra = None;
        if self.family == Some(Family::Neural) {
            self.family = None;
        }
    }

    /// Samples that a job stands for.
    pub(crate) fn samples(&self, job: &Decode) -> usize {
        self.unit(job) * usize::from(job.count)
    }

    fn unit(&self, job: &Decode) -> usize {
        usize::from(job.unit_ms) * self.rate / 1000
    }

    /// The codec that does a job, and the samples; none if nothing can be made of it.
    pub(crate) fn accept(&self, job: &Decode) -> Option<(Family, usize)> {
        let possible =
            matches!(job.unit_ms, 10 | 20 | 40 | 60 | 120) && (1..=4).contains(&job.count);
        let family = if job.lost {
            self.family
        } else {
            job.codec.is_coded().then(|| Family::of(job.codec))
        };
        family
            .filter(|_| possible)
            .map(|family| (family, self.samples(job)))
    }

    /// Readies the decoder of a family.
    pub(crate) fn begin(
        &mut self,
        family: Family,
        neural: Option<&dyn Codec<Encoder = LyraEncoder, Decoder = LyraDecoder>>,
    ) -> Result<(), CodecError> {
        if self.family == Some(family) {
            return Ok(());
        }
        match (family, neural) {
            (Family::Opus, _) => match &mut self.opus {
                Some(decoder) => decoder.reset(),
                empty => *empty = Some(Decoder::at(self.rate, Enhancement::Lace)?),
            },
            (Family::Neural, Some(neural)) => {
                let format = neural.format();
                self.delay = format.delay;
                if self.rate != format.sample_rate {
                    // Another bundle than when the stream began.
                    self.rate = format.sample_rate;
                    self.opus = None;
                    self.local = None;
                }
                match &mut self.lyra {
                    Some(decoder) => decoder.reset(),
                    empty => *empty = Some(neural.decoder()?),
                }
            }
            (Family::Neural, None) => return Err(CodecError::Failed("no model".to_owned())),
        }
        self.family = Some(family);
        self.fresh = true;
        Ok(())
    }

    /// What the neural codec makes up after its last packet.
    pub(crate) fn tail_neural(
        &mut self,
        neural: &mut dyn Codec<Encoder = LyraEncoder, Decoder = LyraDecoder>,
        tail: &mut Vec<f32>,
    ) {
        if let Some(state) = &mut self.lyra {
            let samples = neural.format().samples(20);
            let mut batch = [DecodeTask::new(state, CodecId::Lyra6, None, samples)];
            neural.decode(&mut batch);
            let [task] = batch;
            *tail = task.pcm;
        }
    }

    /// What Opus makes up after its last packet.
    pub(crate) fn tail_opus(&mut self, tail: &mut Vec<f32>) {
        if let Some(decoder) = &mut self.opus
            && decoder.conceal(self.rate / 50, tail).is_err()
        {
            tail.clear();
        }
    }

    /// Ends the codec before: its tail gets its gain back, the next begins with `gain`.
    pub(crate) fn turn(&mut self, gain: i8, tail: &mut [f32]) {
        self.undo.keep(tail);
        self.undo.restart(gain);
    }

    /// Decodes or conceals with Opus; says whether there is sound.
    pub(crate) fn decode_opus(
        &mut self,
        opus: &mut Opus,
        job: &Decode,
        pcm: &mut Vec<f32>,
    ) -> bool {
        let (unit, samples) = (self.unit(job), self.samples(job));
        let Some(state) = &mut self.opus else {
            return false;
        };
        if job.lost {
            // libopus conceals 120 ms at most at a time.
            return (0..job.count).all(|_| state.conceal(unit, pcm).is_ok());
        }
        let mut batch = [DecodeTask::new(
            state,
            job.codec,
            Some(&job.payload),
            samples,
        )];
        opus.decode(&mut batch);
        let [task] = batch;
        *pcm = task.pcm;
        task.done.is_ok()
    }

    /// Takes the gain back, fades over from `tail`, and encodes an Opus packet for each original; with the level of each, and
    /// whether it is loud enough to be a voice.
    pub(crate) fn finish(
        &mut self,
        job: &Decode,
        family: Family,
        pcm: &mut [f32],
        tail: &[f32],
        (bitrate, complexity): (u32, u8),
    ) -> Option<(Vec<Vec<u8>>, Vec<u8>, bool)> {
        let (unit, delay) = (self.unit(job), self.delay(family));
        if job.lost {
            self.undo.keep(pcm);
        } else {
            if self.fresh {
                self.undo.restart(job.gain);
                self.fresh = false;
            }
            self.undo.apply(pcm, job.gain, delay, self.rate);
        }
        if !tail.is_empty() {
            crossfade(tail, pcm, delay, ramp_at(self.rate));
        }
        for sample in pcm.iter_mut() {
            *sample = sample.clamp(-1.0, 1.0);
        }
        if self.local.is_none() {
            self.local = SpeechEncoder::local(self.rate, bitrate, complexity).ok();
        }
        let local = self.local.as_mut()?;
        let (mut packets, mut levels) = (Vec::new(), Vec::new());
        let mut voice = false;
        for original in pcm.chunks_exact(unit) {
            packets.push(local.encode(original).ok()?);
            let level = agc::level(original);
            voice |= level > LOUD;
            levels.push((-level).round().clamp(0.0, 127.0) as u8);
        }
        Some((packets, levels, voice))
    }
}

/// From the old codec's tail to the new one's sound, within `ramp` samples. The new one is silent for its first `delay` samples, so that the
/// old one goes on alone for as long.
fn crossfade(tail: &[f32], pcm: &mut [f32], delay: usize, ramp: usize) {
    for (k, (new, old)) in pcm.iter_mut().zip(tail).take(delay + ramp).enumerate() {
        let part = k.saturating_sub(delay) as f32 / ramp as f32;
        *new = *new * part + *old * (1.0 - part);
    }
}
