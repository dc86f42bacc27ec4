//! `a=aic`: how one side of a hop says that it takes framed packets (docs/protocol.md).

use super::{MediaKind, Sdp, attribute, formats};
use crate::ladder::{Rung, Rungs};
use std::collections::HashSet;
use std::fmt;

/// Name of the attribute.
pub(super) const ATTRIBUTE: &str = "aic";

/// The version that this code speaks; lines of others are left alone, so that a peer can write one
/// for each.
const VERSION: &str = "1";

/// Value of `headers`: payloads with short headers are read.
const SHORT: &str = "short";

/// Value of `units`: milliseconds of originals that are restored beside 20, 40 and 60.
const MORE_UNITS: &str = "10,120";

/// Payload types of framed packets, best first: those that RFC 3551 never assigned, then dynamic ones
/// that RFC 5761 section 4 leaves free of RTCP. Browsers and LiveKit use up the dynamic ones as a call
/// goes on (LiveKit's AV1 is 35), and a payload type that has to change loses a framed stream.
const CANDIDATES: [std::ops::RangeInclusive<u8>; 4] = [20..=24, 29..=30, 35..=63, 96..=127];

/// What stands behind `a=aic:`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AicLine {
    /// RTP payload type of framed packets towards the writer.
    pub pt: u8,
    /// Rungs that the writer decodes.
    pub rungs: Rungs,
    /// The neural rungs' models: the first 32 bits of the bundle's SHA-256. Other models decode to noise.
    pub models: Option<u32>,
    /// The writer reads payloads with short headers.
    pub short_headers: bool,
    /// The writer restores originals of 10 and 120 ms too.
    pub more_units: bool,
}

impl AicLine {
    /// Reads `1 pt=35 rungs=1,2 models=ca9df5a3`; keys and rungs that aren't known are left out.
    pub(super) fn parse(value: &str) -> Option<Self> {
        let mut words = value.split_ascii_whitespace();
        if words.next()? != VERSION {
            return None;
        }
        let (mut pt, mut rungs, mut models) = (None, Rungs::NONE, None);
        let (mut short_headers, mut more_units) = (false, false);
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            match key {
                "pt" => pt = value.parse().ok().filter(|pt| *pt < 128),
                "rungs" => {
                    rungs = value
                        .split(',')
                        .filter_map(|number| Rung::new(number.parse().ok()?))
                        .filter(|rung| *rung != Rung::NATIVE)
                        .fold(Rungs::NONE, Rungs::with);
                }
                "models" => models = u32::from_str_radix(value, 16).ok(),
                "headers" => short_headers = value.split(',').any(|form| form == SHORT),
                "units" => more_units = value == MORE_UNITS,
                _ => {}
            }
        }
        Some(Self {
            pt: pt?,
            rungs,
            models,
            short_headers,
            more_units,
        })
    }
}

/// The whole line.
impl fmt::Display for AicLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a={ATTRIBUTE}:{VERSION} pt={} rungs=", self.pt)?;
        for (at, rung) in self.rungs.iter().enumerate() {
            let comma = if at == 0 { "" } else { "," };
            write!(f, "{comma}{}", rung.number())?;
        }
        if let Some(models) = self.models {
            write!(f, " models={models:08x}")?;
        }
        if self.short_headers {
            write!(f, " headers={SHORT}")?;
        }
        if self.more_units {
            write!(f, " units={MORE_UNITS}")?;
        }
        Ok(())
    }
}

/// A payload type that nothing in the SDP uses, `wanted` if it is one: under BUNDLE it may mean one
/// thing only.
#[must_use]
pub fn free_payload_type(sdp: &Sdp<'_>, wanted: Option<u8>) -> Option<u8> {
    let mut taken: HashSet<u8> = HashSet::new();
    for (index, media) in sdp.media.iter().enumerate() {
        if media.kind == MediaKind::Other {
            continue;
        }
        let lines = sdp.section(index);
        if let Some(first) = lines.first() {
            taken.extend(formats(first.text).filter_map(|word| word.parse::<u8>().ok()));
        }
        let maps = lines.iter().filter_map(|line| attribute(line.text));
        taken.extend(
            maps.filter(|(name, _)| *name == "rtpmap")
                .filter_map(|(_, value)| value.split_once(' ')?.0.trim().parse::<u8>().ok()),
        );
    }
    wanted
        .into_iter()
        .chain(CANDIDATES.into_iter().flatten())
        .find(|pt| !taken.contains(pt))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_line_is_read_back() {
        let line = AicLine {
            pt: 35,
            rungs: Rungs::ALL,
            models: Some(0x00ab_cdef),
            short_headers: true,
            more_units: true,
        };
        let text = "a=aic:1 pt=35 rungs=1,2,3,4,5,6 models=00abcdef headers=short units=10,120";
        assert_eq!(line.to_string(), text);
        assert_eq!(AicLine::parse(&text[6..]), Some(line));
    }

    #[test]
    fn what_is_not_known_is_left_out() {
        let known = AicLine {
            pt: 20,
            rungs: Rungs::NONE.with(Rung::L2),
            models: None,
            short_headers: false,
            more_units: false,
        };
        assert_eq!(
            AicLine::parse("1 rungs=0,2,9,x new=thing headers=odd pt=20"),
            Some(known)
        );
        for wrong in ["2 pt=20 rungs=1", "1 rungs=1", "1 pt=128 rungs=1", ""] {
            assert_eq!(AicLine::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn the_payload_type_is_free_in_the_whole_sdp() {
        let text = "v=0\r\nm=audio 9 UDP/TLS/RTP/SAVPF 111 20\r\na=mid:0\r\nm=video 9 UDP/TLS/RTP/SAVPF 36\r\na=rtpmap:37 VP8/90000\r\n";
        let sdp = Sdp::parse(text).unwrap();
        assert_eq!(free_payload_type(&sdp, None), Some(21));
        assert_eq!(free_payload_type(&sdp, Some(36)), Some(21));
        assert_eq!(free_payload_type(&sdp, Some(38)), Some(38));
    }
}
