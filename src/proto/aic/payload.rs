//! The payload of a framed packet: what the hop between two AuraLinks carries instead of the
//! originals. Every payload describes itself. docs/protocol.md is its specification.

mod run;

pub use run::{Anchor, MAX_BACK, Short};

use crate::ladder::{CodecId, Frames};

/// Ticks of Opus' RTP clock in a millisecond (RFC 7587 section 4.1: 48 kHz).
pub const TICKS_PER_MS: u32 = 48;

/// The longest time that one payload may cover, in milliseconds: the longest Opus packet.
pub const MAX_MS: u32 = 120;

/// The longest original payload that is carried without the zero bytes at its end.
pub const MAX_TRIMMED: u16 = 1500;

/// Bytes of the longest Opus packet of one stream (RFC 6716 section 3.4, three frames of 20 ms).
const MAX_OPUS: usize = 3 * 1275;

/// What one framed packet, or a copy in it, stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part<B> {
    /// Original sequence number of the first original.
    pub sequence: u16,
    /// Originals covered, 1 to 4.
    pub packets: u8,
    /// The originals were RED: they are restored as RED that holds the primary alone.
    pub red: bool,
    /// What they are coded with, and the bytes.
    pub body: Body<B>,
}

/// The coded or original media. `B` is `&[u8]` or `Vec<u8>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Body<B> {
    /// One original as it came.
    Native {
        /// Its payload type; of an original that was RED: the primary block's.
        payload_type: u8,
        /// Its marker bit.
        marker: bool,
        /// Length of the original payload, where it ended in zero bytes that are not carried.
        trimmed_from: Option<u16>,
        /// Its payload; of RED the primary block's data.
        payload: B,
    },
    /// Speech that an engine has to decode.
    Coded {
        /// A codec for which [`CodecId::is_coded`] holds.
        codec: CodecId,
        /// Duration of each original in milliseconds: 20, 40 or 60; or 10, of two or four; or 120, of one.
        unit_ms: u8,
        /// Gain that the sender applied before coding, −32 to 31 dB; the receiver undoes it.
        gain: i8,
        /// The codec's bytes, all frames after each other.
        payload: B,
    },
}

impl<B: AsRef<[u8]>> Body<B> {
    /// Number on the wire.
    #[must_use]
    pub fn codec(&self) -> CodecId {
        match self {
            Self::Native {
                trimmed_from: None, ..
            } => CodecId::Native,
            Self::Native { .. } => CodecId::Trimmed,
            Self::Coded { codec, .. } => *codec,
        }
    }

    /// The bytes.
    #[must_use]
    pub fn payload(&self) -> &[u8] {
        match self {
            Self::Native { payload, .. } | Self::Coded { payload, .. } => payload.as_ref(),
        }
    }
}

impl Part<&[u8]> {
    /// The same with its bytes copied.
    #[must_use]
    pub fn to_owned(&self) -> Part<Vec<u8>> {
        let body = match &self.body {
            Body::Native {
                payload_type,
                marker,
                trimmed_from,
                payload,
            } => Body::Native {
                payload_type: *payload_type,
                marker: *marker,
                trimmed_from: *trimmed_from,
                payload: payload.to_vec(),
            },
            Body::Coded {
                codec,
                unit_ms,
                gain,
                payload,
            } => Body::Coded {
                codec: *codec,
                unit_ms: *unit_ms,
                gain: *gain,
                payload: payload.to_vec(),
            },
        };
        Part {
            sequence: self.sequence,
            packets: self.packets,
            red: self.red,
            body,
        }
    }
}

/// A copy of an earlier framed packet, carried in front of a packet's own media.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Redundant<B> {
    /// How many framed packets before this one it was sent, 1 to 7.
    pub hop_distance: u8,
    /// RTP timestamp of this packet less that of the copied one.
    pub ticks_back: u32,
    /// What it stood for. Its sequence number is at most 31 before this packet's.
    pub part: Part<B>,
}

