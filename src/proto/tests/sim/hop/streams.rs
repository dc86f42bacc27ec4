//! The streams of one direction as [`Coding`] keeps them: what is negotiated, and what of it holds now.

use super::source::{OPUS, SSRC, speech};
use auralink_proto::coding::{Coded, Coding, EngineRungs, Job, Outcome, Taken};
use auralink_proto::description::{MediaKind, PackRule, RestoreRule, TrackRule};
use auralink_proto::hop::report::{self, Report};
use auralink_proto::hop::{Decoded, EncodeJob, Encoded};
use auralink_proto::ladder::{CodecId, Frames, Rung, Rungs};
use auralink_proto::packet::RtpHeader;
use auralink_proto::relay::Now;
use std::time::{Duration, Instant};

const HINT: u8 = 5;
const OLD: Option<u32> = Some(0xca9d_f5a3);
const NEW: Option<u32> = Some(0x1234_5678);

fn engine(models: Option<u32>) -> EngineRungs {
    EngineRungs {
        encodes: Rungs::ALL,
        decodes: Rungs::ALL,
        frames: Frames::LYRA,
        models,
    }
}

fn rule(pt: u8, models: Option<u32>) -> TrackRule {
    TrackRule {
        ssrcs: vec![SSRC],
        kind: MediaKind::Audio,
        opus_pts: (Some(OPUS), None),
        ..TrackRule::default()
    }
    .packed(pt, models)
}

trait Rule {
    fn packed(self, pt: u8, models: Option<u32>) -> Self;
    fn restored(self, pt: u8, models: Option<u32>) -> Self;
}

impl Rule for TrackRule {
    fn packed(mut self, pt: u8, models: Option<u32>) -> Self {
        self.pack = Some(PackRule {
            pt,
            rungs: Rungs::ALL,
            short_headers: true,
            more_units: true,
            models,
            rung: Rung::L2,
            hint_id: HINT,
            level_id: None,
        });
        self
    }
    fn restored(mut self, pt: u8, models: Option<u32>) -> Self {
        self.pack = None;
        self.restore = Some(RestoreRule {
            pt,
            models,
            hint_id: HINT,
            level_id: None,
        });
        self
    }
}

/// One direction at a clock that is told what time it is.
struct Way {
    start: Instant,
    ms: u64,
    coding: Coding,
}

impl Way {
    fn new(models: Option<u32>, rule: TrackRule) -> Self {
        let mut way = Self {
            start: Instant::now(),
            ms: 0,
            coding: Coding::new(0, 8, engine(models)),
        };
        way.rule(rule);
        way
    }

    fn now(&self) -> Now {
        Now {
            instant: self.start + Duration::from_millis(self.ms),
            ntp: 0,
        }
    }

    fn rule(&mut self, rule: TrackRule) {
        let now = self.now().instant;
        self.coding.set_rules(now, &[rule], None);
    }

    fn models(&mut self, models: Option<u32>) {
        let now = self.now().instant;
        self.coding.set_engine(now, engine(models));
    }

    /// Two originals from this number on, 20 ms apart; it is the time of the second then.
    fn say(&mut self, sequence: u16, newest_sent: Option<u16>) {
        for sequence in [sequence, sequence + 1] {
            self.ms += 20;
            let mut packet = vec![0x80, OPUS];
            packet.extend(sequence.to_be_bytes());
            packet.extend((u32::from(sequence) * 960).to_be_bytes());
            packet.extend(SSRC.to_be_bytes());
            packet.extend(speech(sequence));
            let now = self.now();
            let taken = self.coding.take(now, &packet, 100, |_| newest_sent);
            assert_eq!(taken, Taken::Original);
        }
    }

    fn encode_job(&mut self) -> Option<EncodeJob> {
        match self.coding.poll_job()? {
            Job::Encode(_, job) => Some(job),
            other => panic!("{other:?}"),
        }
    }

    /// The engine does what it was asked; what goes out then.
    fn coded(&mut self) -> (Rung, Vec<u8>) {
        let job = self.encode_job().expect("a group");
        let (rung, codec) = (job.rung, job.rung.codec());
        let frame = if codec == CodecId::Opus { 9 } else { 15 };
        let encoded = Encoded {
            codec,
            payload: vec![9; frame * job.packets.len()],
            gain: 0,
            unit_ms: 20,
            voice: true,
            rung: job.rung,
        };
        let now = self.now();
        self.coding
            .outcome(now, Outcome::Encoded(0, job.id, encoded));
        let mut out = Vec::new();
        let sent = self.coding.poll_packet(now, &mut out);
        assert!(matches!(sent, Some(Coded::Framed { .. })));
        (rung, out)
    }
}

