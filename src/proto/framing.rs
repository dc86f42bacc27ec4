//! RFC 4571: datagrams on a byte stream, two bytes of length before each. ICE-TCP has no other framing (RFC 6544 section 3).
//!
//! The sender is a stranger until a frame of its proves otherwise, so that the work it causes is bounded here: every byte is
//! moved at most twice, whatever the frames' lengths, and what waits is no more than what was last read and one frame.

/// Bytes of the longest frame that is taken. STUN, DTLS, RTP and RTCP come in the packets of a path of 1,500 bytes; Pion, which
/// LiveKit and its Go clients use, reads no more than this at once either (`receiveMTU` of pion/ice).
pub const MAX_FRAME: usize = 8192;

/// Bytes of the length before each frame.
pub const PREFIX: usize = 2;

/// The stream cannot be read any further: where the next frame begins is not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a frame of {0} bytes, more than any datagram of a call has")]
pub struct TooLong(pub usize);

/// Finds the frames in what was read of a stream.
///
/// Take all whole frames ([`Deframer::next_frame`]) before more is [pushed](Deframer::push); then never more than a frame and
/// its prefix are left over, which is what a push may have to move.
#[derive(Debug, Default)]
pub struct Deframer {
    bytes: Vec<u8>,
    /// Up to here they have been taken.
    taken: usize,
    /// Bytes that were moved to the front.
    #[cfg(test)]
    moved: usize,
}

impl Deframer {
    /// One of which `received` has been read already, framing included.
    #[must_use]
    pub fn new(received: Vec<u8>) -> Self {
        Self {
            bytes: received,
            ..Self::default()
        }
    }

    /// Adds what was read.
    pub fn push(&mut self, read: &[u8]) {
        // What is left moves to the front once at least as much has been taken before it: a byte moves no more often than
        // bytes were taken.
        if self.taken >= self.waiting() {
            #[cfg(test)]
            {
                self.moved += self.waiting();
            }
            self.bytes.drain(..self.taken);
            self.taken = 0;
        }
        self.bytes.extend_from_slice(read);
    }

    /// The next whole frame, if there is one. An empty frame is a frame.
    ///
    /// # Errors
    /// A length that no frame has; nothing after it can be read.
    pub fn next_frame(&mut self) -> Result<Option<&[u8]>, TooLong> {
        let rest = self.bytes.get(self.taken..).unwrap_or_default();
        let Some(prefix) = rest.first_chunk::<PREFIX>() else {
            return Ok(None);
        };
        let len = usize::from(u16::from_be_bytes(*prefix));
        if len > MAX_FRAME {
            return Err(TooLong(len));
        }
        let Some(frame) = rest.get(PREFIX..PREFIX + len) else {
            return Ok(None);
        };
        self.taken += PREFIX + len;
        Ok(Some(frame))
    }

    /// Bytes that have not been taken.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.bytes.len() - self.taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn framed<'a>(frames: impl IntoIterator<Item = &'a [u8]>) -> Vec<u8> {
        let mut bytes = Vec::new();
        for frame in frames {
            bytes.extend(u16::try_from(frame.len()).unwrap().to_be_bytes());
            bytes.extend(frame);
        }
        bytes
    }

    /// The frames of a stream that is read in pieces of `piece` bytes, and the bytes that were moved for it.
    fn read(stream: &[u8], piece: usize) -> (Vec<Vec<u8>>, usize) {
        let (mut deframer, mut frames) = (Deframer::default(), Vec::new());
        for piece in stream.chunks(piece) {
            deframer.push(piece);
            while let Some(frame) = deframer.next_frame().unwrap() {
                frames.push(frame.to_vec());
            }
            assert!(deframer.waiting() < PREFIX + MAX_FRAME);
        }
        assert_eq!(deframer.waiting(), 0);
        (frames, deframer.moved)
    }

    #[test]
    fn frames_come_out_as_they_went_in_however_they_are_cut() {
        let long = vec![7; MAX_FRAME];
        let frames: Vec<&[u8]> = vec![b"one", b"", &long, b"x", b"", b"", &long[..1200], b"end"];
        let stream = framed(frames.iter().copied());
        for piece in [1, 2, 3, 5, 1400, 16 * 1024, 1 << 20] {
            assert_eq!(read(&stream, piece).0, frames, "in pieces of {piece}");
        }
    }

    /// The worst that there is, empty frames and single bytes, moves no more than ordinary media of as many bytes.
    #[test]
    fn short_frames_cost_no_more_than_their_bytes() {
        let total = 1 << 20;
        let ordinary = framed(std::iter::repeat_n(&[0u8; 1198][..], total / 1200));
        for (worst, piece) in [
            (framed(std::iter::repeat_n(&[][..], total / 2)), 16 * 1024),
            (
                framed(std::iter::repeat_n(&[][..], total / 2)),
                16 * 1024 - 1,
            ),
            (framed(std::iter::repeat_n(&[1][..], total / 3)), 16 * 1024),
            (
                framed(std::iter::repeat_n(&[1; MAX_FRAME][..], total / MAX_FRAME)),
                1,
            ),
        ] {
            let (_, usual) = read(&ordinary, 16 * 1024);
            let (_, moved) = read(&worst, piece);
            assert!(
                moved <= usual + worst.len(),
                "{moved} bytes moved for {} in pieces of {piece}, {usual} for ordinary ones",
                worst.len()
            );
        }
    }

    #[test]
    fn a_length_that_no_datagram_has_ends_it() {
        let mut stream = framed([&b"good"[..]]);
        stream.extend(u16::try_from(MAX_FRAME + 1).unwrap().to_be_bytes());
        let mut deframer = Deframer::new(stream);
        assert_eq!(deframer.next_frame(), Ok(Some(&b"good"[..])));
        for _ in 0..2 {
            assert_eq!(deframer.next_frame(), Err(TooLong(MAX_FRAME + 1)));
        }
    }
}
