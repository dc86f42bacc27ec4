//! One direction of a peer connection: which rule goes with which stream, what it does to each
//! packet, and what that saved.

use crate::aic::{Hint, RatioPredictor, VERSION};
use crate::description::TrackRule;
use crate::packet::{RtpHeader, append_extension};
use crate::red::{self, Shed};
use crate::srtp::Refusal;
use rustc_hash::FxHashMap;

/// Opus runs on a 48 kHz RTP clock whatever it carries (RFC 7587 section 4.1).
const OPUS_CLOCK: u64 = 48_000;

/// A jump in timestamps counts as so much audio at the most (ticks): beyond it the sender was
/// silent, and would have been silent in its default configuration too.
const MAX_TICKS: u32 = 5760;

/// Opus payloads up to this many bytes are DTX or comfort noise, the same at any bitrate.
const DTX_BYTES: usize = 8;

/// Redundancy is given back from a fraction lost of 2 % on, in 1/256.
const LOSSY: u8 = 5;

/// So many reports in a row without loss before redundancy is shed again after a loss.
const CLEAN_REPORTS: u8 = 3;

/// Streams of one direction beyond so many share no state and pass untouched. A stranger with
/// valid keys could otherwise grow the map with random SSRCs.
const MAX_STREAMS: usize = 4096;

/// Counters of one direction. Bytes are on the wire of the client's side, IP and UDP included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FlowStats {
    /// RTP packets relayed.
    pub rtp_packets: u64,
    /// RTCP packets relayed.
    pub rtcp_packets: u64,
    /// Data-channel (SCTP) packets relayed.
    pub data_packets: u64,
    /// Bytes on the wire.
    pub bytes: u64,
    /// Bytes as they would have been without AuraLink: without its hints, with the redundancy that
    /// was shed, and with what the default publisher would have sent. An SRTP tag counts as long as it
    /// is, so that the 6 bytes a packet that a lean client leg's short tags save are not in it.
    pub native_bytes: u64,
    /// Packets whose redundancy was shed.
    pub shed_packets: u64,
    /// Packets wrapped as primary-only RED.
    pub wrapped_packets: u64,
    /// Dropped: no key fits, or not authentic.
    pub dropped_unauthentic: u64,
    /// Dropped: STUN that isn't authentic, or of credentials that are no more.
    pub dropped_checks: u64,
    /// Dropped: it came over a path that no check has proved.
    pub dropped_unproved: u64,
    /// Dropped: RTCP, or a framed packet, that came before.
    pub dropped_replayed: u64,
    /// Dropped: lengths that don't add up.
    pub dropped_malformed: u64,
    /// Dropped: the other leg was not ready and the buffer for early packets was full.
    pub dropped_early: u64,
    /// Dropped: the other leg would not take it.
    pub dropped_unsent: u64,
}

impl std::ops::AddAssign for FlowStats {
    fn add_assign(&mut self, other: Self) {
        self.rtp_packets += other.rtp_packets;
        self.rtcp_packets += other.rtcp_packets;
        self.data_packets += other.data_packets;
        self.bytes += other.bytes;
        self.native_bytes += other.native_bytes;
        self.shed_packets += other.shed_packets;
        self.wrapped_packets += other.wrapped_packets;
        self.dropped_unauthentic += other.dropped_unauthentic;
        self.dropped_checks += other.dropped_checks;
        self.dropped_unproved += other.dropped_unproved;
        self.dropped_replayed += other.dropped_replayed;
        self.dropped_malformed += other.dropped_malformed;
        self.dropped_early += other.dropped_early;
        self.dropped_unsent += other.dropped_unsent;
    }
}

impl FlowStats {
    /// Counts what the leg refused that this direction comes from.
    pub fn refused(&mut self, refusal: Refusal) {
        let count = match refusal {
            Refusal::Check => &mut self.dropped_checks,
            Refusal::Unproved => &mut self.dropped_unproved,
            Refusal::Unauthentic => &mut self.dropped_unauthentic,
            Refusal::Replayed => &mut self.dropped_replayed,
            Refusal::Malformed => &mut self.dropped_malformed,
        };
        *count += 1;
    }
}