#[test]
fn a_stream_is_framed_after_the_highest_number_that_went_unframed() {
    for (newest, first) in [
        (None, 100),
        (Some(99), 100),
        (Some(105), 106),
        (Some(65_535), 0),
    ] {
        let mut way = Way::new(OLD, rule(20, OLD));
        // 101 to 105 went unframed before the rule came; this one was overtaken by them.
        way.say(100, newest);
        let header = RtpHeader::parse(&way.coded().1).unwrap();
        assert_eq!((header.payload_type, header.sequence), (20, first));
    }
}

#[test]
fn a_payload_type_that_is_negotiated_anew_is_used_from_then_on() {
    let mut way = Way::new(OLD, rule(20, OLD));
    way.say(100, None);
    let before = RtpHeader::parse(&way.coded().1).unwrap();
    way.rule(rule(36, OLD));
    way.say(102, None);
    let after = RtpHeader::parse(&way.coded().1).unwrap();
    assert_eq!((before.payload_type, after.payload_type), (20, 36));
    assert_eq!(after.sequence, before.sequence + 1, "the stream goes on");

    // And on the other side: the hint under a new id is taken out all the same.
    let mut other = Way::new(OLD, rule(0, None).restored(20, OLD));
    way.rule(rule(36, OLD).packed(36, OLD));
    way.say(104, None);
    let (_, framed) = way.coded();
    let mut renegotiated = rule(0, None).restored(36, OLD);
    renegotiated.opus_pts.0 = Some(96);
    other.rule(renegotiated);
    let now = other.now();
    assert_eq!(other.coding.take(now, &framed, 90, |_| None), Taken::Framed);
    assert!(matches!(other.coding.poll_job(), Some(Job::Decode(..))));
}

#[test]
fn models_that_were_replaced_are_left_until_both_speak_of_the_new_ones() {
    let mut sender = Way::new(OLD, rule(20, OLD));
    let mut receiver = Way::new(OLD, rule(0, None).restored(20, OLD));
    sender.say(100, None);
    let (_, framed) = sender.coded();
    let now = receiver.now();
    receiver.coding.take(now, &framed, 90, |_| None);
    let Some(Job::Decode(track, job)) = receiver.coding.poll_job() else {
        panic!("nothing to decode");
    };
    assert_eq!(job.codec, CodecId::Lyra6);
    let decoded = Decoded {
        packets: vec![vec![0x48, 1]; 2],
        levels: vec![30; 2],
        voice: true,
    };
    receiver
        .coding
        .outcome(now, Outcome::Decoded(track, job.id, decoded));

    // The sender's bundle changes: it codes with Opus, which needs no models.
    for (sequence, models, rung) in [
        (102, NEW, Rung::L3),
        (104, None, Rung::L3),
        (106, OLD, Rung::L2),
    ] {
        sender.models(models);
        sender.say(sequence, None);
        assert_eq!(sender.coded().0, rung, "{models:?}");
    }

    // The receiver's: what is on its way is not decoded to noise, and the sender is told.
    receiver.models(NEW);
    receiver.ms += 40;
    let mut sender = Way::new(OLD, rule(20, OLD));
    sender.say(102, Some(101));
    let (_, mut framed) = sender.coded();
    framed[3] = 101;
    let now = receiver.now();
    assert_eq!(
        receiver.coding.take(now, &framed, 90, |_| None),
        Taken::Framed
    );
    assert_eq!(
        receiver.coding.poll_job(),
        None,
        "with other models it is noise"
    );
    let mut rtcp = Vec::new();
    assert!(receiver.coding.poll_report(&mut rtcp));
    let mut said: Vec<Report> = Vec::new();
    report::read(&rtcp, |report| said.push(report));
    assert_eq!(said.last().unwrap().rungs, Rungs::OPUS);
    let now = sender.now();
    sender.coding.report(now, &rtcp);
    sender.say(104, None);
    assert_eq!(sender.coded().0, Rung::L3);

    // A new offer and answer name the new models on both sides.
    sender.models(NEW);
    sender.rule(rule(20, NEW));
    receiver.rule(rule(0, None).restored(20, NEW));
    receiver.ms += 1001;
    let now = receiver.now();
    receiver.coding.handle_timeout(now);
    assert!(receiver.coding.poll_report(&mut rtcp));
    let now = sender.now();
    sender.coding.report(now, &rtcp);
    sender.say(106, None);
    assert_eq!(sender.coded().0, Rung::L2);
}
