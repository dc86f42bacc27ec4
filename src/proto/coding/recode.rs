//! Streams that are coded anew packet by packet, without a hop ([`crate::hop::recode`]).

use super::stream::Stream;
use super::{Coding, EngineRungs, Outcome};
use crate::description::TrackRule;
use crate::hop::recode::Recoder;
use crate::packet::RtpHeader;
use std::time::Instant;

impl Coding {
    /// Whether receiver reports about this direction's streams decide anything here.
    #[must_use]
    pub fn wants_loss(&self) -> bool {
        self.lossy
    }

    /// The receiver reported `fraction_lost` (1/256) for a stream.
    pub fn loss(&mut self, now: Instant, ssrc: u32, fraction_lost: u8) {
        if let Some(number) = self.streams.of(ssrc)
            && let Some(stream) = self.streams.get_mut(number)
            && let Some(recoder) = &mut stream.recoder
        {
            recoder.report(now, fraction_lost);
        }
    }
}

/// An engine that is there does some rung at least.
fn able(recoder: &Recoder, engine: EngineRungs) -> bool {
    match recoder.wants() {
        Some(Some(rung)) => engine.encodes.has(rung),
        Some(None) => !engine.encodes.is_empty(),
        None => false,
    }
}

pub(super) fn set_rule(recoder: &mut Option<Recoder>, rule: Option<&TrackRule>) {
    if let Some(recoder) = recoder {
        // Where there is a hop, it is the hop's.
        let alone = rule.filter(|rule| rule.pack.is_none() && rule.restore.is_none());
        recoder.set_rule(alone.and_then(|rule| rule.recode));
        if let Some((Some(opus_pt), red_pt)) = alone.map(|rule| rule.opus_pts) {
            recoder.set_pts(opus_pt, red_pt);
        }
    }
}

pub(super) fn set_engine(recoder: &mut Option<Recoder>, engine: EngineRungs) {
    if let Some(recoder) = recoder {
        let able = able(recoder, engine);
        recoder.set_able(able);
    }
}

/// Makes a recoder where the rule says so; the stream has gone on up to `newest`.
pub(super) fn begin(
    stream: &mut Stream,
    rule: Option<&TrackRule>,
    engine: EngineRungs,
    newest: Option<u16>,
) {
    if let Some(rule) = rule
        && let (Some(recode), None, None) = (rule.recode, rule.pack, rule.restore)
        && let Some(opus_pt) = rule.opus_pts.0
    {
        let mut recoder = Recoder::new(opus_pt, rule.opus_pts.1, recode, false);
        recoder.begin_after(newest);
        stream.recoder = Some(recoder);
        set_engine(&mut stream.recoder, engine);
    }
}

/// Takes a packet of a stream that isn't packed; `false`: it goes the ordinary way.
pub(super) fn take(stream: &mut Stream, now: Instant, packet: &[u8], wire_len: usize) -> bool {
    if stream.restorer.is_some() {
        return false;
    }
    match &mut stream.recoder {
        Some(recoder) if recoder.is_idle(now) => {
            let header = RtpHeader::parse(packet);
            !header.is_none_or(|header| recoder.skip(header.sequence))
        }
        Some(recoder) => {
            recoder.take(now, packet, wire_len);
            true
        }
        None => false,
    }
}

/// Takes what is for the recoder; what isn't is given back.
pub(super) fn outcome(stream: &mut Stream, now: Instant, outcome: Outcome) -> Option<Outcome> {
    let recoder = stream.recoder.as_mut().filter(|_| stream.packer.is_none());
    match (outcome, recoder) {
        (Outcome::Recoded(_, id, opus), Some(recoder)) => recoder.recoded(now, id, opus),
        (Outcome::Refused(_, id, reason), Some(recoder)) => recoder.refused(now, id, reason),
        (Outcome::Recoded(..), None) => {}
        (other, _) => return Some(other),
    }
    None
}