/// A framed payload as read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Payload<'a> {
    /// The packet's own media.
    pub part: Part<&'a [u8]>,
    /// A copy of an earlier packet.
    pub redundant: Option<Redundant<&'a [u8]>>,
    /// There is a copy that this version can't read; the packet's own media isn't concerned.
    pub skipped: bool,
}

/// Why a framed payload can't be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unreadable {
    /// It ends inside a header.
    #[error("a framed payload ends inside its header")]
    Short,
    /// A codec of another version.
    #[error("a framed payload has the unknown codec {0}")]
    Codec(u8),
    /// The duration that is reserved, or more than 120 ms in all.
    #[error("a framed payload has no valid duration")]
    Duration,
    /// A native payload says that it covers several originals.
    #[error("a native payload covers several originals")]
    Count,
    /// As many bytes as the codec can't have written for that duration.
    #[error("a framed payload has a wrong number of bytes for its codec")]
    Length,
    /// A short header, and none of the whole ones that it could be read by came, or it reaches back to none.
    #[error("a framed payload goes on as packets that never came")]
    Run,
    /// The copy doesn't end inside the payload, or its distance is 0.
    #[error("a framed payload has a broken copy")]
    Redundant,
}

/// What can't be written: a field is out of its range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a field of a framed payload is out of its range")]
pub struct Unwritable;

impl<'a> Payload<'a> {
    /// Reads a framed payload. `frames` are those of the bundle that both sides agreed on.
    ///
    /// # Errors
    /// Why it can't be used.
    pub fn parse(payload: &'a [u8], frames: Frames) -> Result<Self, Unreadable> {
        let &[first, s1, s0, last, ref rest @ ..] = payload else {
            return Err(Unreadable::Short);
        };
        let codec = CodecId::from_wire(first >> 4).ok_or(Unreadable::Codec(first >> 4))?;
        let packets = (first >> 2 & 3) + 1;
        let red = first & 2 != 0;
        let sequence = u16::from_be_bytes([s1, s0]);
        let mut rest = rest;
        let mut trimmed_from = None;
        if codec == CodecId::Trimmed {
            let &[l1, l0, ref after @ ..] = rest else {
                return Err(Unreadable::Short);
            };
            trimmed_from = Some(u16::from_be_bytes([l1, l0]));
            rest = after;
        }
        let mut copy = None;
        let mut skipped = false;
        if first & 1 != 0 {
            let (read, after) = parse_redundant(rest, sequence, frames)?;
            skipped = read.is_none();
            copy = read;
            rest = after;
        }
        let body = body(codec, packets, last, trimmed_from, rest, frames)?;
        Ok(Self {
            part: Part {
                sequence,
                packets,
                red,
                body,
            },
            redundant: copy,
            skipped,
        })
    }
}

/// Checks and puts together a body.
fn body(
    codec: CodecId,
    packets: u8,
    last: u8,
    trimmed_from: Option<u16>,
    payload: &[u8],
    frames: Frames,
) -> Result<Body<&[u8]>, Unreadable> {
    if !codec.is_coded() {
        if packets != 1 {
            return Err(Unreadable::Count);
        }
        if !fits_trimmed(trimmed_from, payload.len()) {
            return Err(Unreadable::Length);
        }
        return Ok(Body::Native {
            payload_type: last >> 1,
            marker: last & 1 != 0,
            trimmed_from,
            payload,
        });
    }
    let unit_ms = unit(last >> 6, packets).ok_or(Unreadable::Duration)?;
    let body = Body::Coded {
        codec,
        unit_ms,
        // The low six bits, two's complement.
        gain: (last << 2).cast_signed() >> 2,
        payload,
    };
    check_coded(codec, packets, unit_ms, payload.len(), frames)?;
    Ok(body)
}

