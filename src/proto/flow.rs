//! One direction of a peer connection: which rule goes with which stream, what it does to each
//! packet, and what that saved.

use crate::description::{MediaKind, TrackRule};
use crate::packet::RtpHeader;
use crate::past::{Done, Floor, Past};
use crate::red::{self, Shed};
use crate::rules::Rules;
use crate::srtp::Refusal;
use foldhash::HashMap;

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

/// Streams of one direction beyond so many share no state and pass untouched, until some have ended. A participant
/// could otherwise grow the map with random SSRCs.
const MAX_STREAMS: usize = 4096;

/// Streams that ended and whose packets were changed: 8 bytes each as long as the leg's keys live, because they must not go
/// otherwise when they come again. With so many of them no further one is forgotten.
const MAX_GONE: usize = 16_384;

/// A stream that has been silent for so long has ended where others need its place, in 1/65,536 s: a minute ...
const IDLE: u32 = 60 << 16;
/// ... and it is looked for such ones so often.
const LOOK_AGAIN: u32 = 1 << 16;

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
    /// Bytes as they would have been without AuraLink: with the redundancy that was shed, and with what the default publisher would have sent. An SRTP tag counts as long as it
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
    /// Index into the rules; `None`: no rule any more, goes on as what it was lets it.
    rule: Option<usize>,
    /// `a=mid` of its rule.
    mid: String,
    /// When its last packet came: the middle of the NTP time.
    last: u32,
    shedding: bool,
    clean_reports: u8,
    reported_loss: bool,
    last_timestamp: Option<u32>,
    past: Past,
    /// Payload type of the RED that was shed, and those of what was wrapped, after the rule is gone too.
    shed_pt: Option<u8>,
    wrap_pts: Option<(u8, u8)>,
    /// What it was before it ended and came again.
    floor: Option<Floor>,
}

/// One direction.
#[derive(Debug, Default)]
pub struct Flow {
    rules: Rules,
    /// Some rule wants to know what receivers report.
    reports: bool,
    /// Seeded as those of [`Rules`] are.
    streams: HashMap<u32, Stream>,
    gone: HashMap<u32, Floor>,
    /// No stream was to be forgotten then.
    full_at: Option<u32>,
    /// Counters.
    pub stats: FlowStats,
}

impl Flow {
    /// Takes new rules; what streams have learned of loss stays, and what was done to their packets.
    pub fn set_rules(&mut self, rules: &[TrackRule], mid_ext_id: Option<u8>) {
        if !self.rules.set(rules.to_vec(), mid_ext_id) {
            return;
        }
        let wants = |rule: &TrackRule| rule.shed_red.is_some() && !rule.shed_always;
        self.reports = self.rules.list().iter().any(wants);
        for (ssrc, stream) in &mut self.streams {
            stream.rule = self.rules.again(*ssrc, &stream.mid);
        }
        self.streams.retain(|_, stream| {
            stream.rule.is_some() || stream.past.is_any() || stream.floor.is_some()
        });
    }

    /// The stream of a packet, made where a rule is for it. None: there is none. `false`: the packet must not go.
    fn stream(
        &mut self,
        header: &RtpHeader,
        packet: &[u8],
        ntp: u32,
        newest_sent: impl FnOnce(u32) -> Option<u16>,
    ) -> Option<bool> {
        if let Some(stream) = self.streams.get_mut(&header.ssrc) {
            stream.last = ntp;
            if stream.rule.is_none()
                && let Some(index) = self.rules.find(header, packet)
            {
                stream.rule = Some(index);
                if let Some(rule) = self.rules.get(index) {
                    stream.mid.clone_from(&rule.mid);
                }
            }
            let floor = stream.floor.as_mut();
            return Some(floor.is_none_or(|floor| floor.admits(header.sequence)));
        }
        let mut floor = None;
        if !self.gone.is_empty()
            && let Some(gone) = self.gone.get_mut(&header.ssrc)
        {
            if !gone.admits(header.sequence) {
                return Some(false);
            }
            floor = Some(*gone);
        }
        let index = self.rules.find(header, packet)?;
        let mid = self.rules.get(index)?.mid.clone();
        if self.streams.len() >= MAX_STREAMS && !self.forget(ntp) {
            return None;
        }
        self.gone.remove(&header.ssrc);
        let stream = Stream {
            rule: Some(index),
            mid,
            last: ntp,
            // What went before it had a rule.
            past: Past::after(newest_sent(header.ssrc)),
            floor,
            ..Stream::default()
        };
        self.streams.insert(header.ssrc, stream);
        Some(true)
    }