#[derive(Debug, Default)]
struct Stream {
    /// Index into the rules; `None`: no rule, passes untouched.
    rule: Option<usize>,
    shedding: bool,
    clean_reports: u8,
    reported_loss: bool,
    last_timestamp: Option<u32>,
    predictor: RatioPredictor,
    shed: Shedding,
}

/// Which of a stream's last packets were shed. One that is asked for again (NACK) goes as it did the
/// first time: an SRTP index must not be used for two payloads (RFC 3711 section 9.1).
#[derive(Debug, Default)]
struct Shedding {
    newest: Option<u16>,
    /// Payload type of the RED that was shed, after the rule is gone too.
    pt: Option<u8>,
    /// The newest is the lowest bit.
    shed: u128,
}

impl Shedding {
    /// Whether this packet is to be shed, where a new one would be or not.
    fn of(&mut self, sequence: u16, sheds: bool) -> bool {
        let newest = *self.newest.get_or_insert(sequence.wrapping_sub(1));
        let ahead = sequence.wrapping_sub(newest).cast_signed();
        if ahead <= 0 {
            // Of what is older than all that is known, the oldest known says most.
            let behind = u32::from(ahead.unsigned_abs()).min(u128::BITS - 1);
            return self.shed >> behind & 1 == 1;
        }
        self.newest = Some(sequence);
        let passed = u32::from(ahead.unsigned_abs());
        // What was overtaken goes as it would have before the newest.
        let before = if self.shed & 1 == 1 { u128::MAX } else { 0 };
        let kept = self.shed.checked_shl(passed).unwrap_or(0);
        let between = !(u128::MAX.checked_shl(passed).unwrap_or(0)) & before;
        self.shed = (kept | between) & !1 | u128::from(sheds);
        sheds
    }
}

/// One direction.
#[derive(Debug, Default)]
pub struct Flow {
    rules: Vec<TrackRule>,
    mid_ext_id: Option<u8>,
    streams: FxHashMap<u32, Stream>,
    /// Counters.
    pub stats: FlowStats,
}

/// What a packet became, for the books.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Applied {
    /// Bytes that this packet would have taken more in the default configuration.
    pub saved: u64,
    /// Bytes that it has only because of AuraLink: its hint.
    pub added: u64,
}

impl Flow {
    /// Takes new rules; what streams have learned of loss stays.
    pub fn set_rules(&mut self, rules: &[TrackRule], mid_ext_id: Option<u8>) {
        if self.rules == rules && self.mid_ext_id == mid_ext_id {
            return;
        }
        self.rules = rules.to_vec();
        self.mid_ext_id = mid_ext_id;
        for (ssrc, stream) in &mut self.streams {
            stream.rule = self.rules.iter().position(|rule| rule.ssrcs.contains(ssrc));
        }
        // Streams known only by MID are looked up again with their next packets.
        self.streams.retain(|_, stream| stream.rule.is_some());
    }

