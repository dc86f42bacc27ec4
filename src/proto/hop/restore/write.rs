//! Restored packets written.

use super::types::{Decoded, RestorerConfig};
use crate::aic::payload::{Body, TICKS_PER_MS};
use crate::hop::header::{self, Elementwise, Fields};
use crate::hop::window::Frame;

/// The original of a native frame.
pub(super) fn native(config: &RestorerConfig, frame: &Frame) -> Option<Vec<u8>> {
    let Body::Native {
        payload_type,
        marker,
        trimmed_from,
        payload,
    } = &frame.part.body
    else {
        return None;
    };
    let fields = Fields {
        payload_type: *payload_type,
        marker: *marker,
        sequence: frame.part.sequence,
        timestamp: frame.timestamp,
    };
    let elements = Elementwise {
        without: [config.hint_id, None],
        none: frame.copied,
        add: None,
    };
    let mut packet = Vec::with_capacity(frame.packet.len() + payload.len() + 1);
    begin(config, frame, fields, elements, &mut packet);
    packet.extend(payload);
    if let Some(from) = trimmed_from {
        let zeros = usize::from(*from).saturating_sub(payload.len());
        packet.resize(packet.len() + zeros, 0);
    }
    Some(packet)
}

/// The originals of a coded frame.
pub(super) fn decoded(
    config: &RestorerConfig,
    frame: &Frame,
    unit_ms: u8,
    decoded: &Decoded,
) -> Vec<Vec<u8>> {
    let ticks = u32::from(unit_ms) * TICKS_PER_MS;
    let original = |(index, media): (u16, &Vec<u8>)| {
        let level = decoded.levels.get(usize::from(index)).unwrap_or(&127);
        let level = [u8::from(decoded.voice) << 7 | level & 0x7f];
        let elements = Elementwise {
            without: [config.hint_id, config.level_id],
            // The first original's elements are its own; those of the others weren't carried.
            none: frame.copied || index > 0,
            add: config.level_id.map(|id| (id, &level[..])),
        };
        let fields = Fields {
            payload_type: config.opus_pt,
            marker: index == 0 && !frame.copied && frame.header.marker,
            sequence: frame.part.sequence.wrapping_add(index),
            timestamp: frame
                .timestamp
                .wrapping_add(ticks.wrapping_mul(u32::from(index))),
        };
        let mut packet = Vec::with_capacity(frame.packet.len() + media.len() + 8);
        begin(config, frame, fields, elements, &mut packet);
        packet.extend(media);
        packet
    };
    (0u16..).zip(&decoded.packets).map(original).collect()
}

/// Writes a restored packet up to its media.
fn begin(
    config: &RestorerConfig,
    frame: &Frame,
    mut fields: Fields,
    elements: Elementwise<'_>,
    packet: &mut Vec<u8>,
) {
    let primary = fields.payload_type;
    let red_pt = config.red_pt.filter(|_| frame.part.red);
    fields.payload_type = red_pt.unwrap_or(primary);
    header::write(&frame.packet, &frame.header, fields, elements, packet);
    if red_pt.is_some() {
        packet.push(primary & 0x7f);
    }
}
