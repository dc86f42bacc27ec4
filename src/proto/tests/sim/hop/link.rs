//! Both ends of a hop and what lies between, on a virtual clock.

use super::engine::{Engine, MADE_UP, Manners};
use super::source::{self, LEVEL_ID, MID_ID, OPUS, RED, SSRC, Spoken};
use crate::net::{Netem, Rng};
use auralink_proto::hop::{
    Anchors, DecodeJob, EncodeJob, PackTiming, Packer, PackerConfig, Redundancy, Report,
    RestoreTiming, Restored, Restorer, RestorerConfig, report,
};
use auralink_proto::ladder::{Frames, Rung, Rungs};
use auralink_proto::packet::RtpHeader;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

pub(super) const AIC: u8 = 96;
pub(super) const HINT_ID: u8 = 16;

/// A call over a hop.
pub(super) struct Plan {
    pub(super) ms: u64,
    pub(super) red: bool,
    pub(super) rung: Rung,
    pub(super) redundancy: Redundancy,
    /// Between the speaker and the packer.
    pub(super) before: Netem,
    /// The hop.
    pub(super) hop: Netem,
    /// Probability that a burst of losses begins on the hop, and its length in packets.
    pub(super) bursts: (f64, usize),
    pub(super) encoder: Manners,
    pub(super) decoder: Manners,
}

impl Plan {
    pub(super) fn clean() -> Self {
        Self {
            ms: 30_000,
            red: false,
            rung: Rung::L2,
            redundancy: Redundancy::default(),
            before: Netem::clean(0),
            hop: Netem::clean(50),
            bursts: (0.0, 0),
            encoder: Manners::default(),
            decoder: Manners::default(),
        }
    }
}

/// A framed packet on its way.
struct Framed {
    sent_ms: u64,
    place: u64,
    originals: Vec<u16>,
    /// The place that it carries a copy of.
    copy_of: Option<u64>,
    /// When it first came.
    arrived: Option<u64>,
    /// It came, and can't be read.
    unread: bool,
}

/// A restored packet, and when.
#[derive(Debug, Clone)]
pub(super) struct Heard {
    pub(super) at_ms: u64,
    pub(super) restored: Restored,
    pub(super) sequence: u16,
}

pub(super) struct Link {
    start: Instant,
    now_ms: u64,
    pub(super) rng: Rng,
    plan: Plan,
    spoken: Vec<Spoken>,
    pub(super) packer: Packer,
    pub(super) restorer: Restorer,
    pub(super) encoder: Engine<EncodeJob>,
    pub(super) decoder: Engine<DecodeJob>,
    to_packer: BTreeMap<(u64, u64), usize>,
    on_hop: BTreeMap<(u64, u64), (u64, Vec<u8>)>,
    reports: BTreeMap<(u64, u64), Vec<u8>>,
    order: u64,
    burst: usize,
    framed: Vec<Framed>,
    /// What reads them as they are sent, and as they come.
    anchors: [Anchors; 2],
    /// When each original came to the packer.
    pub(super) came: BTreeMap<u16, u64>,
    pub(super) heard: Vec<Heard>,
    pub(super) seen_reports: Vec<(u64, Report)>,
    pub(super) hop_bytes: usize,
}

impl Link {
    pub(super) fn new(seed: u64, plan: Plan) -> Self {
        let mut rng = Rng::new(seed);
        let spoken = source::call(plan.ms, plan.red, &mut rng);
        let first = u16::from_le_bytes([rng.next().to_le_bytes()[0], 0xff]);
        let mut packer = Packer::new(PackerConfig {
            opus_pt: OPUS,
            red_pt: Some(RED),
            aic_pt: AIC,
            hint_id: Some(HINT_ID),
            level_id: Some(LEVEL_ID),
            first_sequence: first,
            peer_rungs: Rungs::ALL,
            short_headers: true,
            more_units: true,
            redundancy: plan.redundancy,
            timing: PackTiming::default(),
        });
        packer.set_rung(plan.rung);
        let restorer = Restorer::new(RestorerConfig {
            opus_pt: OPUS,
            red_pt: Some(RED),
            hint_id: Some(HINT_ID),
            level_id: Some(LEVEL_ID),
            rungs: Rungs::ALL,
            timing: RestoreTiming::default(),
        });
        let mut to_packer = BTreeMap::new();
        let mut order = 0;
        for (index, spoken) in spoken.iter().enumerate() {
            for delay in plan.before.arrivals(&mut rng) {
                order += 1;
                to_packer.insert((spoken.at_ms + millis(delay), order), index);
            }
        }
        Self {
            start: Instant::now(),
            now_ms: 0,
            encoder: Engine::new(plan.encoder),
            decoder: Engine::new(plan.decoder),
            rng,
            spoken,
            packer,
            restorer,
            to_packer,
            on_hop: BTreeMap::new(),
            reports: BTreeMap::new(),
            order,
            burst: 0,
            framed: Vec::new(),
            anchors: Default::default(),
            came: BTreeMap::new(),
            heard: Vec::new(),
            seen_reports: Vec::new(),
            hop_bytes: 0,
            plan,
        }
    }

