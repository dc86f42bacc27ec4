//! Framed packets written: header, copy, media, hint.

use super::types::{Encoded, Sent};
use super::{Packer, Slot};
use crate::aic::payload::{Body, MAX_TRIMMED, Part, Redundant};
use crate::aic::{HINT_LEN, Hint};
use crate::hop::header::{self, Elementwise, Fields};
use crate::hop::original::{DTX_BYTES, Original};
use crate::hop::{IP_UDP, SHORT_TAG};
use crate::ladder::Rung;
use crate::packet::{RtpHeader, append_extension};

/// Bytes that a hint adds at most where no other element is: extension header included.
const HINT_WIRE: usize = HINT_LEN + 5;

impl Packer {
    /// Writes the next framed RTP packet into `out`, where one may go. `ntp` is the middle of the NTP
    /// time now.
    pub fn poll_packet(&mut self, ntp: u32, out: &mut Vec<u8>) -> Option<Sent> {
        if let Some(original) = self.aside.pop_front() {
            return Some(self.write_native(ntp, &original, out));
        }
        match self.line.front()? {
            Slot::Waiting { .. } => None,
            _ => match self.line.pop_front()? {
                Slot::Native(original) => Some(self.write_native(ntp, &original, out)),
                Slot::Coded {
                    since,
                    originals,
                    encoded,
                } => {
                    let first = originals.first()?;
                    // At most 4 of them.
                    let packets = u8::try_from(originals.len()).unwrap_or(u8::MAX);
                    let part = part(first, packets, &encoded);
                    let native = originals.iter().map(|original| original.wire_len as u64);
                    let sent = Sent {
                        native_bytes: native.sum(),
                        originals: packets,
                        rung: encoded.rung,
                        copy: false,
                    };
                    let sequence = self.next_sequence;
                    let sent = self.write(ntp, first, part, encoded.voice, sent, out);
                    self.keep(since, sequence, originals);
                    Some(sent)
                }
                Slot::Waiting { .. } => None,
            },
        }
    }

    fn write_native(&mut self, ntp: u32, original: &Original, out: &mut Vec<u8>) -> Sent {
        let media = original.media();
        let trimmed = original.trimmed().and_then(|len| {
            let from = u16::try_from(media.len()).ok()?;
            (from <= MAX_TRIMMED).then_some((len, from))
        });
        let len = trimmed.map_or(media.len(), |(len, _)| len);
        let part = Part {
            sequence: original.header.sequence,
            packets: 1,
            red: original.red,
            body: Body::Native {
                payload_type: original.payload_type,
                marker: original.header.marker,
                trimmed_from: trimmed.map(|(_, from)| from),
                payload: media.get(..len).unwrap_or_default().to_vec(),
            },
        };
        let sent = Sent {
            native_bytes: original.wire_len as u64,
            originals: 1,
            rung: Rung::NATIVE,
            copy: false,
        };
        let voice = media.len() > DTX_BYTES && trimmed.is_none();
        self.write(ntp, original, part, voice, sent, out)
    }

    fn write(
        &mut self,
        ntp: u32,
        first: &Original,
        part: Part<Vec<u8>>,
        voice: bool,
        mut sent: Sent,
        out: &mut Vec<u8>,
    ) -> Sent {
        let coded = part.body.codec().is_coded();
        let timestamp = first.header.timestamp;
        let fields = Fields {
            payload_type: self.config.aic_pt,
            marker: first.header.marker,
            sequence: self.next_sequence,
            timestamp,
        };
        let elements = Elementwise {
            without: [self.config.level_id.filter(|_| coded), None],
            ..Elementwise::default()
        };
        header::write(&first.packet, &first.header, fields, elements, out);
        let copy = self.copies.copy(timestamp, &part);
        sent.copy = copy.is_some() && part.write(copy.as_ref(), self.frames, out).is_ok();
        // Where packets are lost, each is to be read by itself.
        let whole = sent.copy || self.copies.is_lossy() || !self.config.short_headers;
        let short = self.run.next(self.next_sequence, timestamp, &part, whole);
        if let Some(short) = short {
            short.write(&part, out);
        } else if !sent.copy {
            // Coded parts were checked when they came, native ones are always in range.
            let _ = part.write(NO_COPY, self.frames, out);
        }
        self.next_sequence = self.next_sequence.wrapping_add(1);
        self.stats.framed += 1;
        self.stats.copies += u64::from(sent.copy);
        self.copies.sent(timestamp, part, self.frames);
        let said = coded.then_some((sent.rung.number(), voice));
        let hinted = self.config.hint_id.filter(|_| self.pace.wants(ntp, said));
        let hint_len = hinted.map_or(0, |_| HINT_WIRE);
        let wire_len = out.len() + IP_UDP + SHORT_TAG + hint_len;
        let native = usize::try_from(sent.native_bytes).unwrap_or(usize::MAX);
        self.predictor.observe(wire_len, native);
        if let Some(id) = hinted
            && let Some(header) = RtpHeader::parse(out)
        {
            let hint = Hint {
                rung: sent.rung.number(),
                voice,
                redundancy: sent.copy,
                ratio: self.predictor.ratio(),
                sent: ntp,
            };
            append_extension(out, &header, id, &hint.to_bytes());
        }
        sent
    }
}

pub(super) const NO_COPY: Option<&Redundant<Vec<u8>>> = None;

/// What a coded group stands for.
pub(super) fn part(first: &Original, packets: u8, encoded: &Encoded) -> Part<Vec<u8>> {
    Part {
        sequence: first.header.sequence,
        packets,
        red: first.red,
        body: Body::Coded {
            codec: encoded.codec,
            unit_ms: encoded.unit_ms,
            gain: encoded.gain,
            payload: encoded.payload.clone(),
        },
    }
}
