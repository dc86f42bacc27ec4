//! Copies of earlier framed packets, sent along while the hop loses some.

use crate::aic::payload::{Body, Part, Redundant};
use crate::hop::original::DTX_BYTES;
use crate::ladder::{CodecId, Frames};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// The longest distance that a copy's header can say.
const MAX_DISTANCE: u8 = 7;

/// A fraction lost of 1 % in 1/256, rounded up: from here on a hop is lossy.
const LOSSY: u8 = 3;

/// Copies end when no report has said that the hop is lossy for so long.
const CLEAN: Duration = Duration::from_secs(10);

/// A packet doesn't grow over this many bytes of payload for the sake of a copy.
const MAX_WITH_COPY: usize = 1000;

/// When copies are sent, and how many packets behind.
///
/// The distance of 2 is 80 ms in a stream of 40 ms packets: a burst of two packets (80 ms) loses
/// nothing, and a receiver that waits for the copy plays 80 ms late instead of 120 ms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Redundancy {
    /// Never.
    Never,
    /// While the receiver reports 1 % of loss or more, and 10 s longer.
    Lossy {
        /// Framed packets between a packet and its copy, 1 to 7.
        distance: u8,
    },
    /// Always.
    Always {
        /// Framed packets between a packet and its copy, 1 to 7.
        distance: u8,
    },
}

impl Default for Redundancy {
    fn default() -> Self {
        Self::Lossy { distance: 2 }
    }
}

/// The last packets of a stream, and whether copies of them go along.
#[derive(Debug)]
pub(super) struct Copies {
    mode: Redundancy,
    lossy: bool,
    clean_since: Option<Instant>,
    /// Timestamp and form as a copy of the last packets, the newest last.
    sent: VecDeque<Option<(u32, Part<Vec<u8>>)>>,
}

impl Copies {
    pub(super) fn new(mode: Redundancy) -> Self {
        Self {
            mode,
            lossy: false,
            clean_since: None,
            sent: VecDeque::with_capacity(usize::from(MAX_DISTANCE)),
        }
    }

    pub(super) fn set_mode(&mut self, mode: Redundancy) {
        self.mode = mode;
    }

    /// The receiver reported this fraction lost.
    pub(super) fn report(&mut self, now: Instant, fraction_lost: u8) {
        if fraction_lost >= LOSSY {
            self.lossy = true;
            self.clean_since = None;
            return;
        }
        let since = *self.clean_since.get_or_insert(now);
        if now.saturating_duration_since(since) >= CLEAN {
            self.lossy = false;
        }
    }

    /// Packets are lost, or are always taken to be.
    pub(super) fn is_lossy(&self) -> bool {
        self.lossy || matches!(self.mode, Redundancy::Always { .. })
    }

    /// Distance of the copies that go along now.
    pub(super) fn distance(&self) -> Option<u8> {
        let distance = match self.mode {
            Redundancy::Always { distance } => distance,
            Redundancy::Lossy { distance } if self.lossy => distance,
            _ => return None,
        };
        Some(distance.clamp(1, MAX_DISTANCE))
    }

    /// The copy for a packet that is about to be sent.
    pub(super) fn copy(&self, timestamp: u32, part: &Part<Vec<u8>>) -> Option<Redundant<Vec<u8>>> {
        let hop_distance = self.distance()?;
        let at = self.sent.len().checked_sub(usize::from(hop_distance))?;
        let (copied_at, copied) = self.sent.get(at)?.as_ref()?;
        let bytes = part.body.payload().len() + copied.body.payload().len();
        (bytes <= MAX_WITH_COPY).then(|| Redundant {
            hop_distance,
            ticks_back: timestamp.wrapping_sub(*copied_at),
            part: copied.clone(),
        })
    }

    /// A packet was sent; `frames` are those of its bundle.
    pub(super) fn sent(&mut self, timestamp: u32, part: Part<Vec<u8>>, frames: Frames) {
        if self.sent.len() >= usize::from(MAX_DISTANCE) {
            self.sent.pop_front();
        }
        self.sent
            .push_back(as_copy(part, frames).map(|part| (timestamp, part)));
    }
}

