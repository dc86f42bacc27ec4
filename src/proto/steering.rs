//! What policy does to the tracks of one peer connection: how its answer is steered, and the rules
//! its media goes by.

use crate::aic::EXTENSION_URI;
use crate::description::{MediaKind, PackRule, RecodeRule, RestoreRule, TrackRule};
use crate::ladder::Rung;
use crate::policy::{Mode, Policy, RecodeFor, RedPolicy};
use crate::sdp::{AicLine, Media, MediaSteer};
use crate::signal::{SOURCE_SCREEN_SHARE, SOURCE_SCREEN_SHARE_AUDIO};
use crate::tracks::{Own, Tracks};
use sha2::{Digest, Sha256};
use std::collections::HashMap;

/// What the default publisher sends a second of speech, headers included: Opus 48 kbit/s and RED,
/// measured at 117.5 kbit/s (docs/benchmarks.md).
const DEFAULT_SPEECH_BYTES_PER_SECOND: u32 = 117_500 / 8;

/// The same without RED, as Firefox sends it, which knows none, and clients that encrypt end to end: 73.7 kbit/s.
const PLAIN_SPEECH_BYTES_PER_SECOND: u32 = 73_700 / 8;

/// MID header extension (RFC 9143).
pub(crate) const MID_URI: &str = "urn:ietf:params:rtp-hdrext:sdes:mid";

/// Client-to-mixer audio level (RFC 6464).
const LEVEL_URI: &str = "urn:ietf:params:rtp-hdrext:ssrc-audio-level";

/// Whether Opus `key` is 1: `stereo` says what its writer wants to receive, `sprop-stereo` what it
/// will send (RFC 7587 section 6.1). libwebrtc writes `stereo=1` whatever it sends.
fn opus_says(media: &Media, key: &str) -> bool {
    media
        .codec("opus")
        .is_some_and(|opus| opus.fmtp_value(key) == Some("1"))
}

/// What LiveKit's answer has of a track that it knows to be stereo, and only of such (`configurePublisherAnswer`). It may know better than
/// AddTrack: `UpdateLocalAudioTrack` changes it.
fn meant_as_stereo(answered: &Media) -> bool {
    let is = |key, value| {
        answered
            .codec("opus")
            .is_some_and(|opus| opus.fmtp_value(key) == Some(value))
    };
    is("stereo", "1") && is("maxaveragebitrate", "510000")
}

/// SSRCs of an m-section that its rule names: three layers of media, retransmission (RTX) and error correction make nine, and
/// livekit-server names two. A section that has more names none: its packets say their MID.
const MAX_SSRCS: usize = 16;

fn ssrcs(media: &Media) -> Vec<u32> {
    if media.ssrcs.len() > MAX_SSRCS {
        return Vec::new();
    }
    media.ssrcs.clone()
}

/// The m-section of each `a=mid`; of several the first.
fn by_mid(media: &[Media]) -> HashMap<&str, &Media> {
    let sections = media.iter().rev();
    sections.map(|media| (media.mid.as_str(), media)).collect()
}

/// How the answer to a client's offer is changed on its way, per m-section.
pub(crate) fn steer(
    policy: &Policy,
    tracks: &Tracks,
    offer: &[Media],
    answer: &[Media],
) -> Vec<MediaSteer> {
    if policy.mode == Mode::Off {
        return Vec::new();
    }
    let offers = by_mid(offer);
    answer
        .iter()
        .filter(|answered| !answered.rejected && answered.direction.receives())
        .filter_map(|answered| {
            let offered = *offers.get(answered.mid.as_str())?;
            let track = tracks.own_of(offered)?;
            match answered.kind {
                MediaKind::Audio => steer_audio(policy, track, offered, answered),
                MediaKind::Video => steer_video(policy, track, answered),
                MediaKind::Other => None,
            }
        })
        .collect()
}

