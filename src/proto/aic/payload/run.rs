//! The short form of a payload's header: where packets go on as those before them, one byte says so.

use super::{Body, Part, Payload, Unreadable, check_coded};
use crate::ladder::{CodecId, Frames};

/// The most packets back that a short header can speak of.
pub const MAX_BACK: u8 = 63;

/// Set in the first byte of a short header; codecs of the whole form have numbers below 8.
const SHORT: u8 = 0x80;
/// A gain follows.
const GAIN: u8 = 0x40;

/// A short header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Short {
    /// So many framed packets before this one, at least, belong to its run, 1 to [`MAX_BACK`].
    pub back: u8,
    /// Gain of this packet, where it isn't the run's.
    pub gain: Option<i8>,
}

impl Short {
    /// The header of a payload that has the short form, and its media. None: it has the whole form.
    ///
    /// # Errors
    /// Why it is no payload.
    pub fn parse(payload: &[u8]) -> Option<Result<(Self, &[u8]), Unreadable>> {
        let (first, rest) = payload
            .split_first()
            .filter(|(first, _)| **first & SHORT != 0)?;
        let back = first & MAX_BACK;
        if back == 0 {
            return Some(Err(Unreadable::Run));
        }
        if first & GAIN == 0 {
            return Some(Ok((Self { back, gain: None }, rest)));
        }
        let Some((gain, media)) = rest.split_first() else {
            return Some(Err(Unreadable::Short));
        };
        let gain = Some(gain.cast_signed());
        Some(if gain.is_some_and(|gain| !(-32..=31).contains(&gain)) {
            Err(Unreadable::Run)
        } else {
            Ok((Self { back, gain }, media))
        })
    }

    /// Appends the header and the media of a coded `part` to `out`.
    pub fn write(self, part: &Part<Vec<u8>>, out: &mut Vec<u8>) {
        let back = self.back.clamp(1, MAX_BACK);
        match self.gain {
            None => out.push(SHORT | back),
            Some(gain) => out.extend([SHORT | GAIN | back, gain.cast_unsigned()]),
        }
        out.extend(part.body.payload());
    }
}

/// What a coded packet with a whole header says of its run: those after it are read by any one of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Anchor {
    /// Its sequence number on the hop.
    hop: u16,
    timestamp: u32,
    sequence: u16,
    packets: u8,
    red: bool,
    codec: CodecId,
    unit_ms: u8,
    gain: i8,
}

impl Anchor {
    /// Of a coded packet.
    #[must_use]
    pub fn new<B>(hop: u16, timestamp: u32, part: &Part<B>) -> Option<Self> {
        let Body::Coded {
            codec,
            unit_ms,
            gain,
            ..
        } = part.body
        else {
            return None;
        };
        Some(Self {
            hop,
            timestamp,
            sequence: part.sequence,
            packets: part.packets,
            red: part.red,
            codec,
            unit_ms,
            gain,
        })
    }

    /// Ticks of the RTP clock that it covers.
    fn ticks(&self) -> u32 {
        u32::from(self.packets) * u32::from(self.unit_ms) * super::TICKS_PER_MS
    }

    /// Whether `next`, sent right after this one, belongs to the same run: only its payload and gain are its own.
    #[must_use]
    pub fn goes_on(&self, next: &Self) -> bool {
        next.hop == self.hop.wrapping_add(1)
            && next.timestamp == self.timestamp.wrapping_add(self.ticks())
            && next.sequence == self.sequence.wrapping_add(u16::from(self.packets))
            && (next.packets, next.red, next.unit_ms) == (self.packets, self.red, self.unit_ms)
            && next.is_neural() == self.is_neural()
    }

    /// Gain of its packet.
    #[must_use]
    pub const fn gain(&self) -> i8 {
        self.gain
    }

    /// Packets of the hop from this one to `hop`.
    #[must_use]
    pub const fn before(&self, hop: u16) -> u16 {
        hop.wrapping_sub(self.hop)
    }

    const fn is_neural(&self) -> bool {
        matches!(self.codec, CodecId::Lyra3 | CodecId::Lyra6)
    }

    /// What a packet with a short header stands for. `hop` and `timestamp` are from its RTP header.
    ///
    /// # Errors
    /// It isn't of this run, or its media isn't of the codec.
    pub fn read<'a>(
        &self,
        (hop, timestamp): (u16, u32),
        short: Short,
        media: &'a [u8],
        frames: Frames,
    ) -> Result<Payload<'a>, Unreadable> {
        let apart = self.before(hop);
        let ticks = u32::from(apart).wrapping_mul(self.ticks());
        if !(1..=u16::from(short.back)).contains(&apart)
            || timestamp.wrapping_sub(self.timestamp) != ticks
        {
            return Err(Unreadable::Run);
        }
        // The two neural codecs have frames of different lengths, so that the bytes tell which it is.
        let ms = u32::from(self.packets) * u32::from(self.unit_ms);
        let codec = if self.is_neural() {
            [CodecId::Lyra3, CodecId::Lyra6]
                .into_iter()
                .find(|codec| frames.len(*codec, ms) == Some(media.len()))
                .ok_or(Unreadable::Length)?
        } else {
            self.codec
        };
        check_coded(codec, self.packets, self.unit_ms, media.len(), frames)?;
        Ok(Payload {
            part: Part {
                sequence: self
                    .sequence
                    .wrapping_add(apart.wrapping_mul(u16::from(self.packets))),
                packets: self.packets,
                red: self.red,
                body: Body::Coded {
                    codec,
                    unit_ms: self.unit_ms,
                    gain: short.gain.unwrap_or(self.gain),
                    payload: media,
                },
            },
            redundant: None,
            skipped: false,
        })
    }
}
