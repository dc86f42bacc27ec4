//! What a session says in SDP about the AIC hop (docs/protocol.md).

use crate::aic::EXTENSION_URI;
use crate::description::MediaKind;
use crate::ladder::Rungs;
use crate::sdp::{AicLine, Media, Sdp, free_extmap_ids, free_payload_type};
use crate::steering::aic_id;

/// The AIC extension for every media section of an offer, under one id that is free in all.
pub(super) fn aic_extmaps(sdp: &Sdp<'_>, taken: Option<u16>) -> Vec<(String, u16, String)> {
    let already = sdp
        .media()
        .iter()
        .find_map(|media| media.extmap_id(EXTENSION_URI));
    let free = || free_extmap_ids(sdp, 1).ids.first().copied();
    let Some(id) = already.or(taken).or_else(free) else {
        return Vec::new();
    };
    sdp.media()
        .iter()
        .filter(|media| !media.rejected && media.kind != MediaKind::Other)
        .map(|media| (media.mid.clone(), id, EXTENSION_URI.to_owned()))
        .collect()
}

/// Extensions that browsers offer and LiveKit never answers.
const UNANSWERED: [&str; 3] = [
    "http://www.webrtc.org/experiments/rtp-hdrext/color-space",
    "http://www.webrtc.org/experiments/rtp-hdrext/video-timing",
    "http://www.webrtc.org/experiments/rtp-hdrext/video-content-type",
];

/// The id of an extension that may go from an offer where all one-byte ids are taken: the hint in
/// two-byte headers would be 4 bytes longer, 4 % of a framed packet.
pub(super) fn unanswered_id(sdp: &Sdp<'_>) -> Option<u16> {
    if !free_extmap_ids(sdp, 1).two_byte {
        return None;
    }
    let id_of = |uri: &&str| sdp.media().iter().find_map(|media| media.extmap_id(uri));
    let id = UNANSWERED.iter().find_map(id_of)?;
    // Under BUNDLE an id means one thing, but a client may do without BUNDLE.
    let others = |(known, uri): &(u16, String)| *known == id && !UNANSWERED.contains(&uri.as_str());
    let mut extmaps = sdp.media().iter().flat_map(|media| &media.extmaps);
    (id < 15 && !extmaps.any(others)).then_some(id)
}

/// The AIC extension where the offer has it, under the offerer's own id.
pub(super) fn answered_extmaps(offered: &[Media]) -> Vec<(String, u16, String)> {
    offered
        .iter()
        .filter(|media| !media.rejected)
        .filter_map(|media| {
            let id = media.extmap_id(EXTENSION_URI)?;
            Some((media.mid.clone(), id, EXTENSION_URI.to_owned()))
        })
        .collect()
}

/// What this code says of itself.
const fn line(pt: u8, rungs: Rungs, models: Option<u32>) -> AicLine {
    AicLine {
        pt,
        rungs,
        models,
        short_headers: true,
        more_units: true,
    }
}

/// `a=aic` for the audio sections of an offer that get the hint, which framed packets need, under the payload type that the
/// last one had.
pub(super) fn offered_aic(
    sdp: &Sdp<'_>,
    hints: &[(String, u16, String)],
    told: &[(String, AicLine)],
    (rungs, models): (Rungs, Option<u32>),
) -> Vec<(String, AicLine)> {
    let wanted = told.first().map(|(_, line)| line.pt);
    let Some(pt) = free_payload_type(sdp, wanted) else {
        return Vec::new();
    };
    sdp.media()
        .iter()
        .filter(|media| !media.rejected && media.kind == MediaKind::Audio)
        .filter(|media| hints.iter().any(|(mid, ..)| *mid == media.mid))
        .map(|media| (media.mid.clone(), line(pt, rungs, models)))
        .collect()
}

/// `a=aic` where the offer has it and the hint, without which nothing is framed, under the offerer's own payload type.
pub(super) fn answered_aic(
    offered: &[Media],
    (rungs, models): (Rungs, Option<u32>),
) -> Vec<(String, AicLine)> {
    offered
        .iter()
        .filter(|media| !media.rejected)
        .filter_map(|media| {
            let pt = media.aic?.pt;
            aic_id(media)?;
            Some((media.mid.clone(), line(pt, rungs, models)))
        })
        .collect()
}

/// Payload types of framed packets that come from a peer and that go to it.
pub(super) fn aic_pts(told: &[(String, AicLine)], from_peer: &[Media]) -> (Option<u8>, Option<u8>) {
    // Without the hint its line counts for nothing: no framed packet goes either way.
    let mut hinted = from_peer.iter().filter(|media| aic_id(media).is_some());
    let theirs = hinted.find_map(|media| media.aic);
    // A peer that says nothing of it sends none.
    let ours = theirs.and_then(|_| told.first());
    (ours.map(|(_, line)| line.pt), theirs.map(|line| line.pt))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const OURS: (Rungs, Option<u32>) = (Rungs::ALL, None);
    const AIC: &str = "a=aic:1 pt=35 rungs=1,2\r\n";

    /// An SDP of one audio section that has these lines.
    fn audio(lines: &str) -> String {
        format!("v=0\r\nm=audio 9 UDP/TLS/RTP/SAVPF 111\r\na=mid:0\r\n{lines}")
    }

    fn hint() -> String {
        format!("a=extmap:9 {EXTENSION_URI}\r\n")
    }

    #[test]
    fn an_offer_without_the_hint_is_answered_without_aic() {
        let answered = |lines: &str| {
            let text = audio(lines);
            answered_aic(Sdp::parse(&text).unwrap().media(), OURS)
        };
        assert_eq!(
            answered(&format!("{}{AIC}", hint())),
            [("0".to_owned(), line(35, Rungs::ALL, None))]
        );
        assert!(answered(AIC).is_empty(), "no hint was offered");
        assert!(answered(&hint()).is_empty(), "no framed packets either");
    }

    #[test]
    fn aic_is_offered_with_the_hint_only() {
        let text = audio("");
        let sdp = Sdp::parse(&text).unwrap();
        let hints = aic_extmaps(&sdp, None);
        assert_eq!(offered_aic(&sdp, &hints, &[], OURS).len(), 1);
        assert!(
            offered_aic(&sdp, &[], &[], OURS).is_empty(),
            "no id was free"
        );
    }
}