fn steer_audio(
    policy: &Policy,
    track: &Own,
    offered: &Media,
    answered: &Media,
) -> Option<MediaSteer> {
    // Music and what it may be stays as its publisher wants it.
    if track.stereo
        || track.source == SOURCE_SCREEN_SHARE_AUDIO
        || opus_says(offered, "sprop-stereo")
        || meant_as_stereo(answered)
    {
        return None;
    }
    let opus = answered.codec("opus")?;
    let mut fmtp = Vec::new();
    if opus_says(answered, "stereo") {
        // LiveKit takes the offer's `stereo=1` out and says `usedtx=1` where it finds the track, but in one of ten joins it looks for it
        // while it moves from the pending to the published ones (`configurePublisherAnswer`). A microphone would be coded as stereo then.
        fmtp.push(("stereo".to_owned(), "0".to_owned()));
        if !track.disable_dtx {
            fmtp.push(("usedtx".to_owned(), "1".to_owned()));
        }
    }
    // Towards an edge the publisher's link is local: its quality is worth more than its bytes.
    if policy.mode == Mode::Neural {
        return (!fmtp.is_empty()).then(|| MediaSteer {
            mid: answered.mid.clone(),
            fmtp: vec![(opus.pt, fmtp)],
            ..MediaSteer::default()
        });
    }
    fmtp.push((
        "maxaveragebitrate".to_owned(),
        policy.audio.max_bitrate.to_string(),
    ));
    Some(MediaSteer {
        mid: answered.mid.clone(),
        // An encrypted payload is not wrapped, so RED has to stay if it was negotiated.
        remove_red: policy.audio.red != RedPolicy::Keep && !track.encrypted,
        fmtp: vec![(opus.pt, fmtp)],
        ptime: Some(policy.audio.packet_ms),
        maxptime: Some(policy.audio.packet_ms),
        // livekit-client sets maxBitrate on its encodings, which overrides the fmtp: only b=TIAS
        // lowers it.
        tias: Some(policy.audio.max_bitrate),
    })
}

fn steer_video(policy: &Policy, track: &Own, answered: &Media) -> Option<MediaSteer> {
    let video = policy.video?;
    if track.source == SOURCE_SCREEN_SHARE && !video.screen_share {
        return None;
    }
    Some(MediaSteer {
        mid: answered.mid.clone(),
        tias: Some(video.max_bitrate?),
        ..MediaSteer::default()
    })
}

/// What framed packets are made for, and what was said of them.
pub(crate) struct Hop<'a> {
    pub(crate) policy: &'a Policy,
    /// What the sender of this direction was told that we take, by mid.
    pub(crate) told: &'a [(String, AicLine)],
}

impl Hop<'_> {
    /// Speech from a peer that wrote `from` towards one that wrote `to`, if that takes framed packets. `speech` says that the track
    /// is neither music, stereo nor encrypted.
    fn pack(&self, from: &Media, to: &Media, speech: bool) -> Option<PackRule> {
        let line = to.aic?;
        let rung = self.policy.rung();
        (speech && rung != Rung::NATIVE && !line.rungs.is_empty()).then_some(PackRule {
            pt: line.pt,
            rungs: line.rungs,
            short_headers: line.short_headers,
            more_units: line.more_units,
            models: line.models,
            rung,
            hint_id: aic_id(to)?,
            level_id: from.extmap_id(LEVEL_URI).and_then(small),
        })
    }

    /// Framed packets of a peer that wrote `from`, on their way to one that wrote `to`.
    fn restore(&self, from: &Media, to: Option<&Media>) -> Option<RestoreRule> {
        from.aic?;
        let (_, line) = self.told.iter().find(|(mid, _)| *mid == from.mid)?;
        Some(RestoreRule {
            pt: line.pt,
            models: line.models,
            hint_id: aic_id(from)?,
            level_id: to.and_then(|to| small(to.extmap_id(LEVEL_URI)?)),
        })
    }
}

/// Bytes a second that a stock publisher would send of an audio track.
fn default_rate(track: &Own, offered: &Media, answered: &Media) -> u32 {
    let red = |media: &Media| media.codec("red").is_some();
    if track.disable_red || !red(offered) || !red(answered) {
        PLAIN_SPEECH_BYTES_PER_SECOND
    } else {
        DEFAULT_SPEECH_BYTES_PER_SECOND
    }
}

fn opus_pts(media: &Media) -> (Option<u8>, Option<u8>) {
    let pt = |name| media.codec(name).map(|codec| codec.pt);
    (pt("opus"), pt("red"))
}

