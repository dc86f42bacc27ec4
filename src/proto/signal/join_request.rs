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

/// Longest `join_request`, encoded or decompressed, in bytes. The longest query that passes, 65,000 characters, holds 48 kB; the
/// clients' offers that it is for take 5 to 30 kB. LiveKit takes 1 MiB (`http.DefaultMaxHeaderBytes`), of anybody.
pub const MAX_JOIN_REQUEST: usize = 128 << 10;

/// Tracks that are remembered of a `join_request`; what isn't remembered isn't steered. Clients announce the microphone and the
/// camera with it, if anything.
pub const MAX_JOIN_TRACKS: usize = 16;

/// A longer AddTrackRequest isn't read. The clients' take 100 to 400 bytes.
const MAX_JOIN_TRACK: usize = 1 << 10;

/// One of more fields isn't either: the protocol knows some 20.
const MAX_JOIN_TRACK_FIELDS: usize = 64;

/// Most fields of a `JoinRequest`. The protocol knows ten, of which tracks and attributes may be there more often.
const MAX_JOIN_FIELDS: usize = 256;

const REASONS: &[&str] = &[
    "RR_UNKNOWN",
    "RR_SIGNAL_DISCONNECTED",
    "RR_PUBLISHER_FAILED",
    "RR_SUBSCRIBER_FAILED",
    "RR_SWITCH_CANDIDATE",
];

/// `base64.URLEncoding` of Go: padded, and bits that are left over don't matter.
const URL_ENCODING: GeneralPurpose = GeneralPurpose::new(
    &alphabet::URL_SAFE,
    GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::RequireCanonical)
        .with_decode_allow_trailing_bits(true),
);

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

/// Fields of a `JoinRequest` that are there once, and say who asks for what or hold SDP: `client_info`, `connection_settings`,
/// `publisher_offer`, `reconnect`, `reconnect_reason`, `participant_sid`, `sync_state`.
const ONCE: &[u32] = &[1, 2, 6, 7, 8, 9, 10];

/// A `join_request`, read.
#[derive(Debug, Clone)]
pub struct JoinRequest {
    wrapped: Vec<u8>,
    /// What was gzipped in it.
    plain: Option<Vec<u8>>,
    info: JoinRequestInfo,
}

impl JoinRequest {
    /// Reads the value of the parameter, percent-decoded.
    ///
    /// # Errors
    /// When it is not what LiveKit would take, or too much for somebody whom LiveKit doesn't know yet.
    pub fn read(value: &str) -> Result<Self, SignalError> {
        if value.len() > MAX_JOIN_REQUEST {
            return Err(SignalError::TooLong {
                what: "join_request",
                limit: MAX_JOIN_REQUEST,
            });
        }
        let wrapped = decode(value)?;
        if wire::Fields::new(&wrapped).nth(MAX_JOIN_FIELDS).is_some() {
            return Err(SignalError::Wire("join_request has too many fields"));
        }
        wire::once(&wrapped, &[1, 2])?;
        let gzip = match Message::Wire(&wrapped).uint(1, "compression") {
            0 => false,
            1 => true,
            other => return Err(SignalError::Compression(other)),
        };
        let plain = match (gzip, inner(&wrapped)) {
            (true, Some(inner)) => Some(gunzip(inner)?),
            _ => None,
        };
        let request = plain.as_deref().or_else(|| inner(&wrapped));
        let info = info(request.unwrap_or_default(), gzip)?;
        Ok(Self {
            wrapped,
            plain,
            info,
        })
    }

    /// What it says besides SDP and tracks.
    #[must_use]
    pub fn info(&self) -> &JoinRequestInfo {
        &self.info
    }

    /// Shows its tracks and SDP to a visitor. The new value (URL-safe base64 with padding, in which `=` is the only character to
    /// percent-encode) is `None` when nothing changed.
    ///
    /// # Errors
    /// When it is not well-formed, or the visitor refuses its SDP.
    pub fn edit(&self, visitor: &mut dyn RequestVisitor) -> Result<Option<String>, SignalError> {
        let new = wire::patch(&self.wrapped, 2, |inner| {
            let new = match &self.plain {
                Some(plain) => edit(plain, visitor)?.map(|new| gzip_of(&new)).transpose()?,
                None => edit(inner, visitor)?,
            };
            Ok(new.map_or(Change::Keep, Change::Replace))
        })?;
        Ok(new.map(|new| URL_SAFE.encode(new)))
    }
}

/// [`JoinRequest::read`] and [`JoinRequest::edit`] in one.
///
/// # Errors
/// As theirs.
pub fn edit_join_request(
    query_value: &str,
    visitor: &mut dyn RequestVisitor,
) -> Result<(Option<String>, JoinRequestInfo), SignalError> {
    let request = JoinRequest::read(query_value)?;
    Ok((request.edit(visitor)?, request.info))
}

/// The `JoinRequest` in its wrapper, gzipped or not.
fn inner(wrapped: &[u8]) -> Option<&[u8]> {
    wire::Fields::new(wrapped)
        .map_while(Result::ok)
        .filter(|field| field.number == 2)
        .find_map(|field| field.bytes())
}

fn info(request: &[u8], gzip: bool) -> Result<JoinRequestInfo, SignalError> {
    if wire::Fields::new(request).nth(MAX_JOIN_FIELDS).is_some() {
        return Err(SignalError::Wire("join_request has too many fields"));
    }
    wire::once(request, ONCE)?;
    let message = Message::Wire(request);
    let client = message.one(1, "clientInfo");
    let settings = message.one(2, "connectionSettings");
    Ok(JoinRequestInfo {
        reconnect: message.flag(7, "reconnect"),
        reconnect_reason: message.choice(8, "reconnectReason", REASONS),
        participant_sid: message.text(9, "participantSid"),
        gzip,
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
    })
}

fn edit(request: &[u8], visitor: &mut dyn RequestVisitor) -> Result<Option<Vec<u8>>, SignalError> {
    let mut editor = Editor::new(Frame::Binary(request))?;
    let tracks = wire::Fields::new(request)
        .map_while(Result::ok)
        .filter(|field| field.number == 5)
        .filter_map(|field| field.bytes())
        .filter(|track| track.len() <= MAX_JOIN_TRACK)
        .filter(|track| {
            wire::Fields::new(track)
                .nth(MAX_JOIN_TRACK_FIELDS)
                .is_none()
        });
    for track in tracks.take(MAX_JOIN_TRACKS) {
        visitor.add_track(message::add_track(Message::Wire(track)));
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
    // Go's decoder skips line breaks.
    let breaks = |byte: &u8| matches!(byte, b'\r' | b'\n');
    let decoded = if value.bytes().any(|byte| breaks(&byte)) {
        let value: Vec<u8> = value.bytes().filter(|byte| !breaks(byte)).collect();
        URL_ENCODING.decode(value)
    } else {
        URL_ENCODING.decode(value)
    };
    decoded.map_err(|_| SignalError::Base64)
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