/// Milliseconds of each of `packets` originals, from the two bits that say it.
const fn unit(bits: u8, packets: u8) -> Option<u8> {
    match (bits, packets) {
        (0, _) => Some(20),
        (1, _) => Some(40),
        (2, _) => Some(60),
        // Four of 2.5 or 5 ms would be too few to be worth it, and three of 10 ms are no Opus packet.
        (3, 2 | 4) => Some(10),
        (3, 1) => Some(120),
        _ => None,
    }
}

/// Whether `len` bytes can be left of a payload of `from` bytes.
fn fits_trimmed(from: Option<u16>, len: usize) -> bool {
    from.is_none_or(|from| from <= MAX_TRIMMED && len <= usize::from(from))
}

/// Whether `len` bytes can be `packets` originals of `unit_ms` each.
fn check_coded(
    codec: CodecId,
    packets: u8,
    unit_ms: u8,
    len: usize,
    frames: Frames,
) -> Result<(), Unreadable> {
    let ms = u32::from(packets) * u32::from(unit_ms);
    if ms > MAX_MS {
        return Err(Unreadable::Duration);
    }
    let fits = match frames.each(codec) {
        Some(_) => frames.len(codec, ms) == Some(len),
        None => (1..=MAX_OPUS).contains(&len),
    };
    if fits {
        Ok(())
    } else {
        Err(Unreadable::Length)
    }
}

/// A copy, if this version knows its kind, and what comes after it.
type ReadRedundant<'a> = (Option<Redundant<&'a [u8]>>, &'a [u8]);

fn parse_redundant(
    rest: &[u8],
    sequence: u16,
    frames: Frames,
) -> Result<ReadRedundant<'_>, Unreadable> {
    let &[first, distances, last, ref rest @ ..] = rest else {
        return Err(Unreadable::Short);
    };
    let (hop_distance, originals) = (distances >> 5, distances & 0x1f);
    if hop_distance == 0 || originals == 0 {
        return Err(Unreadable::Redundant);
    }
    let packets = (first >> 2 & 3) + 1;
    let mut rest = rest;
    let mut ticks = None;
    if first & 1 != 0 {
        let &[t1, t0, ref after @ ..] = rest else {
            return Err(Unreadable::Short);
        };
        ticks = Some(u32::from(u16::from_be_bytes([t1, t0])));
        rest = after;
    }
    let codec = CodecId::from_wire(first >> 4);
    let len = if codec == Some(CodecId::Lyra3) {
        unit(last >> 6, packets)
            .and_then(|unit| frames.len(CodecId::Lyra3, u32::from(unit) * u32::from(packets)))
            .ok_or(Unreadable::Redundant)?
    } else {
        let &[len, ref after @ ..] = rest else {
            return Err(Unreadable::Short);
        };
        rest = after;
        usize::from(len)
    };
    let (bytes, after) = rest.split_at_checked(len).ok_or(Unreadable::Redundant)?;
    let copy = codec
        .filter(|codec| *codec != CodecId::Trimmed)
        .and_then(|codec| body(codec, packets, last, None, bytes, frames).ok())
        .and_then(|body| {
            let ticks_back = match (&body, ticks) {
                (_, Some(ticks)) => ticks,
                (Body::Coded { unit_ms, .. }, None) => {
                    u32::from(originals) * u32::from(*unit_ms) * TICKS_PER_MS
                }
                // A native copy doesn't say how long it is.
                (Body::Native { .. }, None) => return None,
            };
            Some(Redundant {
                hop_distance,
                ticks_back,
                part: Part {
                    sequence: sequence.wrapping_sub(u16::from(originals)),
                    packets,
                    red: first & 2 != 0,
                    body,
                },
            })
        });
    Ok((copy, after))
}