/// The rules for what the client sends. `answer` is the server's own, before steering.
pub(crate) fn up_rules(
    hop: &Hop<'_>,
    tracks: &Tracks,
    offer: &[Media],
    answer: &[Media],
    steered: &[MediaSteer],
) -> Vec<TrackRule> {
    let answers = by_mid(answer);
    let steers: HashMap<&str, &MediaSteer> = steered.iter().map(|s| (s.mid.as_str(), s)).collect();
    let answerer_takes_aic = answer.iter().any(|media| aic_id(media).is_some());
    offer
        .iter()
        .filter(|offered| !offered.rejected && offered.direction.sends())
        .filter_map(|offered| {
            let answered = *answers.get(offered.mid.as_str())?;
            let steer = steers.get(offered.mid.as_str()).copied();
            let lowered = steer.is_some_and(|steer| steer.tias.is_some());
            let wrap_red = steer.filter(|steer| steer.remove_red).and_then(|_| {
                let opus = offered.codec("opus")?.pt;
                Some((opus, answered.codec("red")?.pt))
            });
            let audio = offered.kind == MediaKind::Audio;
            let speech = audio
                && !opus_says(offered, "sprop-stereo")
                && !meant_as_stereo(answered)
                && tracks.own_of(offered).is_some_and(|track| {
                    !track.stereo && !track.encrypted && track.source != SOURCE_SCREEN_SHARE_AUDIO
                });
            // Where AuraLink follows, its hop is the dear one.
            let enhanced = hop.policy.audio.enhance && speech && !answerer_takes_aic;
            let mut rule = TrackRule {
                ssrcs: ssrcs(offered),
                mid: offered.mid.clone(),
                kind: offered.kind,
                wrap_red,
                default_bytes_per_second: match tracks.own_of(offered) {
                    Some(track) if audio && lowered => default_rate(track, offered, answered),
                    _ => 0,
                },
                opus_pts: opus_pts(offered),
                // A steered publisher sends on a rung already: to code it again would cost quality
                // and save nothing.
                pack: hop.pack(offered, answered, speech && !lowered),
                restore: hop.restore(offered, Some(answered)),
                ..TrackRule::default()
            };
            if enhanced && lowered && rule.pack.is_none() && rule.restore.is_none() {
                rule.recode = Some(RecodeRule {
                    rung: None,
                    key: None,
                    lossy_only: false,
                });
            }
            let does_something = rule.wrap_red.is_some()
                || rule.default_bytes_per_second > 0
                || rule.pack.is_some()
                || rule.restore.is_some()
                || rule.recode.is_some();
            does_something.then_some(rule)
        })
        .collect()
}

/// The rules for what the client receives. `server` is what LiveKit said, `client` what the client
/// said of the same m-sections, where it has spoken.
pub(crate) fn down_rules(
    hop: &Hop<'_>,
    tracks: &Tracks,
    server: &[Media],
    client: &[Media],
    track_sids: &HashMap<String, String>,
) -> Vec<TrackRule> {
    let policy = hop.policy;
    if policy.mode == Mode::Off {
        return Vec::new();
    }
    let answers = by_mid(client);
    server
        .iter()
        .filter(|media| media.kind == MediaKind::Audio)
        .filter(|media| !media.rejected && media.direction.sends())
        .filter_map(|media| {
            let sid = track_sids
                .get(&media.mid)
                .or_else(|| media.msid.as_ref().map(|(_, track)| track));
            let track = sid.and_then(|sid| tracks.other(sid));
            // A track of which nothing is known may be music or encrypted.
            let speech = track.is_some_and(|track| {
                !track.stereo && !track.encrypted && track.source != SOURCE_SCREEN_SHARE_AUDIO
            }) && !opus_says(media, "sprop-stereo");
            let sheds = speech && policy.mode == Mode::Lean && policy.audio.red != RedPolicy::Keep;
            let answered = answers.get(media.mid.as_str()).copied();
            let mut rule = TrackRule {
                ssrcs: ssrcs(media),
                mid: media.mid.clone(),
                kind: media.kind,
                shed_red: sheds
                    .then(|| media.codec("red").map(|red| red.pt))
                    .flatten(),
                shed_always: policy.audio.red == RedPolicy::Off,
                opus_pts: opus_pts(media),
                pack: answered.and_then(|answered| hop.pack(media, answered, speech)),
                // LiveKit sends no audio level.
                restore: hop.restore(media, None),
                ..TrackRule::default()
            };
            let audio = &policy.audio;
            let recodes = speech && audio.recode != Rung::NATIVE;
            if recodes && rule.pack.is_none() && rule.restore.is_none() {
                rule.recode = Some(RecodeRule {
                    rung: Some(audio.recode),
                    key: sid.map(|sid| source_key(sid)),
                    lossy_only: audio.recode_for == RecodeFor::Lossy,
                });
            }
            let does_something = rule.shed_red.is_some()
                || rule.pack.is_some()
                || rule.restore.is_some()
                || rule.recode.is_some();
            does_something.then_some(rule)
        })
        .collect()
}

/// What all subscribers of a track have in common: its sid, which LiveKit draws at random.
fn source_key(sid: &str) -> u128 {
    let digest: [u8; 32] = Sha256::digest(sid.as_bytes()).into();
    let mut key = [0; 16];
    key.copy_from_slice(&digest[..16]);
    u128::from_be_bytes(key)
}

/// Id of the AIC hint in an m-section; 8 bits are all that a header has.
pub(crate) fn aic_id(media: &Media) -> Option<u8> {
    small(media.extmap_id(EXTENSION_URI)?)
}

fn small(id: u16) -> Option<u8> {
    u8::try_from(id).ok()
}
