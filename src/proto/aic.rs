//! The AIC hint, an RTP header extension (RFC 8285) of some framed packets. docs/protocol.md is its
//! specification.

pub mod payload;

use std::time::Duration;

/// URN of the extension in `a=extmap`.
pub const EXTENSION_URI: &str = "urn:auralink:params:rtp-hdrext:aic-hint:1";

/// Bytes of the extension element's data.
pub const HINT_LEN: usize = 3;

/// A hint tells the send time in 2⁵ / 65,536 s, half a millisecond, and 12 bits of it: 2 s.
const SENT_SHIFT: u32 = 5;

/// What a framed packet's sender says of it and of the stream, where it says something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hint {
    /// Rung of the ladder, 4 bits; 0 is native.
    pub rung: u8,
    /// There is speech in it.
    pub voice: bool,
    /// It carries a copy of an earlier packet.
    pub redundancy: bool,
    /// Predicted compression ratio, bytes sent over bytes native, in 1/255; the lower 2 bits are not sent.
    pub ratio: u8,
    /// When it was sent: the middle 32 bits of an NTP timestamp (RFC 3550 section 4). Of a hint that was read, what it
    /// says of them, the others zero: see [`Hint::sent_difference`].
    pub sent: u32,
}

impl Hint {
    /// The element's data: rung, flags, the upper 6 bits of the ratio, 12 bits of the send time.
    #[must_use]
    pub fn to_bytes(self) -> [u8; HINT_LEN] {
        let flags = u32::from(self.voice) << 1 | u32::from(self.redundancy);
        let sent = self.sent >> SENT_SHIFT & 0xfff;
        let whole = u32::from(self.rung & 0x0f) << 20
            | flags << 18
            | u32::from(self.ratio >> 2) << 12
            | sent;
        let [_, a, b, c] = whole.to_be_bytes();
        [a, b, c]
    }

    /// Reads the element's data; another length than [`HINT_LEN`] is none of this version.
    #[must_use]
    pub fn parse(data: &[u8]) -> Option<Self> {
        let &[a, b, c]: &[u8; HINT_LEN] = data.try_into().ok()?;
        // 6 bits that mean 0 to 1, as 8 do.
        let ratio = (a & 0x03) << 4 | b >> 4;
        let sent = u32::from(b & 0x0f) << 8 | u32::from(c);
        Some(Self {
            rung: a >> 4,
            voice: a & 0x08 != 0,
            redundancy: a & 0x04 != 0,
            ratio: ratio << 2 | ratio >> 4,
            sent: sent << SENT_SHIFT,
        })
    }

    /// What of the difference between two times in 1/65,536 s hints can tell: up to a second either way.
    #[must_use]
    pub const fn sent_difference(difference: u32) -> i32 {
        const UNSAID: u32 = 32 - 12 - SENT_SHIFT;
        (difference << UNSAID).cast_signed() >> UNSAID
    }
}

/// When a stream's packets carry the hint: the first one, those that say another rung or V of coded speech than was said last,
/// two after each of these, because it may be lost, and one a second. The rest goes without: it is a tenth of a packet.
#[derive(Debug, Clone, Copy, Default)]
pub struct HintPace {
    /// Rung and V of the coded packet that was last spoken of.
    said: Option<(u8, bool)>,
    /// How often that is still to be said again.
    again: u8,
    /// When the last hint went: the middle 32 bits of the NTP time.
    last: Option<u32>,
}

/// A hint goes at least so often while packets go, in 1/65,536 s: a second. Less would be more than its send time can tell.
const HINT_EVERY: u32 = 1 << 16;

/// Packets after a change that say it again.
const HINT_AGAIN: u8 = 2;