    /// Until everything has arrived.
    pub(super) fn run(&mut self) {
        self.run_until(self.plan.ms + 2000);
    }

    pub(super) fn run_until(&mut self, ms: u64) {
        while self.now_ms < ms {
            self.now_ms += 1;
            self.turn();
        }
    }

    pub(super) fn time(&self) -> Instant {
        self.now()
    }

    pub(super) fn now_ms(&self) -> u64 {
        self.now_ms
    }

    fn now(&self) -> Instant {
        self.start + Duration::from_millis(self.now_ms)
    }

    fn ntp(&self) -> u32 {
        u32::try_from((self.now_ms * 65_536 / 1000) & 0xffff_ffff).unwrap()
    }

    fn turn(&mut self) {
        let now = self.now();
        if self.packer.poll_timeout().is_some_and(|due| due <= now) {
            self.packer.handle_timeout(now);
        }
        while let Some(entry) = self.to_packer.first_entry() {
            if entry.key().0 > self.now_ms {
                break;
            }
            let spoken = &self.spoken[entry.remove()];
            self.came.entry(spoken.sequence).or_insert(self.now_ms);
            self.packer
                .take(now, &spoken.packet, spoken.packet.len() + 38);
        }
        self.encoder.turn(now, &mut self.packer, &mut self.rng);
        self.send();
        while let Some(entry) = self.on_hop.first_entry() {
            if entry.key().0 > self.now_ms {
                break;
            }
            let (place, packet) = entry.remove();
            let framed = &mut self.framed[usize::try_from(place).unwrap()];
            framed.arrived.get_or_insert(self.now_ms);
            // Where all whole headers of its run were lost, nobody can read it.
            let header = RtpHeader::parse(&packet).unwrap();
            let position = (header.sequence, header.timestamp);
            let [_, anchors] = &mut self.anchors;
            framed.unread = anchors
                .read(position, header.payload(&packet), Frames::LYRA)
                .is_err();
            let ntp = self.ntp();
            self.restorer.take(now, ntp, &packet, packet.len() + 32);
        }
        if self.restorer.poll_timeout().is_some_and(|due| due <= now) {
            self.restorer.handle_timeout(now);
        }
        self.decoder.turn(now, &mut self.restorer, &mut self.rng);
        self.listen();
        if let Some(report) = self.restorer.poll_report(now) {
            self.seen_reports.push((self.now_ms, report));
            let mut rtcp = Vec::new();
            report::write(7, &[report], &mut rtcp);
            self.order += 1;
            let back = self.now_ms + millis(self.plan.hop.delay);
            self.reports.insert((back, self.order), rtcp);
        }
        while let Some(entry) = self.reports.first_entry() {
            if entry.key().0 > self.now_ms {
                break;
            }
            let rtcp = entry.remove();
            assert!(report::is_in(&rtcp));
            report::read(&rtcp, |report| self.packer.report(now, &report));
        }
    }

    fn send(&mut self) {
        let mut packet = Vec::new();
        let ntp = self.ntp();
        while let Some(sent) = self.packer.poll_packet(ntp, &mut packet) {
            let header = RtpHeader::parse(&packet).unwrap();
            assert_eq!((header.payload_type, header.ssrc), (AIC, SSRC));
            let position = (header.sequence, header.timestamp);
            let payload = header.payload(&packet);
            let [anchors, _] = &mut self.anchors;
            let payload = anchors.read(position, payload, Frames::LYRA).unwrap();
            assert_eq!(payload.part.packets, sent.originals);
            assert_eq!(payload.redundant.is_some(), sent.copy);
            let place = self.framed.len() as u64;
            let originals = (0..u16::from(sent.originals))
                .map(|index| payload.part.sequence.wrapping_add(index))
                .collect();
            let copy_of = payload
                .redundant
                .map(|copy| place - u64::from(copy.hop_distance));
            self.hop_bytes += packet.len() + 32;
            self.framed.push(Framed {
                sent_ms: self.now_ms,
                place,
                originals,
                copy_of,
                arrived: None,
                unread: false,
            });
            // A burst, and after it at least as many packets without another.
            let (chance, length) = self.plan.bursts;
            if self.burst == 0 && self.rng.chance(chance) {
                self.burst = 2 * length;
            }
            if self.burst > 0 {
                self.burst -= 1;
                if self.burst >= length {
                    continue;
                }
            }
            for delay in self.plan.hop.arrivals(&mut self.rng) {
                self.order += 1;
                let at = (self.now_ms + millis(delay), self.order);
                self.on_hop.insert(at, (place, packet.clone()));
            }
        }
    }

