//! SDP as the ends write and read it.

use crate::peer::Peer;
use std::fmt::Write;
use std::net::SocketAddr;

pub(crate) const CLIENT_AUDIO_SSRC: u32 = 1001;
pub(crate) const CLIENT_VIDEO_SSRC: u32 = 1002;
pub(crate) const SERVER_AUDIO_SSRC: u32 = 2001;
pub(crate) const SERVER_VIDEO_SSRC: u32 = 2002;
/// The participant's own microphone, by the id that it gave it.
pub(crate) const CLIENT_CID: &str = "mic";
/// What the participant hears, by LiveKit's id.
pub(crate) const OTHER_SID: &str = "TR_other";
pub(crate) const OPUS: u8 = 111;
pub(crate) const RED: u8 = 63;

/// What an end learned from an SDP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Described {
    pub(crate) ufrag: String,
    pub(crate) pwd: String,
    pub(crate) fingerprint: String,
    pub(crate) setup: String,
    pub(crate) candidates: Vec<String>,
    pub(crate) lite: bool,
    pub(crate) text: String,
}

impl Described {
    pub(crate) fn read(text: &str) -> Self {
        let value = |key: &str| {
            let prefix = format!("a={key}:");
            let found = text.lines().find_map(|line| line.strip_prefix(&prefix));
            found
                .unwrap_or_else(|| panic!("no a={key} in\n{text}"))
                .to_owned()
        };
        let mut candidates: Vec<String> = text
            .lines()
            .filter(|line| line.starts_with("a=candidate:"))
            .map(|line| line.trim_start_matches("a=").to_owned())
            .collect();
        candidates.dedup();
        Self {
            ufrag: value("ice-ufrag"),
            pwd: value("ice-pwd"),
            fingerprint: value("fingerprint"),
            setup: value("setup"),
            candidates,
            lite: text.lines().any(|line| line == "a=ice-lite"),
            text: text.to_owned(),
        }
    }

    pub(crate) fn first_address(&self) -> Option<SocketAddr> {
        let words: Vec<&str> = self.candidates.first()?.split(' ').collect();
        format!("{}:{}", words.get(4)?, words.get(5)?).parse().ok()
    }
}

/// What an end puts into its SDP besides its transport.
#[derive(Debug, Clone)]
pub(crate) struct Content {
    pub(crate) audio_ssrc: u32,
    pub(crate) video_ssrc: u32,
    /// Track id in the audio's `a=msid`.
    pub(crate) audio_track: &'static str,
    /// What the `a=fmtp` of Opus ends with.
    pub(crate) fmtp: &'static str,
    /// Further lines of the audio and video sections (extensions).
    pub(crate) media_lines: Vec<String>,
}

/// An SDP of `peer` with audio (RED and Opus), video and a data channel.
pub(crate) fn write(peer: &Peer, setup: &str, content: &Content) -> String {
    let addr = peer.locals[0];
    let fmtp = content.fmtp;
    let mut transport = String::new();
    for (n, addr) in peer.locals.iter().enumerate() {
        let _ = write!(
            transport,
            "a=candidate:{n} 1 udp {} {} {} typ host generation 0 network-id {n}\r\n",
            2_122_260_223 - n,
            addr.ip(),
            addr.port()
        );
    }
    let _ = write!(
        transport,
        "a=ice-ufrag:{}\r\na=ice-pwd:{}\r\na=ice-options:trickle goog-sped-v1\r\na=fingerprint:{}\r\na=setup:{setup}\r\n",
        peer.creds.ufrag, peer.creds.pass, peer.fingerprint
    );
    let extra: String = content
        .media_lines
        .iter()
        .map(|line| format!("{line}\r\n"))
        .collect();
    let (audio, video) = (content.audio_ssrc, content.video_ssrc);
    let (ip, port, name) = (addr.ip(), addr.port(), peer.name);
    format!(
        "v=0\r\no=- 4611731400430051336 2 IN IP4 127.0.0.1\r\ns=-\r\nt=0 0\r\na=group:BUNDLE 0 1 2\r\n\
         a=extmap-allow-mixed\r\na=msid-semantic: WMS *\r\n\
         m=audio {port} UDP/TLS/RTP/SAVPF 63 111\r\nc=IN IP4 {ip}\r\na=rtcp:9 IN IP4 0.0.0.0\r\n{transport}\
         a=mid:0\r\na=extmap:1 urn:ietf:params:rtp-hdrext:ssrc-audio-level\r\n{extra}a=sendrecv\r\n\
         a=msid:{name}-stream {}\r\na=rtcp-mux\r\na=rtpmap:111 opus/48000/2\r\na=fmtp:111 minptime=10;useinbandfec=1{fmtp}\r\n\
         a=rtpmap:63 red/48000/2\r\na=fmtp:63 111/111\r\na=ssrc:{audio} cname:{name}\r\n\
         m=video 9 UDP/TLS/RTP/SAVPF 96\r\nc=IN IP4 0.0.0.0\r\na=rtcp:9 IN IP4 0.0.0.0\r\n{transport}\
         a=mid:1\r\na=extmap:2 http://www.webrtc.org/experiments/rtp-hdrext/abs-send-time\r\n{extra}a=sendrecv\r\n\
         a=msid:{name}-stream camera\r\na=rtcp-mux\r\na=rtpmap:96 VP8/90000\r\na=ssrc:{video} cname:{name}\r\n\
         m=application 9 UDP/DTLS/SCTP webrtc-datachannel\r\nc=IN IP4 0.0.0.0\r\n{transport}a=mid:2\r\n\
         a=sctp-port:5000\r\na=max-message-size:262144\r\n",
        content.audio_track
    )
}
