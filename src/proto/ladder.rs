//! The ladder of rungs between native media and the cheapest, and the codecs on them.
//! `docs/protocol.md` lists them with what they cost.

use std::fmt;
use std::str::FromStr;

/// What an AIC payload is coded with: 4 bits of its first byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum CodecId {
    /// The original payload as it came.
    Native = 0,
    /// The original payload without the zero bytes at its end: LiveKit's silence.
    Trimmed = 1,
    /// The codec of the agreed bundle at L1 ([`Frames`]); Lyra v2 with 16 quantizer stages (3.2 kbps) where it is `lyra2`.
    Lyra3 = 2,
    /// The codec of the agreed bundle at L2; Lyra v2 with 30 quantizer stages (6 kbps) where it is `lyra2`.
    Lyra6 = 3,
    /// Opus (RFC 6716), wideband speech; one packet whatever its duration.
    Opus = 4,
}

impl CodecId {
    /// From its number on the wire.
    #[must_use]
    pub const fn from_wire(number: u8) -> Option<Self> {
        Some(match number {
            0 => Self::Native,
            1 => Self::Trimmed,
            2 => Self::Lyra3,
            3 => Self::Lyra6,
            4 => Self::Opus,
            _ => return None,
        })
    }

    /// Its payload is speech that an engine has to decode.
    #[must_use]
    pub const fn is_coded(self) -> bool {
        matches!(self, Self::Lyra3 | Self::Lyra6 | Self::Opus)
    }
}

/// How the codec of a bundle (docs/models.md) lays speech out on the rungs L1 and L2: frames of one duration, each of as many
/// bytes as its rung has. A frame of L1 is the first bytes of the same frame of L2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frames {
    ticks: u16,
    l1: u8,
    l2: u8,
}

impl Frames {
    /// Those of Lyra v2: 20 ms, 8 and 15 bytes.
    pub const LYRA: Self = Self {
        ticks: 960,
        l1: 8,
        l2: 15,
    };

    /// Frames of `ticks` of a 48 kHz clock with `l1` and `l2` bytes. None where a packet of 40 ms is no whole number of them, or
    /// `l2` isn't more than `l1`.
    #[must_use]
    pub fn new(ticks: usize, l1: usize, l2: usize) -> Option<Self> {
        let frames = Self {
            ticks: u16::try_from(ticks).ok().filter(|ticks| *ticks > 0)?,
            l1: u8::try_from(l1).ok().filter(|l1| *l1 > 0)?,
            l2: u8::try_from(l2).ok()?,
        };
        (frames.l1 < frames.l2 && frames.within(40).is_some()).then_some(frames)
    }

    /// All of it in one number.
    #[must_use]
    pub fn to_bits(self) -> u32 {
        u32::from(self.ticks) << 16 | u32::from(self.l1) << 8 | u32::from(self.l2)
    }

    /// Back from [`Frames::to_bits`].
    #[must_use]
    pub fn from_bits(bits: u32) -> Option<Self> {
        let [t1, t0, l1, l2] = bits.to_be_bytes();
        Self::new(
            usize::from(u16::from_be_bytes([t1, t0])),
            usize::from(l1),
            usize::from(l2),
        )
    }

    /// Bytes of one frame, where `codec` is that of L1 or L2.
    #[must_use]
    pub const fn each(self, codec: CodecId) -> Option<usize> {
        match codec {
            CodecId::Lyra3 => Some(self.l1 as usize),
            CodecId::Lyra6 => Some(self.l2 as usize),
            _ => None,
        }
    }

    /// How many frames `ms` milliseconds are; none where that is no whole number.
    #[must_use]
    pub const fn within(self, ms: u32) -> Option<usize> {
        let ticks = ms * 48;
        if ticks.is_multiple_of(self.ticks as u32) {
            Some((ticks / self.ticks as u32) as usize)
        } else {
            None
        }
    }

    /// Bytes of `ms` milliseconds of `codec`; none where it isn't that of L1 or L2, or that is no whole number of frames.
    #[must_use]
    pub fn len(self, codec: CodecId, ms: u32) -> Option<usize> {
        Some(self.each(codec)? * self.within(ms)?)
    }
}

/// A step of the ladder: 0 is native, 1 the cheapest, 6 the best that is coded. 4 bits on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Rung(u8);

impl Rung {
    /// Media as it came.
    pub const NATIVE: Self = Self(0);
    /// The codec of the bundle, the cheap way: Lyra 3.2 kbps.
    pub const L1: Self = Self(1);
    /// The codec of the bundle, the better way: Lyra 6 kbps.
    pub const L2: Self = Self(2);
    /// Opus 9 kbps.
    pub const L3: Self = Self(3);
    /// Opus 12 kbps: the lowest one that music and noise may use.
    pub const L4: Self = Self(4);
    /// Opus 16 kbps.
    pub const L5: Self = Self(5);
    /// Opus 20 kbps.
    pub const L6: Self = Self(6);
    /// Every coded rung, the cheapest first.
    pub const CODED: [Self; 6] = [Self::L1, Self::L2, Self::L3, Self::L4, Self::L5, Self::L6];

