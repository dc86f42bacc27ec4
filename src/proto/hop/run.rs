//! Runs: coded packets of which each goes on as the one before, so that most of them say so in a byte.
//!
//! A packet with a short header is read by any packet of its run that had a whole one, whatever was lost in between. A run
//! begins with three whole headers; the distances then double, up to [`EVERY`].

use crate::aic::payload::{Anchor, MAX_BACK, Part, Payload, Short, Unreadable};
use crate::ladder::Frames;
use std::collections::VecDeque;

/// A run has a whole header at least so often: two are within what a short header reaches back to.
const EVERY: u32 = 32;

/// Whole headers that a receiver remembers: those of two runs' beginnings.
const REMEMBERED: usize = 12;

/// The sender's side.
#[derive(Debug, Default)]
pub(super) struct Run {
    /// The last packet; none after a native one.
    last: Option<Anchor>,
    /// How many packets of the run went before it.
    index: u32,
    /// The run's gain: that of every packet of it that had a whole header.
    gain: i8,
}

impl Run {
    /// The header of the packet that goes now, as `hop`; none: a whole one. Where it is to be `whole` it is in any case.
    pub(super) fn next(
        &mut self,
        hop: u16,
        timestamp: u32,
        part: &Part<Vec<u8>>,
        whole: bool,
    ) -> Option<Short> {
        let Some(now) = Anchor::new(hop, timestamp, part) else {
            self.last = None;
            return None;
        };
        let before = self.last.replace(now);
        self.index = self.index.saturating_add(1);
        let whole = whole || self.index.is_power_of_two() || self.index.is_multiple_of(EVERY);
        let other = now.gain() != self.gain;
        if before.is_none_or(|before| !before.goes_on(&now)) || whole && other {
            // What reads the packets after it must have their gain.
            (self.index, self.gain) = (0, now.gain());
            return None;
        }
        let back = u8::try_from(self.index).unwrap_or(u8::MAX).min(MAX_BACK);
        let gain = other.then_some(now.gain());
        (!whole).then_some(Short { back, gain })
    }
}

/// The receiver's side: the last packets with whole headers, by which those with short ones are read.
#[derive(Debug, Default)]
pub struct Anchors(VecDeque<Anchor>);