impl HintPace {
    /// Whether the packet that goes at `ntp`, the middle 32 bits of the NTP time, carries the hint. `coded` are rung and V of a coded
    /// one; of a native one its payload tells as much.
    pub fn wants(&mut self, ntp: u32, coded: Option<(u8, bool)>) -> bool {
        let due = self
            .last
            .is_none_or(|last| ntp.wrapping_sub(last) >= HINT_EVERY);
        let mut wants = due;
        if let Some(said) = coded {
            if self.said != Some(said) {
                (self.said, self.again) = (coded, HINT_AGAIN);
                wants = true;
            } else if self.again > 0 {
                self.again -= 1;
                wants = true;
            }
        }
        if wants {
            self.last = Some(ntp);
        }
        wants
    }
}

/// The middle 32 bits of the NTP timestamp of an instant given as time since the Unix epoch.
#[must_use]
pub fn ntp_middle(since_unix_epoch: Duration) -> u32 {
    const UNIX_IN_NTP: u64 = 2_208_988_800;
    let seconds = since_unix_epoch.as_secs().wrapping_add(UNIX_IN_NTP);
    let fraction = (u64::from(since_unix_epoch.subsec_nanos()) << 32) / 1_000_000_000;
    // Truncation is the definition: the low 16 bits of seconds, the high 16 of the fraction.
    #[allow(clippy::cast_possible_truncation)]
    let middle = ((seconds << 16) | (fraction >> 16)) as u32;
    middle
}

/// Predicts the ratio of what is sent to what native media would take, as a moving average over
/// packets. A prediction, because it is written before the next packets are known.
#[derive(Debug, Clone, Copy)]
pub struct RatioPredictor {
    /// Q16 fixed point.
    average: u32,
}

impl Default for RatioPredictor {
    fn default() -> Self {
        Self { average: 1 << 16 }
    }
}

impl RatioPredictor {
    /// Takes one packet into account: bytes on the wire, and what they would have been.
    pub fn observe(&mut self, sent: usize, native: usize) {
        let ratio = ((sent as u64) << 16) / (native.max(1) as u64);
        let ratio = u32::try_from(ratio.min(1 << 16)).unwrap_or(1 << 16);
        // A time constant of 32 packets: two thirds of a second of 20 ms audio.
        self.average = self.average - (self.average >> 5) + (ratio >> 5);
    }