    /// From its number; none beyond 6.
    #[must_use]
    pub const fn new(number: u8) -> Option<Self> {
        if number <= 6 {
            Some(Self(number))
        } else {
            None
        }
    }

    /// Its number.
    #[must_use]
    pub const fn number(self) -> u8 {
        self.0
    }

    /// What it is coded with.
    #[must_use]
    pub const fn codec(self) -> CodecId {
        match self.0 {
            0 => CodecId::Native,
            1 => CodecId::Lyra3,
            2 => CodecId::Lyra6,
            _ => CodecId::Opus,
        }
    }

    /// It needs a model (ONNX Runtime), not only libopus.
    #[must_use]
    pub const fn is_neural(self) -> bool {
        matches!(self.0, 1 | 2)
    }

    /// Bits a second of coded speech, without headers; 0 for native. L1 and L2: those of Lyra v2.
    #[must_use]
    pub const fn bitrate(self) -> u32 {
        match self.0 {
            1 => 3_200,
            2 => 6_000,
            3 => 9_000,
            4 => 12_000,
            5 => 16_000,
            6 => 20_000,
            _ => 0,
        }
    }

    /// Speech is brought to a working level before it is coded, and the gain is sent along.
    #[must_use]
    pub const fn levels(self) -> bool {
        matches!(self.0, 1..=5)
    }
}

impl fmt::Display for Rung {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => f.write_str("native"),
            n => write!(f, "L{n}"),
        }
    }
}

/// A name that is no rung's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a rung (allowed: L1 to L6)")]
pub struct NotARung;

impl FromStr for Rung {
    type Err = NotARung;

    fn from_str(text: &str) -> Result<Self, NotARung> {
        text.strip_prefix('L')
            .and_then(|number| number.parse().ok())
            .filter(|number| *number > 0)
            .and_then(Self::new)
            .ok_or(NotARung)
    }
}

/// A set of rungs, as one side says what it can decode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Rungs(u16);

impl Rungs {
    /// None: native only.
    pub const NONE: Self = Self(0);
    /// Those that libopus alone decodes.
    pub const OPUS: Self = Self(0b111_1000);
    /// All six.
    pub const ALL: Self = Self(0b111_1110);

    /// With `rung` in it.
    #[must_use]
    pub const fn with(self, rung: Rung) -> Self {
        Self(self.0 | 1 << rung.0)
    }

    /// Whether `rung` is in it; native always is.
    #[must_use]
    pub const fn has(self, rung: Rung) -> bool {
        rung.0 == 0 || self.0 & 1 << rung.0 != 0
    }

    /// Those in both.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// No coded rung is in it.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 & 0b111_1110 == 0
    }

    /// The coded rungs in it, the cheapest first.
    pub fn iter(self) -> impl Iterator<Item = Rung> {
        Rung::CODED.into_iter().filter(move |rung| self.has(*rung))
    }

    /// The best substitute for `wanted`: itself, else the next better one that is in it, else native.
    #[must_use]
    pub fn at_least(self, wanted: Rung) -> Rung {
        self.iter()
            .find(|rung| *rung >= wanted && wanted != Rung::NATIVE)
            .unwrap_or(Rung::NATIVE)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn names_are_read_back() {
        for rung in Rung::CODED {
            assert_eq!(rung.to_string().parse::<Rung>().unwrap(), rung);
        }
        for wrong in ["L0", "L7", "l2", "2", "native", ""] {
            assert_eq!(wrong.parse::<Rung>(), Err(NotARung), "{wrong}");
        }
    }

    #[test]
    fn frames_fill_packets() {
        // EnCodec: 24 kHz, 320 samples, 75 frames a second.
        let encodec = Frames::new(640, 5, 10).unwrap();
        assert_eq!(Frames::from_bits(encodec.to_bits()), Some(encodec));
        assert_eq!(encodec.within(40), Some(3));
        assert_eq!(encodec.within(20), None);
        assert_eq!(encodec.len(CodecId::Lyra6, 40), Some(30));
        assert_eq!(encodec.len(CodecId::Lyra3, 60), None);
        assert_eq!(encodec.len(CodecId::Opus, 40), None);
        assert_eq!(Frames::new(960, 8, 15), Some(Frames::LYRA));
        for (ticks, l1, l2) in [
            (0, 8, 15),
            (1000, 8, 15),
            (65_536, 8, 15),
            (960, 0, 15),
            (960, 15, 15),
            (960, 8, 256),
        ] {
            assert_eq!(Frames::new(ticks, l1, l2), None, "{ticks}, {l1}, {l2}");
        }
    }

    #[test]
    fn a_missing_rung_is_replaced_by_a_better_one() {
        assert_eq!(Rungs::ALL.at_least(Rung::L2), Rung::L2);
        assert_eq!(Rungs::OPUS.at_least(Rung::L2), Rung::L3);
        assert_eq!(Rungs::NONE.at_least(Rung::L2), Rung::NATIVE);
        assert_eq!(Rungs::ALL.at_least(Rung::NATIVE), Rung::NATIVE);
        assert_eq!(Rungs::NONE.with(Rung::L1).at_least(Rung::L2), Rung::NATIVE);
    }
}