/// The first byte of a header and its last: what a packet and a copy share.
fn ends<B: AsRef<[u8]>>(part: &Part<B>, frames: Frames) -> Result<(u8, u8), Unwritable> {
    if !(1..=4).contains(&part.packets) {
        return Err(Unwritable);
    }
    let last = match &part.body {
        Body::Native {
            payload_type,
            marker,
            trimmed_from,
            payload,
        } => {
            let len = payload.as_ref().len();
            if part.packets != 1 || *payload_type > 127 || !fits_trimmed(*trimmed_from, len) {
                return Err(Unwritable);
            }
            payload_type << 1 | u8::from(*marker)
        }
        Body::Coded {
            codec,
            unit_ms,
            gain,
            payload,
        } => {
            if !codec.is_coded() || !(-32..=31).contains(gain) {
                return Err(Unwritable);
            }
            let is_it = |bits: &u8| unit(*bits, part.packets) == Some(*unit_ms);
            let unit = (0..4).find(is_it).ok_or(Unwritable)?;
            let len = payload.as_ref().len();
            check_coded(*codec, part.packets, *unit_ms, len, frames).map_err(|_| Unwritable)?;
            unit << 6 | gain.cast_unsigned() & 0x3f
        }
    };
    let first = (part.body.codec() as u8) << 4 | (part.packets - 1) << 2 | u8::from(part.red) << 1;
    Ok((first, last))
}

impl<B: AsRef<[u8]>> Part<B> {
    /// Appends the framed payload with an optional copy to `out`. `frames` are those of the bundle that both sides agreed on.
    ///
    /// # Errors
    /// A field is out of its range, or the copy's sequence number isn't 1 to 31 before this one's;
    /// `out` is as it was.
    pub fn write<C: AsRef<[u8]>>(
        &self,
        copy: Option<&Redundant<C>>,
        frames: Frames,
        out: &mut Vec<u8>,
    ) -> Result<(), Unwritable> {
        let (first, last) = ends(self, frames)?;
        let start = out.len();
        let [s1, s0] = self.sequence.to_be_bytes();
        out.extend([first | u8::from(copy.is_some()), s1, s0, last]);
        if let Body::Native {
            trimmed_from: Some(from),
            ..
        } = self.body
        {
            out.extend(from.to_be_bytes());
        }
        if let Some(copy) = copy
            && let Err(error) = write_redundant(copy, self.sequence, frames, out)
        {
            out.truncate(start);
            return Err(error);
        }
        out.extend(self.body.payload());
        Ok(())
    }
}

fn write_redundant<B: AsRef<[u8]>>(
    copy: &Redundant<B>,
    sequence: u16,
    frames: Frames,
    out: &mut Vec<u8>,
) -> Result<(), Unwritable> {
    let part = &copy.part;
    let (first, last) = ends(part, frames)?;
    let originals = sequence.wrapping_sub(part.sequence);
    if !(1..=31).contains(&originals)
        || !(1..=7).contains(&copy.hop_distance)
        || part.body.codec() == CodecId::Trimmed
    {
        return Err(Unwritable);
    }
    let implied = match part.body {
        Body::Coded { unit_ms, .. } => {
            Some(u32::from(originals) * u32::from(unit_ms) * TICKS_PER_MS)
        }
        Body::Native { .. } => None,
    };
    let ticks = if implied == Some(copy.ticks_back) {
        None
    } else {
        Some(u16::try_from(copy.ticks_back).map_err(|_| Unwritable)?)
    };
    // At most 31: checked above.
    let originals = u8::try_from(originals).map_err(|_| Unwritable)?;
    out.extend([
        first | u8::from(ticks.is_some()),
        copy.hop_distance << 5 | originals,
        last,
    ]);
    if let Some(ticks) = ticks {
        out.extend(ticks.to_be_bytes());
    }
    let payload = part.body.payload();
    if part.body.codec() != CodecId::Lyra3 {
        out.push(u8::try_from(payload.len()).map_err(|_| Unwritable)?);
    }
    out.extend(payload);
    Ok(())
}

#[cfg(test)]
mod tests;