    /// The prediction in 1/255.
    #[must_use]
    pub fn ratio(&self) -> u8 {
        u8::try_from((u64::from(self.average) * 255) >> 16).unwrap_or(u8::MAX)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;

    #[test]
    fn a_hint_survives_its_bytes_less_exactly() {
        for (ratio, read) in [(0, 0), (51, 48), (255, 255)] {
            let hint = Hint {
                rung: 4,
                voice: true,
                redundancy: false,
                ratio,
                sent: 0x1234_5678,
            };
            let expected = Hint {
                ratio: read,
                sent: 0x0_5660,
                ..hint
            };
            assert_eq!(Hint::parse(&hint.to_bytes()), Some(expected));
        }
        for len in [0, 1, 2, 4, 7] {
            assert_eq!(Hint::parse(&[0; 7][..len]), None, "{len}");
        }
        // Times are told apart across the 2 s at which they wrap.
        for (from, to, difference) in [
            (0x1_fff0u32, 0x0_0010u32, 0x20),
            (0x0_0010, 0x1_fff0, -0x20),
            (0x7_0000, 0x7_8000, 0x8000),
        ] {
            assert_eq!(Hint::sent_difference(to.wrapping_sub(from)), difference);
        }
    }

    #[test]
    fn the_hint_goes_at_the_start_at_changes_and_once_a_second() {
        let mut pace = HintPace::default();
        let speech = Some((2, true));
        let mut went = Vec::new();
        let at = |n: u32| (u32::MAX - 60_000).wrapping_add(n * 2_622);
        // Packets of 40 ms. A word on L4 at 60, a pause at 80, natives from 100 on.
        for n in 0..150u32 {
            let coded = match n {
                60..80 => Some((4, true)),
                80..100 => Some((4, false)),
                100.. => None,
                _ => speech,
            };
            if pace.wants(at(n), coded) {
                went.push(n);
            }
        }
        assert_eq!(
            went,
            [0, 1, 2, 27, 52, 60, 61, 62, 80, 81, 82, 107, 132],
            "with the two after each change and every 25th else"
        );
        // Natives between coded packets change nothing.
        assert!(!pace.wants(at(150), Some((4, false))));
    }

    #[test]
    fn the_ntp_middle_is_that_of_rfc_3550() {
        // 1970-01-01T00:00:00.5Z: NTP seconds 0x83aa7e80, fraction 0x80000000.
        assert_eq!(ntp_middle(Duration::from_millis(500)), 0x7e80_8000);
    }

    #[test]
    fn the_prediction_follows_the_packets() {
        let mut predictor = RatioPredictor::default();
        assert_eq!(predictor.ratio(), 255);
        for _ in 0..500 {
            predictor.observe(20, 100);
        }
        assert!(
            (50..=53).contains(&predictor.ratio()),
            "{}",
            predictor.ratio()
        );
    }

    /// The rows of the table in docs/protocol.md whose heading begins with `first`, as cells without
    /// their back quotes.
    pub(crate) fn vectors(first: &str) -> Vec<Vec<String>> {
        let text = include_str!("../../docs/protocol.md");
        let rows: Vec<Vec<String>> = text
            .lines()
            .skip_while(|line| !line.starts_with(&format!("| {first} |")))
            .skip(2)
            .take_while(|line| line.starts_with('|'))
            .map(|line| {
                let cells = line.trim_matches('|').split('|');
                cells.map(|cell| cell.trim().replace('`', "")).collect()
            })
            .collect();
        assert!(rows.len() >= 2, "no table of {first:?} in docs/protocol.md");
        rows
    }

    pub(crate) fn bytes(hex: &str) -> Vec<u8> {
        hex.split(' ')
            .map(|byte| u8::from_str_radix(byte, 16).unwrap())
            .collect()
    }

    #[test]
    fn the_specification_s_hints_are_read_and_written() {
        let mut read = 0;
        for row in vectors("hint") {
            let [said, data] = row.as_slice() else {
                panic!("{row:?}");
            };
            let data = bytes(data);
            if said.starts_with("none") {
                assert_eq!(Hint::parse(&data), None, "{said}");
                continue;
            }
            let value = |name: &str, radix| {
                let found = said.split(", ").find_map(|part| part.strip_prefix(name));
                u32::from_str_radix(found.unwrap().trim(), radix).unwrap()
            };
            let small = |name: &str| u8::try_from(value(name, 10)).unwrap();
            let hint = Hint {
                rung: small("rung"),
                voice: value("V", 10) == 1,
                redundancy: value("R", 10) == 1,
                ratio: small("ratio"),
                sent: value("sent", 16),
            };
            assert_eq!(Hint::parse(&data), Some(hint), "{said}");
            assert_eq!(hint.to_bytes()[..], data, "{said}");
            read += 1;
        }
        assert!(read >= 3);
    }

    #[test]
    fn the_specification_s_times_are_ours() {
        for row in vectors("time since the Unix epoch") {
            let seconds = row[0].trim_end_matches(" s").replace(',', "");
            let time = Duration::from_secs_f64(seconds.parse().unwrap());
            assert_eq!(
                ntp_middle(time).to_be_bytes()[..],
                bytes(&row[1]),
                "{}",
                row[0]
            );
        }
    }

    #[test]
    fn the_specification_s_packets_are_ours() {
        use crate::packet::{RtpHeader, append_extension};
        let data = bytes(&vectors("hint")[0][1]);
        for row in vectors("packet before") {
            let mut packet = bytes(&row[0]);
            let id = row[1].parse().unwrap();
            let header = RtpHeader::parse(&packet).unwrap();
            assert!(append_extension(&mut packet, &header, id, &data));
            assert_eq!(packet, bytes(&row[2]), "{row:?}");
            let header = RtpHeader::parse(&packet).unwrap();
            assert_eq!(header.extension(&packet, id), Some(&data[..]));
        }
    }
}