    /// Forgets streams that ended; `false`: there are none.
    fn forget(&mut self, now: u32) -> bool {
        if self
            .full_at
            .is_some_and(|at| now.wrapping_sub(at) < LOOK_AGAIN)
        {
            return false;
        }
        let before = self.streams.len();
        let gone = &mut self.gone;
        self.streams.retain(|ssrc, stream| {
            if now.wrapping_sub(stream.last) < IDLE {
                return true;
            }
            if !stream.past.is_any() && stream.floor.is_none() {
                return false;
            }
            let newest = stream.past.newest().map(Floor).or(stream.floor);
            if gone.len() >= MAX_GONE {
                return true;
            }
            gone.extend(newest.map(|newest| (*ssrc, newest)));
            false
        });
        let some = self.streams.len() < before;
        self.full_at = (!some).then_some(now);
        some
    }

    /// Applies a stream's rule to a decrypted RTP packet. `wire_len` is what the packet took on
    /// the wire of its sender; `ntp` the middle 32 bits of the NTP time; `newest_sent` is the highest sequence number that has
    /// gone on of a stream, by SSRC. Returns the bytes that the packet would have taken more in the default configuration.
    /// None: it must not go on, because one of its number may have gone in another way and nobody knows any more.
    pub fn apply(
        &mut self,
        packet: &mut Vec<u8>,
        wire_len: usize,
        ntp: u32,
        newest_sent: impl FnOnce(u32) -> Option<u16>,
    ) -> Option<u64> {
        const UNTOUCHED: Option<u64> = Some(0);
        if self.rules.is_empty() && self.streams.is_empty() && self.gone.is_empty() {
            return UNTOUCHED;
        }
        let Some(header) = RtpHeader::parse(packet) else {
            return UNTOUCHED;
        };
        match self.stream(&header, packet, ntp, newest_sent) {
            Some(true) => {}
            Some(false) => return None,
            None => return UNTOUCHED,
        }
        let Some(stream) = self.streams.get_mut(&header.ssrc) else {
            return UNTOUCHED;
        };
        const NO_RULE: &TrackRule = &TrackRule {
            ssrcs: Vec::new(),
            mid: String::new(),
            kind: MediaKind::Other,
            wrap_red: None,
            shed_red: None,
            shed_always: false,
            default_bytes_per_second: 0,
            opus_pts: (None, None),
            pack: None,
            restore: None,
            recode: None,
        };
        let rule = stream.rule.and_then(|index| self.rules.get(index));
        let rule = rule.unwrap_or(NO_RULE);
        let mut saved = 0;
        stream.shed_pt = rule.shed_red.or(stream.shed_pt);
        stream.wrap_pts = rule.wrap_red.or(stream.wrap_pts);
        let done = Done {
            shed: rule.shed_red.is_some() && (stream.shedding || rule.shed_always),
            wrap: rule.wrap_red.is_some(),
        };
        let done = stream.past.of(header.sequence, done)?;
        if rule.default_bytes_per_second > 0 {
            saved += steering_saved(stream, rule, &header, packet, wire_len);
        }
        if done.wrap
            && let Some((opus, red)) = stream.wrap_pts
            && header.payload_type == opus
        {
            red::wrap(packet, &header, red);
            self.stats.wrapped_packets += 1;
        }
        if done.shed
            && stream.shed_pt == Some(header.payload_type)
            && let Shed::Dropped(bytes) = red::shed(packet, &header)
        {
            saved += bytes as u64;
            self.stats.shed_packets += 1;
        }
        Some(saved)
    }

    /// Whether receiver reports about this direction's streams decide anything.
    #[must_use]
    pub fn wants_reports(&self) -> bool {
        self.reports
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
        flow.apply(&mut packet, before, 0, |_| None);
        packet.len() < before
    }