    /// Applies a stream's rule to a decrypted RTP packet. `wire_len` is what the packet took on
    /// the wire of its sender; `ntp` the middle 32 bits of the NTP time.
    pub fn apply(&mut self, packet: &mut Vec<u8>, wire_len: usize, ntp: u32) -> Applied {
        const UNTOUCHED: Applied = Applied { saved: 0, added: 0 };
        if self.rules.is_empty() {
            return UNTOUCHED;
        }
        let Some(header) = RtpHeader::parse(packet) else {
            return UNTOUCHED;
        };
        if !self.streams.contains_key(&header.ssrc) {
            if self.streams.len() >= MAX_STREAMS {
                return UNTOUCHED;
            }
            let Some(rule) = find(&self.rules, self.mid_ext_id, &header, packet) else {
                return UNTOUCHED;
            };
            self.streams.insert(
                header.ssrc,
                Stream {
                    rule: Some(rule),
                    ..Stream::default()
                },
            );
        }
        let Some(stream) = self.streams.get_mut(&header.ssrc) else {
            return UNTOUCHED;
        };
        let Some(rule) = stream.rule.and_then(|index| self.rules.get(index)) else {
            return UNTOUCHED;
        };
        let (mut saved, mut added) = (0, 0);
        stream.shed.pt = rule.shed_red.or(stream.shed.pt);
        let shed_pt = stream.shed.pt;
        let now = rule.shed_red.is_some() && (stream.shedding || rule.shed_always);
        let sheds = shed_pt.is_some() && stream.shed.of(header.sequence, now);
        if rule.default_bytes_per_second > 0 {
            saved += steering_saved(stream, rule, &header, packet, wire_len);
        }
        if let Some((opus, red)) = rule.wrap_red
            && header.payload_type == opus
        {
            red::wrap(packet, &header, red);
            self.stats.wrapped_packets += 1;
        }
        if sheds
            && shed_pt == Some(header.payload_type)
            && let Shed::Dropped(bytes) = red::shed(packet, &header)
        {
            saved += bytes as u64;
            self.stats.shed_packets += 1;
        }
        if let Some(id) = rule.aic_id {
            let native = wire_len as u64 + if rule.shed_red.is_some() { 0 } else { saved };
            let sent = (native.saturating_sub(saved)).max(1);
            stream.predictor.observe(
                usize::try_from(sent).unwrap_or(0),
                usize::try_from(native).unwrap_or(1),
            );
            if let Some(header) = RtpHeader::parse(packet) {
                let hint = Hint {
                    version: VERSION,
                    rung: 0,
                    voice: header.payload(packet).len() > DTX_BYTES,
                    redundancy: rule.shed_red.is_some() && !sheds,
                    ratio: stream.predictor.ratio(),
                    sent: ntp,
                };
                let before = packet.len();
                append_extension(packet, &header, id, &hint.to_bytes());
                // Less than nothing where it takes the place of padding in an extension.
                added = packet.len().saturating_sub(before) as u64;
            }
        }
        Applied { saved, added }
    }

    /// Whether receiver reports about this direction's streams decide anything.
    #[must_use]
    pub fn wants_reports(&self) -> bool {
        self.rules
            .iter()
            .any(|rule| rule.shed_red.is_some() && !rule.shed_always)
    }

    /// The receiver reported `fraction_lost` (1/256) for a stream.
    pub fn report(&mut self, ssrc: u32, fraction_lost: u8) {
        let Some(stream) = self.streams.get_mut(&ssrc) else {
            return;
        };
        if fraction_lost >= LOSSY {
            stream.shedding = false;
            stream.reported_loss = true;
            stream.clean_reports = 0;
        } else {
            stream.clean_reports = stream.clean_reports.saturating_add(1);
            if !stream.reported_loss || stream.clean_reports >= CLEAN_REPORTS {
                stream.shedding = true;
                stream.reported_loss = false;
            }
        }
    }

    /// How many streams are being shed at the moment.
    #[must_use]
    pub fn shedding(&self) -> usize {
        self.streams
            .values()
            .filter(|stream| stream.shedding)
            .count()
    }
}

/// The rule of a packet's stream, by SSRC or MID.
pub(crate) fn find(
    rules: &[TrackRule],
    mid_ext_id: Option<u8>,
    header: &RtpHeader,
    packet: &[u8],
) -> Option<usize> {
    rules
        .iter()
        .position(|rule| rule.ssrcs.contains(&header.ssrc))
        .or_else(|| {
            let mid = header.extension(packet, mid_ext_id?)?;
            rules.iter().position(|rule| rule.mid.as_bytes() == mid)
        })
}