impl Anchors {
    /// Reads the payload of a framed packet with this sequence number and timestamp, in either form.
    ///
    /// # Errors
    /// Why it can't be used; [`Unreadable::Run`] where all whole headers of its run were lost.
    pub fn read<'a>(
        &mut self,
        (hop, timestamp): (u16, u32),
        payload: &'a [u8],
        frames: Frames,
    ) -> Result<Payload<'a>, Unreadable> {
        let Some(short) = Short::parse(payload) else {
            let whole = Payload::parse(payload, frames)?;
            if let Some(anchor) = Anchor::new(hop, timestamp, &whole.part) {
                if self.0.len() >= REMEMBERED {
                    self.0.pop_front();
                }
                self.0.push_back(anchor);
            }
            return Ok(whole);
        };
        let (short, media) = short?;
        let reads = |anchor: &&Anchor| (1..=u16::from(short.back)).contains(&anchor.before(hop));
        let nearest = self.0.iter().filter(reads).min_by_key(|a| a.before(hop));
        nearest
            .ok_or(Unreadable::Run)?
            .read((hop, timestamp), short, media, frames)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::aic::payload::Body;
    use crate::ladder::CodecId;
    use proptest::prelude::*;

    /// One of 40 ms as two originals: number `n` of a stream.
    fn coded(n: u16, codec: CodecId, gain: i8) -> (u32, Part<Vec<u8>>) {
        let len = match codec {
            CodecId::Lyra3 => 16,
            CodecId::Lyra6 => 30,
            _ => 55,
        };
        let part = Part {
            sequence: n.wrapping_mul(2).wrapping_add(65_500),
            packets: 2,
            red: false,
            body: Body::Coded {
                codec,
                unit_ms: 20,
                gain,
                payload: vec![n.to_le_bytes()[0]; len],
            },
        };
        (u32::from(n) * 1920, part)
    }

    fn sent(run: &mut Run, hop: u16, (timestamp, part): &(u32, Part<Vec<u8>>)) -> Vec<u8> {
        let mut out = Vec::new();
        match run.next(hop, *timestamp, part, false) {
            Some(short) => short.write(part, &mut out),
            None => part
                .write(
                    None::<&crate::aic::payload::Redundant<Vec<u8>>>,
                    Frames::LYRA,
                    &mut out,
                )
                .unwrap(),
        }
        out
    }

    #[test]
    fn speech_takes_one_byte_a_packet_beside_its_own() {
        let mut run = Run::default();
        let mut whole = Vec::new();
        for n in 0..200 {
            // Pauses are on L1.
            let codec = if n % 50 > 40 {
                CodecId::Lyra3
            } else {
                CodecId::Lyra6
            };
            let packet = coded(n, codec, 3);
            let len = sent(&mut run, n, &packet).len() - packet.1.body.payload().len();
            match len {
                1 => {}
                4 => whole.push(n),
                _ => panic!("{len} bytes"),
            }
        }
        assert_eq!(whole, [0, 1, 2, 4, 8, 16, 32, 64, 96, 128, 160, 192]);
    }

    #[test]
    fn another_gain_costs_a_byte_until_the_next_whole_header() {
        let mut run = Run::default();
        let lens: Vec<usize> = (0..24)
            .map(|n| sent(&mut run, n, &coded(n, CodecId::Lyra6, i8::from(n >= 10))).len() - 30)
            .collect();
        let mut expected = vec![4, 4, 4, 1, 4, 1, 1, 1, 4, 1];
        expected.extend([2, 2, 2, 2, 2, 2]);
        // The run begins anew there.
        expected.extend([4, 4, 4, 1, 4, 1, 1, 1]);
        assert_eq!(lens, expected);
    }

    proptest! {
        /// Whatever comes between and whatever is lost: a packet is read as what it is, or not at all; and it is read where one
        /// whole header of its run came.
        #[test]
        fn what_is_read_is_what_was_sent(
            steps in proptest::collection::vec((0u8..60, any::<bool>(), -2i8..2), 1..300),
            lost in proptest::collection::vec(0u8..4, 1..300),
        ) {
            let (mut run, mut anchors) = (Run::default(), Anchors::default());
            let (mut hop, mut n) = (65_000u16, 0u16);
            let mut readable = None;
            for (at, (step, neural, gain)) in steps.into_iter().enumerate() {
                match step {
                    // A native packet.
                    0 => {
                        let native = Part { body: Body::Native { payload_type: 111, marker: false, trimmed_from: None, payload: vec![1; 9] }, packets: 1, ..coded(n, CodecId::Opus, 0).1 };
                        run.next(hop, 0, &native, false);
                        hop = hop.wrapping_add(1);
                    }
                    // One that was lost before it came here.
                    1 => n += 1,
                    _ => {}
                }
                let codec = if neural || step > 4 { CodecId::Lyra6 } else { CodecId::Opus };
                let packet = coded(n, codec, if step > 50 { gain } else { 0 });
                let bytes = sent(&mut run, hop, &packet);
                let whole = bytes[0] & 0x80 == 0;
                if run.index == 0 {
                    readable = None;
                }
                if lost[at % lost.len()] != 0 {
                    let read = anchors.read((hop, packet.0), &bytes, Frames::LYRA);
                    if whole {
                        readable = Some(hop);
                    }
                    let should = readable.is_some_and(|anchor| hop.wrapping_sub(anchor) <= u16::from(MAX_BACK));
                    match read {
                        Ok(read) => prop_assert_eq!(read.part.to_owned(), packet.1),
                        Err(error) => prop_assert!(!should, "{} at {}", error, at),
                    }
                }
                n += 1;
                hop = hop.wrapping_add(1);
            }
        }
    }
}