    /// Whether the next packet is shed.
    fn sheds(flow: &mut Flow) -> bool {
        let newest = flow.streams.get(&SSRC).and_then(|s| s.past.newest());
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
    fn a_packet_asked_for_after_its_rule_went_goes_as_the_first_time() {
        let mut flow = flow(shed_rule());
        assert!(!sheds_packet(&mut flow, 1));
        flow.report(SSRC, 0);
        assert!(sheds_packet(&mut flow, 2));
        flow.set_rules(&[], None);
        assert!(sheds_packet(&mut flow, 2), "one SRTP index, two payloads");
        assert!(!sheds_packet(&mut flow, 1) && !sheds_packet(&mut flow, 3));
        flow.set_rules(&[shed_rule()], None);
        assert!(!sheds_packet(&mut flow, 3) && sheds_packet(&mut flow, 4));
    }

    #[test]
    fn what_was_wrapped_is_wrapped_again_without_its_rule() {
        let wraps = |flow: &mut Flow, sequence| {
            let mut packet = vec![0x80, 111, 0, sequence, 0, 0, 0, 0, 0, 0, 0, 7, 1, 2];
            flow.apply(&mut packet, 14, 0, |_| None).unwrap();
            packet[1] & 0x7f == 63
        };
        let rule = TrackRule {
            ssrcs: vec![SSRC],
            wrap_red: Some((111, 63)),
            ..TrackRule::default()
        };
        let mut flow = flow(rule.clone());
        assert!(wraps(&mut flow, 1));
        flow.set_rules(&[], None);
        assert!(wraps(&mut flow, 1) && !wraps(&mut flow, 2));
        flow.set_rules(&[rule], None);
        assert!(!wraps(&mut flow, 2) && wraps(&mut flow, 3));
    }

    #[test]
    fn streams_that_ended_give_up_their_places_and_keep_their_numbers() {
        let mut flow = Flow::default();
        let rule = TrackRule {
            mid: "0".to_owned(),
            shed_red: Some(63),
            shed_always: true,
            ..TrackRule::default()
        };
        flow.set_rules(std::slice::from_ref(&rule), Some(3));
        let mut apply = |ssrc: u32, sequence: u8, ntp: u32| {
            let mut packet = red_packet(sequence);
            packet[0] |= 0x10;
            packet[8..12].copy_from_slice(&ssrc.to_be_bytes());
            packet.splice(12..12, [0xbe, 0xde, 0, 1, 0x30, b'0', 0, 0]);
            let before = packet.len();
            let applied = flow.apply(&mut packet, before, ntp, |_| None);
            assert!(flow.streams.len() <= MAX_STREAMS && flow.gone.len() <= MAX_GONE);
            applied.map(|_| packet.len() < before)
        };
        for ssrc in 0..u32::try_from(MAX_STREAMS).unwrap() {
            assert_eq!(apply(ssrc, 1, 0), Some(true));
        }
        assert_eq!(apply(1 << 20, 1, 1), Some(false), "no place is free");
        assert_eq!(apply(1 << 21, 1, IDLE + 2), Some(true));
        // What goes on in another way has another number.
        assert_eq!(apply(5, 1, IDLE + 3), None);
        assert_eq!(apply(5, 2, IDLE + 3), Some(true));
        assert_eq!(apply(5, 1, IDLE + 3), None);
        // However many there are.
        for ssrc in 0..60_000 {
            apply(1 << 22 | ssrc, 1, IDLE * (ssrc / 500));
        }
    }

    #[test]
    fn a_packet_costs_the_same_among_5_streams_and_500() {
        let looks = |count: u32| {
            let mut flow = Flow::default();
            let rules: Vec<TrackRule> = (0..count)
                .map(|n| TrackRule {
                    ssrcs: vec![1000 + n],
                    ..shed_rule()
                })
                .collect();
            flow.set_rules(&rules, None);
            let mut looks = Vec::new();
            for ssrc in [999 + count, 1, 1] {
                let mut packet = red_packet(1);
                packet[8..12].copy_from_slice(&ssrc.to_be_bytes());
                flow.rules.looks.set(0);
                flow.apply(&mut packet, 50, 0, |_| None);
                looks.push(flow.rules.looks.get());
            }
            looks
        };
        assert_eq!(looks(5), looks(500));
        assert!(looks(500).iter().all(|looks| *looks < 4));
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
            saved += flow.apply(&mut packet, 115, 0, |_| None).unwrap();
            assert_eq!(packet[1], 63);
            assert_eq!(packet[12], 111);
        }
        // One second of voice: 14,700 bytes by default, 25 × 115 sent.
        assert_eq!(saved, 14_700 - 25 * 115);
    }
}