/// What the default publisher would have sent for this packet's time, less what was sent.
fn steering_saved(
    stream: &mut Stream,
    rule: &TrackRule,
    header: &RtpHeader,
    packet: &[u8],
    wire_len: usize,
) -> u64 {
    let ticks = stream
        .last_timestamp
        .map_or(0, |last| header.timestamp.wrapping_sub(last));
    stream.last_timestamp = Some(header.timestamp);
    if header.payload(packet).len() <= DTX_BYTES || ticks > u32::MAX / 2 {
        return 0;
    }
    let ticks = u64::from(ticks.min(MAX_TICKS));
    let default = u64::from(rule.default_bytes_per_second) * ticks / OPUS_CLOCK;
    default.saturating_sub(wire_len as u64)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::description::MediaKind;

    const SSRC: u32 = 7;

    fn red_packet(sequence: u8) -> Vec<u8> {
        let mut packet = vec![0x80, 63, 0, sequence, 0, 0, 0, 0, 0, 0, 0, 7];
        packet.extend([0x80 | 111, 0x0f, 0x00, 4, 111]);
        packet.extend(b"oldernewer");
        packet
    }

    fn flow(rule: TrackRule) -> Flow {
        let mut flow = Flow::default();
        flow.set_rules(&[rule], None);
        flow
    }

    fn shed_rule() -> TrackRule {
        TrackRule {
            ssrcs: vec![SSRC],
            kind: MediaKind::Audio,
            shed_red: Some(63),
            ..TrackRule::default()
        }
    }

    fn sheds_packet(flow: &mut Flow, sequence: u8) -> bool {
        let mut packet = red_packet(sequence);
        let before = packet.len();
        flow.apply(&mut packet, before, 0);
        packet.len() < before
    }

    /// Whether the next packet is shed.
    fn sheds(flow: &mut Flow) -> bool {
        let newest = flow.streams.get(&SSRC).and_then(|s| s.shed.newest);
        let next = newest.map_or(1, |newest| newest + 1);
        sheds_packet(flow, u8::try_from(next).unwrap())
    }

    #[test]
    fn a_packet_that_is_asked_for_again_goes_as_the_first_time() {
        let mut flow = flow(shed_rule());
        for sequence in [1, 2] {
            assert!(!sheds_packet(&mut flow, sequence));
        }
        flow.report(SSRC, 0);
        for sequence in [3, 4, 7] {
            assert!(sheds_packet(&mut flow, sequence));
        }
        assert!(!sheds_packet(&mut flow, 2));
        flow.report(SSRC, 20);
        assert!(!sheds_packet(&mut flow, 8));
        for (sequence, shed) in [(1, false), (3, true), (6, true), (7, true), (8, false)] {
            assert_eq!(sheds_packet(&mut flow, sequence), shed, "{sequence}");
        }
        assert!(!sheds_packet(&mut flow, 50));
        for (sequence, shed) in [(1, false), (3, true), (8, false), (49, false)] {
            assert_eq!(sheds_packet(&mut flow, sequence), shed, "{sequence}");
        }
    }

    #[test]
    fn redundancy_is_shed_only_while_reports_say_nothing_is_lost() {
        let mut flow = flow(shed_rule());
        assert!(!sheds(&mut flow), "no report yet");
        flow.report(SSRC, 0);
        assert!(sheds(&mut flow));
        flow.report(SSRC, 4);
        assert!(sheds(&mut flow), "1.6 % is below 2 %");
        flow.report(SSRC, 6);
        assert!(!sheds(&mut flow), "given back within one report");
        flow.report(SSRC, 0);
        flow.report(SSRC, 0);
        assert!(!sheds(&mut flow));
        flow.report(SSRC, 0);
        assert!(sheds(&mut flow));
    }

    #[test]
    fn a_rule_taken_back_ends_shedding_at_once() {
        let mut flow = flow(shed_rule());
        assert!(!sheds(&mut flow));
        flow.report(SSRC, 0);
        assert!(sheds(&mut flow));
        flow.set_rules(
            &[TrackRule {
                shed_red: None,
                ..shed_rule()
            }],
            None,
        );
        assert!(!sheds(&mut flow));
    }

    #[test]
    fn streams_without_a_rule_pass_untouched() {
        let mut flow = flow(TrackRule {
            ssrcs: vec![8],
            ..shed_rule()
        });
        flow.report(SSRC, 0);
        assert!(!sheds(&mut flow));
        assert!(flow.streams.is_empty());
    }

    #[test]
    fn steered_voice_is_booked_against_the_default_publisher() {
        let mut flow = flow(TrackRule {
            ssrcs: vec![SSRC],
            wrap_red: Some((111, 63)),
            default_bytes_per_second: 14_700,
            ..TrackRule::default()
        });
        let mut saved = 0;
        for n in 0u32..26 {
            let mut packet = vec![0x80, 111, 0, n as u8];
            packet.extend((n * 1920).to_be_bytes());
            packet.extend(SSRC.to_be_bytes());
            packet.extend([0x55; 60]);
            saved += flow.apply(&mut packet, 115, 0).saved;
            assert_eq!(packet[1], 63);
            assert_eq!(packet[12], 111);
        }
        // One second of voice: 14,700 bytes by default, 25 × 115 sent.
        assert_eq!(saved, 14_700 - 25 * 115);
    }

    #[test]
    fn the_hint_is_added_where_it_was_negotiated() {
        let mut flow = flow(TrackRule {
            aic_id: Some(16),
            ..shed_rule()
        });
        let mut packet = red_packet(1);
        let len = packet.len();
        flow.apply(&mut packet, len, 0xabcd);
        let header = RtpHeader::parse(&packet).unwrap();
        let hint = Hint::parse(header.extension(&packet, 16).unwrap()).unwrap();
        assert_eq!(
            (hint.version, hint.sent, hint.redundancy),
            (VERSION, 0xabcd, true)
        );
    }

    /// Found by a fuzzer.
    #[test]
    fn a_hint_in_the_place_of_padding_adds_nothing() {
        let mut flow = flow(TrackRule {
            aic_id: Some(16),
            shed_red: None,
            ..shed_rule()
        });
        let mut packet = red_packet(1);
        packet[0] |= 0x10;
        let padding = [&[0xbe, 0xde, 0, 16][..], &[0; 64]].concat();
        packet.splice(12..12, padding);
        let len = packet.len();
        let applied = flow.apply(&mut packet, len, 0);
        assert_eq!((applied.saved, applied.added), (0, 0));
        assert!(packet.len() < len);
    }

    #[test]
    fn the_hint_says_redundancy_only_while_none_is_shed() {
        let mut sequence = 0;
        let mut hint = |flow: &mut Flow| {
            sequence += 1;
            let mut packet = red_packet(sequence);
            let len = packet.len();
            flow.apply(&mut packet, len, 0);
            let header = RtpHeader::parse(&packet).unwrap();
            Hint::parse(header.extension(&packet, 16).unwrap()).unwrap()
        };
        let rule = TrackRule {
            aic_id: Some(16),
            ..shed_rule()
        };
        let mut auto = flow(rule.clone());
        assert!(hint(&mut auto).redundancy);
        auto.report(SSRC, 0);
        assert!(!hint(&mut auto).redundancy, "shed now");
        let mut always = flow(TrackRule {
            shed_always: true,
            ..rule.clone()
        });
        assert!(!hint(&mut always).redundancy, "shed from the first packet");
        let mut none = flow(TrackRule {
            shed_red: None,
            ..rule
        });
        assert!(!hint(&mut none).redundancy, "there is no RED");
    }

    #[test]
    fn the_hint_is_no_part_of_what_was_saved() {
        let mut flow = flow(TrackRule {
            aic_id: Some(16),
            shed_always: true,
            ..shed_rule()
        });
        let mut packet = red_packet(1);
        let len = packet.len() as u64;
        let Applied { saved, added } = flow.apply(&mut packet, 100, 0);
        assert_eq!(packet.len() as u64, len - saved + added);
        // Four bytes of header and four of older speech; 4 + 2 + 7 bytes of hint, padded.
        assert_eq!((saved, added), (8, 16));
    }
}
