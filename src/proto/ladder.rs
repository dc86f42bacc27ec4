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
    /// Lyra v2, 16 quantizer stages: 8 bytes a frame of 20 ms (3.2 kbps).
    Lyra3 = 2,
    /// Lyra v2, 30 quantizer stages: 15 bytes a frame of 20 ms (6 kbps).
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

/// A step of the ladder: 0 is native, 1 the cheapest, 6 the best that is coded. 4 bits on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Rung(u8);

impl Rung {
    /// Media as it came.
    pub const NATIVE: Self = Self(0);
    /// Lyra 3.2 kbps.
    pub const L1: Self = Self(1);
    /// Lyra 6 kbps.
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

    /// Bits a second of coded speech, without headers; 0 for native.
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
        matches!(self.0, 1..=4)
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
    fn a_missing_rung_is_replaced_by_a_better_one() {
        assert_eq!(Rungs::ALL.at_least(Rung::L2), Rung::L2);
        assert_eq!(Rungs::OPUS.at_least(Rung::L2), Rung::L3);
        assert_eq!(Rungs::NONE.at_least(Rung::L2), Rung::NATIVE);
        assert_eq!(Rungs::ALL.at_least(Rung::NATIVE), Rung::NATIVE);
        assert_eq!(Rungs::NONE.with(Rung::L1).at_least(Rung::L2), Rung::NATIVE);
    }
}