/// What a copy of `part` carries: of L2 the prefix of each frame that is its L1 form, of other media the same bytes.
fn as_copy(mut part: Part<Vec<u8>>, frames: Frames) -> Option<Part<Vec<u8>>> {
    match &mut part.body {
        Body::Native { payload, .. } if payload.len() <= DTX_BYTES => return None,
        Body::Native {
            trimmed_from: Some(_),
            ..
        } => return None,
        Body::Coded { codec, payload, .. } if *codec == CodecId::Lyra6 => {
            *codec = CodecId::Lyra3;
            let (l1, l2) = (frames.each(CodecId::Lyra3)?, frames.each(CodecId::Lyra6)?);
            *payload = payload
                .chunks_exact(l2)
                .flat_map(|frame| frame.iter().take(l1))
                .copied()
                .collect();
        }
        _ => {}
    }
    (part.body.payload().len() <= usize::from(u8::MAX)).then_some(part)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::disallowed_methods)]
    use super::*;

    const LYRA: Frames = Frames::LYRA;

    fn lyra6(sequence: u16) -> Part<Vec<u8>> {
        Part {
            sequence,
            packets: 2,
            red: false,
            body: Body::Coded {
                codec: CodecId::Lyra6,
                unit_ms: 20,
                gain: 3,
                payload: (0..30).collect(),
            },
        }
    }

    #[test]
    fn a_lyra_copy_is_the_prefix_of_each_frame() {
        let mut copies = Copies::new(Redundancy::Always { distance: 2 });
        copies.sent(0, lyra6(10), LYRA);
        assert_eq!(copies.copy(1920, &lyra6(12)), None, "none is 2 behind");
        copies.sent(1920, lyra6(12), LYRA);
        let copy = copies.copy(3840, &lyra6(14)).unwrap();
        assert_eq!((copy.hop_distance, copy.ticks_back), (2, 3840));
        assert_eq!(copy.part.sequence, 10);
        assert_eq!(copy.part.body.codec(), CodecId::Lyra3);
        let expected: Vec<u8> = (0..8).chain(15..23).collect();
        assert_eq!(copy.part.body.payload(), expected);
        // Two frames of 20 ms there, one of 40 ms here.
        let long = as_copy(lyra6(10), Frames::new(1920, 13, 30).unwrap()).unwrap();
        assert_eq!(long.body.payload(), (0..13).collect::<Vec<u8>>());
    }

    #[test]
    fn copies_go_with_loss_and_end_10_s_after_it() {
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        let mut copies = Copies::new(Redundancy::default());
        copies.report(at(0), 2);
        assert_eq!(copies.distance(), None, "0.8 %");
        copies.report(at(1), 3);
        assert_eq!(copies.distance(), Some(2));
        copies.report(at(2), 0);
        copies.report(at(11), 0);
        assert_eq!(copies.distance(), Some(2), "9 s clean");
        copies.report(at(11), 3);
        copies.report(at(12), 0);
        copies.report(at(21), 0);
        assert_eq!(copies.distance(), Some(2), "the count begins anew");
        copies.report(at(22), 0);
        assert_eq!(copies.distance(), None);
        copies.set_mode(Redundancy::Never);
        copies.report(at(23), 255);
        assert_eq!(copies.distance(), None);
    }

    #[test]
    fn only_what_is_worth_it_is_copied() {
        let native = |payload: Vec<u8>, trimmed_from| Part {
            sequence: 1,
            packets: 1,
            red: false,
            body: Body::Native {
                payload_type: 111,
                marker: false,
                trimmed_from,
                payload,
            },
        };
        assert!(as_copy(native(vec![1; 100], None), LYRA).is_some());
        assert!(as_copy(native(vec![1; 8], None), LYRA).is_none(), "DTX");
        assert!(
            as_copy(native(vec![1; 256], None), LYRA).is_none(),
            "no length for it"
        );
        assert!(as_copy(native(vec![1; 10], Some(80)), LYRA).is_none());
        let mut copies = Copies::new(Redundancy::Always { distance: 1 });
        copies.sent(0, native(vec![1; 100], None), LYRA);
        assert!(
            copies.copy(960, &native(vec![1; 901], None)).is_none(),
            "too big"
        );
    }
}
