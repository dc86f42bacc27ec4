//! What policy does to the tracks of one peer connection: how its answer is steered, and the rules
//! its media goes by.

use crate::aic::EXTENSION_URI;
use crate::description::{MediaKind, TrackRule};
use crate::policy::{Mode, Policy, RedPolicy};
use crate::sdp::{Media, MediaSteer};
use crate::signal::{AddTrack, SOURCE_SCREEN_SHARE, SOURCE_SCREEN_SHARE_AUDIO, Track};
use std::collections::HashMap;

/// What the default publisher sends a second of speech, headers included: Opus 48 kbit/s and RED,
/// measured at 117.5 kbit/s (docs/benchmarks.md).
const DEFAULT_SPEECH_BYTES_PER_SECOND: u32 = 117_500 / 8;

/// MID header extension (RFC 9143).
pub(crate) const MID_URI: &str = "urn:ietf:params:rtp-hdrext:sdes:mid";

/// What is known of the tracks of a session.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tracks {
    /// What the client publishes, by the client's own id.
    pub(crate) own: HashMap<String, AddTrack>,
    /// What others publish, by sid.
    pub(crate) others: HashMap<String, Track>,
}

/// Entries beyond so many are not remembered; what isn't remembered is not steered.
const MAX_TRACKS: usize = 4096;

impl Tracks {
    pub(crate) fn add_own(&mut self, track: AddTrack) {
        if self.own.len() < MAX_TRACKS || self.own.contains_key(&track.cid) {
            self.own.insert(track.cid.clone(), track);
        }
    }

    pub(crate) fn add_other(&mut self, track: Track) {
        if self.others.len() < MAX_TRACKS || self.others.contains_key(&track.sid) {
            self.others.insert(track.sid.clone(), track);
        }
    }

    fn own_of(&self, offered: &Media) -> Option<&AddTrack> {
        let (_, track) = offered.msid.as_ref()?;
        self.own.get(track).or_else(|| {
            self.own
                .values()
                .find(|own| own.simulcast_cids.iter().any(|cid| cid == track))
        })
    }
}

/// Whether Opus `key` is 1: `stereo` says what its writer wants to receive, `sprop-stereo` what it
/// will send (RFC 7587 section 6.1). libwebrtc writes `stereo=1` whatever it sends.
fn opus_says(media: &Media, key: &str) -> bool {
    media
        .codec("opus")
        .is_some_and(|opus| opus.fmtp_value(key) == Some("1"))
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
    answer
        .iter()
        .filter(|answered| !answered.rejected && answered.direction.receives())
        .filter_map(|answered| {
            let offered = offer.iter().find(|offered| offered.mid == answered.mid)?;
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
    track: &AddTrack,
    offered: &Media,
    answered: &Media,
) -> Option<MediaSteer> {
    // Music and what it may be stays as its publisher wants it.
    if track.stereo
        || track.source == SOURCE_SCREEN_SHARE_AUDIO
        || opus_says(offered, "sprop-stereo")
        || opus_says(answered, "stereo")
    {
        return None;
    }
    let opus = answered.codec("opus")?;
    Some(MediaSteer {
        mid: answered.mid.clone(),
        // An encrypted payload is not wrapped, so RED has to stay if it was negotiated.
        remove_red: policy.audio.red != RedPolicy::Keep && !track.encrypted,
        fmtp: vec![(
            opus.pt,
            vec![(
                "maxaveragebitrate".to_owned(),
                policy.audio.max_bitrate.to_string(),
            )],
        )],
        ptime: Some(policy.audio.packet_ms),
        maxptime: Some(policy.audio.packet_ms),
        // livekit-client sets maxBitrate on its encodings, which overrides the fmtp: only b=TIAS
        // lowers it.
        tias: Some(policy.audio.max_bitrate),
    })
}

fn steer_video(policy: &Policy, track: &AddTrack, answered: &Media) -> Option<MediaSteer> {
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

/// The rules for what the client sends. `answer` is the server's own, before steering.
pub(crate) fn up_rules(
    offer: &[Media],
    answer: &[Media],
    steered: &[MediaSteer],
    answerer_takes_aic: bool,
) -> Vec<TrackRule> {
    offer
        .iter()
        .filter(|offered| !offered.rejected && offered.direction.sends())
        .filter_map(|offered| {
            let answered = answer.iter().find(|answered| answered.mid == offered.mid)?;
            let steer = steered.iter().find(|steer| steer.mid == offered.mid);
            let wrap_red = steer.filter(|steer| steer.remove_red).and_then(|_| {
                let opus = offered.codec("opus")?.pt;
                Some((opus, answered.codec("red")?.pt))
            });
            let audio = offered.kind == MediaKind::Audio;
            let rule = TrackRule {
                ssrcs: offered.ssrcs.clone(),
                mid: offered.mid.clone(),
                kind: offered.kind,
                wrap_red,
                aic_id: answerer_takes_aic.then(|| aic_id(answered)).flatten(),
                default_bytes_per_second: if audio && steer.is_some() {
                    DEFAULT_SPEECH_BYTES_PER_SECOND
                } else {
                    0
                },
                ..TrackRule::default()
            };
            let does_something = rule.wrap_red.is_some()
                || rule.aic_id.is_some()
                || rule.default_bytes_per_second > 0;
            does_something.then_some(rule)
        })
        .collect()
}

/// The rules for what the client receives. `server` is what LiveKit said, `client` what the client
/// said of the same m-sections, where it has spoken.
pub(crate) fn down_rules(
    policy: &Policy,
    tracks: &Tracks,
    server: &[Media],
    client: &[Media],
    track_sids: &HashMap<String, String>,
) -> Vec<TrackRule> {
    if policy.mode == Mode::Off {
        return Vec::new();
    }
    server
        .iter()
        .filter(|media| media.kind == MediaKind::Audio)
        .filter(|media| !media.rejected && media.direction.sends())
        .filter_map(|media| {
            let sid = track_sids
                .get(&media.mid)
                .or_else(|| media.msid.as_ref().map(|(_, track)| track));
            let track = sid.and_then(|sid| tracks.others.get(sid));
            // A track of which nothing is known may be music or encrypted.
            let speech = track.is_some_and(|track| {
                !track.stereo && !track.encrypted && track.source != SOURCE_SCREEN_SHARE_AUDIO
            });
            let sheds =
                speech && policy.audio.red != RedPolicy::Keep && !opus_says(media, "sprop-stereo");
            let answered = client.iter().find(|client| client.mid == media.mid);
            let rule = TrackRule {
                ssrcs: media.ssrcs.clone(),
                mid: media.mid.clone(),
                kind: media.kind,
                shed_red: sheds
                    .then(|| media.codec("red").map(|red| red.pt))
                    .flatten(),
                shed_always: policy.audio.red == RedPolicy::Off,
                aic_id: answered.and_then(aic_id),
                ..TrackRule::default()
            };
            (rule.shed_red.is_some() || rule.aic_id.is_some()).then_some(rule)
        })
        .collect()
}

/// Id of the AIC hint in an m-section; 8 bits are all that a header has.
pub(crate) fn aic_id(media: &Media) -> Option<u8> {
    media
        .extmap_id(EXTENSION_URI)
        .and_then(|id| u8::try_from(id).ok())
}
