//! The `join_request` query parameter of `/rtc/v1`: base64 of a `WrappedJoinRequest`, which holds a
//! `JoinRequest`, gzipped or plain, and in it the first offer.

use std::io::{Read, Write};

use base64::Engine;
use base64::alphabet;
use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig, URL_SAFE};
use flate2::Compression;
use flate2::read::MultiGzDecoder;
use flate2::write::GzEncoder;

use super::editor::Editor;
use super::message::{self, Message};
use super::wire::{self, Change};
use super::{Frame, JOIN_SDP, RequestVisitor, SignalError, Verdict, refusable};

/// Longest `join_request`, encoded or decompressed, in bytes: LiveKit's own limit
/// (`http.DefaultMaxHeaderBytes`).
pub const MAX_JOIN_REQUEST: usize = 1 << 20;

const REASONS: &[&str] = &[
    "RR_UNKNOWN",
    "RR_SIGNAL_DISCONNECTED",
    "RR_PUBLISHER_FAILED",
    "RR_SUBSCRIBER_FAILED",
    "RR_SWITCH_CANDIDATE",
];

/// LiveKit takes padded URL-safe base64 only; what it takes must not be stricter here.
const LENIENT: GeneralPurposeConfig = GeneralPurposeConfig::new()
    .with_decode_padding_mode(DecodePaddingMode::Indifferent)
    .with_decode_allow_trailing_bits(true);
const URL_SAFE_LENIENT: GeneralPurpose = GeneralPurpose::new(&alphabet::URL_SAFE, LENIENT);
const STANDARD_LENIENT: GeneralPurpose = GeneralPurpose::new(&alphabet::STANDARD, LENIENT);

/// What a `join_request` says besides SDP and tracks.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct JoinRequestInfo {
    /// The client resumes a session.
    pub reconnect: bool,
    /// `ReconnectReason` of a resume.
    pub reconnect_reason: i32,
    /// Which session it resumes.
    pub participant_sid: String,
    /// It came gzipped.
    pub gzip: bool,
    /// It holds a publisher offer.
    pub has_offer: bool,
    /// `ClientInfo.SDK`: 1 JavaScript, 5 Go, 8 Rust, 9 Python, 12 Node.
    pub sdk: i32,
    /// Version of the SDK.
    pub sdk_version: String,
    /// `ClientInfo.protocol`.
    pub protocol: u32,
    /// `ClientInfo.browser`.
    pub browser: String,
    /// All tracks are subscribed to by themselves.
    pub auto_subscribe: bool,
}

/// Edits the value of `join_request`, percent-decoded. The new value (URL-safe base64 with padding,
/// in which `=` is the only character to percent-encode) is `None` when nothing changed.
///
/// # Errors
/// When it is not what LiveKit would take, or the visitor refuses its SDP.
pub fn edit_join_request(
    query_value: &str,
    visitor: &mut dyn RequestVisitor,
) -> Result<(Option<String>, JoinRequestInfo), SignalError> {
    let too_long = SignalError::TooLong {
        what: "join_request",
        limit: MAX_JOIN_REQUEST,
    };
    if query_value.len() > MAX_JOIN_REQUEST {
        return Err(too_long);
    }
    let wrapped = decode(query_value)?;
    for field in wire::Fields::new(&wrapped) {
        field?;
    }
    let gzip = match Message::Wire(&wrapped).uint(1, "compression") {
        0 => false,
        1 => true,
        other => return Err(SignalError::Compression(other)),
    };
    let mut info = JoinRequestInfo::default();
    let new = wire::patch(&wrapped, 2, |inner| {
        let new = if gzip {
            let plain = gunzip(inner)?;
            edit(&plain, visitor, &mut info)?
                .map(|new| gzip_of(&new))
                .transpose()?
        } else {
            edit(inner, visitor, &mut info)?
        };
        Ok(new.map_or(Change::Keep, Change::Replace))
    })?;
    info.gzip = gzip;
    Ok((new.map(|new| URL_SAFE.encode(new)), info))
}

fn edit(
    request: &[u8],
    visitor: &mut dyn RequestVisitor,
    info: &mut JoinRequestInfo,
) -> Result<Option<Vec<u8>>, SignalError> {
    let mut editor = Editor::new(Frame::Binary(request))?;
    let message = editor.message();
    let client = message.one(1, "clientInfo");
    let settings = message.one(2, "connectionSettings");
    *info = JoinRequestInfo {
        reconnect: message.flag(7, "reconnect"),
        reconnect_reason: message.choice(8, "reconnectReason", REASONS),
        participant_sid: message.text(9, "participantSid"),
        gzip: false,
        has_offer: message
            .one(6, "publisherOffer")
            .is_some_and(|offer| !offer.text(2, "sdp").is_empty()),
        sdk: client.map_or(0, |c| c.choice(1, "sdk", &[])),
        sdk_version: client.map(|c| c.text(2, "version")).unwrap_or_default(),
        protocol: client
            .and_then(|c| u32::try_from(c.uint(3, "protocol")).ok())
            .unwrap_or(0),
        browser: client.map(|c| c.text(7, "browser")).unwrap_or_default(),
        auto_subscribe: settings.is_some_and(|s| s.flag(1, "autoSubscribe")),
    };
    for track in message.many(5, "addTrackRequests") {
        visitor.add_track(message::add_track(track));
    }
    for (slot, path) in JOIN_SDP {
        editor.replace(path, &mut |sdp| refusable(visitor.sdp(*slot, sdp)))?;
    }
    Ok(match editor.verdict() {
        Verdict::Binary(new) => Some(new),
        _ => None,
    })
}

fn decode(value: &str) -> Result<Vec<u8>, SignalError> {
    // Go's decoder, which LiveKit uses, skips line breaks.
    let value: String = value
        .chars()
        .filter(|c| !matches!(c, '\r' | '\n'))
        .collect();
    let engine = if value.contains(['+', '/']) {
        &STANDARD_LENIENT
    } else {
        &URL_SAFE_LENIENT
    };
    engine.decode(value).map_err(|_| SignalError::Base64)
}

fn gunzip(input: &[u8]) -> Result<Vec<u8>, SignalError> {
    let mut plain = Vec::new();
    let limit = MAX_JOIN_REQUEST as u64 + 1;
    MultiGzDecoder::new(input)
        .take(limit)
        .read_to_end(&mut plain)
        .map_err(|e| SignalError::Gzip(e.to_string()))?;
    if plain.len() > MAX_JOIN_REQUEST {
        return Err(SignalError::TooLong {
            what: "decompressed join_request",
            limit: MAX_JOIN_REQUEST,
        });
    }
    Ok(plain)
}

fn gzip_of(plain: &[u8]) -> Result<Vec<u8>, SignalError> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder
        .write_all(plain)
        .and_then(|()| encoder.finish())
        .map_err(|e| SignalError::Gzip(e.to_string()))
}