    fn listen(&mut self) {
        let mut packet = Vec::new();
        while let Some(restored) = self.restorer.poll_packet(&mut packet) {
            let header = RtpHeader::parse(&packet).unwrap();
            let spoken = self
                .spoken
                .iter()
                .find(|spoken| spoken.sequence == header.sequence)
                .expect("an original has that sequence number");
            assert_eq!(header.timestamp, spoken.timestamp);
            assert_eq!(header.ssrc, SSRC);
            assert_eq!(
                header.extension(&packet, HINT_ID),
                None,
                "hints stay on the hop"
            );
            let payload = header.payload(&packet);
            let media = if self.plan.red {
                assert_eq!(header.payload_type, RED);
                assert_eq!(payload[0], OPUS, "primary-only RED");
                &payload[1..]
            } else {
                assert_eq!(header.payload_type, OPUS);
                payload
            };
            let expected = if restored.concealed {
                MADE_UP
            } else {
                &spoken.media
            };
            assert_eq!(media, expected, "{restored:?}");
            if !restored.copied && !restored.concealed {
                // What was recovered from RED has no marker of its own.
                assert!(header.marker == spoken.marker || self.plan.red && !header.marker);
            }
            if !restored.native {
                assert_eq!(header.extension(&packet, LEVEL_ID), Some(&[0x80 | 30][..]));
            } else if !self.plan.red && !restored.copied {
                assert_eq!(packet, spoken.packet, "native: byte for byte");
            }
            if let Some(mid) = header.extension(&packet, MID_ID) {
                assert_eq!(mid, b"0");
            }
            self.heard.push(Heard {
                at_ms: self.now_ms,
                restored,
                sequence: header.sequence,
            });
        }
    }

    /// Every original that the packer had is heard exactly once, or its loss is explained: its framed
    /// packet didn't come, and no copy of it did either.
    pub(super) fn account(&self) -> Books {
        let mut books = Books::default();
        let mut heard: BTreeMap<u16, Restored> = BTreeMap::new();
        for Heard {
            restored, sequence, ..
        } in &self.heard
        {
            if heard.insert(*sequence, *restored).is_some() {
                books.twice.insert(*sequence);
            }
        }
        for framed in &self.framed {
            books.unread += usize::from(framed.unread);
            let came = framed.arrived.is_some() && !framed.unread || self.copy_came(framed);
            for sequence in &framed.originals {
                books.sent += 1;
                match heard.get(sequence) {
                    Some(restored) if restored.concealed => {
                        books.concealed += 1;
                        assert!(
                            !came || self.may_be_late(),
                            "{sequence} was made up, but came"
                        );
                    }
                    Some(restored) if restored.copied => books.copied += 1,
                    Some(_) => books.whole += 1,
                    None => {
                        books.missing += 1;
                        assert!(
                            !came || self.may_be_late(),
                            "{sequence} sent at {} ms is missing: {:?}",
                            framed.sent_ms,
                            self.restorer.stats
                        );
                    }
                }
            }
        }
        books
    }

    /// Whether a copy of `framed` came while it was waited for.
    fn copy_came(&self, framed: &Framed) -> bool {
        let behind = &self.framed[usize::try_from(framed.place).unwrap() + 1..];
        let Some(gap_known) = behind.iter().filter_map(|behind| behind.arrived).min() else {
            return false;
        };
        // Before the first copy there is nothing that says that one is to be waited for.
        let expected = |other: &Framed| other.copy_of.is_some() && other.arrived <= Some(gap_known);
        let patience = if self
            .framed
            .iter()
            .any(|other| other.arrived.is_some() && expected(other))
        {
            70
        } else {
            30
        };
        behind.iter().take(8).any(|carrier| {
            let came = carrier
                .arrived
                .is_some_and(|came| came <= gap_known + patience);
            came && carrier.copy_of == Some(framed.place)
        })
    }

    /// The hop may hold a packet back for longer than the restorer waits.
    fn may_be_late(&self) -> bool {
        self.plan.hop.reorder > 0.0 || self.plan.hop.jitter > Duration::from_millis(30)
    }

    /// Milliseconds from an original's arrival at the packer to its restoration, the hop's way not
    /// counted; sorted.
    pub(super) fn latencies(&self, which: impl Fn(&Restored) -> bool) -> Vec<u64> {
        let mut latencies: Vec<u64> = self
            .heard
            .iter()
            .filter(|heard| which(&heard.restored))
            .filter_map(|heard| {
                let came = self.came.get(&heard.sequence)?;
                Some((heard.at_ms - came).saturating_sub(millis(self.plan.hop.delay)))
            })
            .collect();
        latencies.sort_unstable();
        latencies
    }

    pub(super) fn spoken(&self) -> usize {
        self.spoken.len()
    }

    pub(super) fn native_bytes(&self) -> usize {
        self.spoken
            .iter()
            .map(|spoken| spoken.packet.len() + 38)
            .sum()
    }
}

/// What became of the originals that were sent over the hop.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Books {
    pub(super) sent: usize,
    pub(super) whole: usize,
    pub(super) copied: usize,
    pub(super) concealed: usize,
    pub(super) missing: usize,
    /// Framed packets that came after all that they could have been read by were lost.
    pub(super) unread: usize,
    pub(super) twice: BTreeSet<u16>,
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap()
}
