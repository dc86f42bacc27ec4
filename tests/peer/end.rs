//! One end of a call on the `webrtc` crate: its ICE, DTLS, SRTP and SCTP are not the sidecar's.

use bytes::BytesMut;
use rtc::interceptor::{Attribute, Interceptor, Packet, Slot, StreamInfo, TaggedPacket};
use rtc::media_stream::MediaStreamTrack;
use rtc::rtp;
use rtc::rtp_transceiver::rtp_sender::{
    RTCRtpCodec, RTCRtpCodecParameters, RTCRtpCodingParameters, RTCRtpEncodingParameters,
    RTCRtpHeaderExtensionCapability, RtpCodecKind,
};
use rtc::sansio;
use rtc::shared::error::Error;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use webrtc::data_channel::{DataChannel, DataChannelEvent};
use webrtc::media_stream::track_local::static_rtp::TrackLocalStaticRTP;
use webrtc::media_stream::track_local::{TrackLocal, TrackLocalEvent};
use webrtc::media_stream::track_remote::{TrackRemote, TrackRemoteEvent};
use webrtc::peer_connection::{
    MediaEngine, PeerConnection, PeerConnectionBuilder, PeerConnectionEventHandler,
    RTCIceGatheringState, RTCPeerConnectionState, RTCSessionDescription, Registry,
    SettingEngineBuilder, register_default_interceptors,
};

pub(crate) const OPUS: u8 = 111;
pub(crate) const RED: u8 = 63;

/// What an end has heard.
#[derive(Default)]
pub(crate) struct Heard {
    pub(crate) rtp: Mutex<Vec<rtp::Packet>>,
    pub(crate) rtcp: AtomicUsize,
    pub(crate) data: Mutex<Vec<Vec<u8>>>,
    channel: Mutex<Option<Arc<dyn DataChannel>>>,
    open: Mutex<bool>,
    gathered: Mutex<bool>,
    pub(crate) state: Mutex<Option<RTCPeerConnectionState>>,
}

/// Hands inbound RTCP to the application, where the default chain would consume it.
#[derive(Default)]
struct DeliverRtcp {
    inbound: VecDeque<TaggedPacket>,
    outbound: VecDeque<TaggedPacket>,
}

impl sansio::Protocol<TaggedPacket, TaggedPacket, ()> for DeliverRtcp {
    type Rout = TaggedPacket;
    type Wout = TaggedPacket;
    type Eout = ();
    type Error = Error;
    type Time = Instant;

    fn handle_read(&mut self, mut packet: TaggedPacket) -> Result<(), Error> {
        if matches!(packet.message.packet, Packet::Rtcp(_)) {
            packet.message.add(Attribute::DeliverToApplication);
        }
        self.inbound.push_back(packet);
        Ok(())
    }

    fn poll_read(&mut self) -> Option<TaggedPacket> {
        self.inbound.pop_front()
    }

    fn handle_write(&mut self, packet: TaggedPacket) -> Result<(), Error> {
        self.outbound.push_back(packet);
        Ok(())
    }

    fn poll_write(&mut self) -> Option<TaggedPacket> {
        self.outbound.pop_front()
    }

    fn handle_timeout(&mut self, _: Instant) -> Result<(), Error> {
        Ok(())
    }

    fn poll_timeout(&mut self) -> Option<Instant> {
        None
    }
}

impl Interceptor for DeliverRtcp {
    fn bind_local_stream(&mut self, _: &StreamInfo) {}
    fn unbind_local_stream(&mut self, _: &StreamInfo) {}
    fn bind_remote_stream(&mut self, _: &StreamInfo) {}
    fn unbind_remote_stream(&mut self, _: &StreamInfo) {}
}

struct Handler(Arc<Heard>);

#[async_trait::async_trait]
impl PeerConnectionEventHandler for Handler {
    async fn on_ice_gathering_state_change(&self, state: RTCIceGatheringState) {
        if state == RTCIceGatheringState::Complete {
            *self.0.gathered.lock().unwrap() = true;
        }
    }

    async fn on_connection_state_change(&self, state: RTCPeerConnectionState) {
        *self.0.state.lock().unwrap() = Some(state);
    }

    async fn on_data_channel(&self, channel: Arc<dyn DataChannel>) {
        listen(channel, self.0.clone());
    }

    async fn on_track(&self, track: Arc<dyn TrackRemote>) {
        let heard = self.0.clone();
        tokio::spawn(async move {
            while let Some(event) = track.poll().await {
                match event {
                    TrackRemoteEvent::OnRtpPacket(packet) => heard.rtp.lock().unwrap().push(packet),
                    TrackRemoteEvent::OnRtcpPacket(_) => {
                        heard.rtcp.fetch_add(1, Ordering::Relaxed);
                    }
                    _ => {}
                }
            }
        });
    }
}

fn listen(channel: Arc<dyn DataChannel>, heard: Arc<Heard>) {
    *heard.channel.lock().unwrap() = Some(channel.clone());
    tokio::spawn(async move {
        while let Some(event) = channel.poll().await {
            match event {
                DataChannelEvent::OnOpen => *heard.open.lock().unwrap() = true,
                DataChannelEvent::OnMessage(message) => {
                    heard.data.lock().unwrap().push(message.data.to_vec());
                }
                _ => {}
            }
        }
    });
}

pub(crate) struct End {
    pub(crate) pc: Arc<dyn PeerConnection>,
    pub(crate) heard: Arc<Heard>,
    track: Arc<TrackLocalStaticRTP>,
    pub(crate) ssrc: u32,
}

fn codec(name: &str, fmtp: &str) -> RTCRtpCodec {
    RTCRtpCodec {
        mime_type: format!("audio/{name}"),
        clock_rate: 48_000,
        channels: 2,
        sdp_fmtp_line: fmtp.to_owned(),
        rtcp_feedback: vec![],
    }
}

impl End {
    /// An end that sends one audio track, on loopback. `extension` is negotiated for audio.
    pub(crate) async fn new(track_id: &str, ssrc: u32, pt: u8, extension: Option<&str>) -> Self {
        let mut engine = MediaEngine::default();
        let opus = codec("opus", "minptime=10;useinbandfec=1");
        let red = codec("red", "111/111");
        for (rtp_codec, payload_type) in [(red.clone(), RED), (opus.clone(), OPUS)] {
            let parameters = RTCRtpCodecParameters {
                rtp_codec,
                payload_type,
            };
            engine
                .register_codec(parameters, RtpCodecKind::Audio)
                .unwrap();
        }
        let registry = register_default_interceptors(Registry::new(), &mut engine).unwrap();
        // After every interceptor of the default chain.
        let registry = registry.with(Slot::from(14_000), DeliverRtcp::default());
        if let Some(uri) = extension {
            let capability = RTCRtpHeaderExtensionCapability {
                uri: uri.to_owned(),
            };
            engine
                .register_header_extension(capability, RtpCodecKind::Audio, None)
                .unwrap();
        }
        let heard = Arc::new(Heard::default());
        let pc = PeerConnectionBuilder::new()
            .with_media_engine(engine)
            .with_interceptor_registry(registry)
            .with_setting_engine(
                SettingEngineBuilder::new()
                    .with_include_loopback_candidate(true)
                    .build(),
            )
            .with_handler(Arc::new(Handler(heard.clone())))
            .with_udp_addrs(vec!["127.0.0.1:0"])
            .build()
            .await
            .unwrap();
        let track = Arc::new(TrackLocalStaticRTP::new(MediaStreamTrack::new(
            "stream".to_owned(),
            track_id.to_owned(),
            "voice".to_owned(),
            RtpCodecKind::Audio,
            vec![RTCRtpEncodingParameters {
                rtp_coding_parameters: RTCRtpCodingParameters {
                    ssrc: Some(ssrc),
                    ..RTCRtpCodingParameters::default()
                },
                codec: if pt == RED { red } else { opus },
                ..RTCRtpEncodingParameters::default()
            }],
        )));
        pc.add_track(track.clone() as Arc<dyn TrackLocal>)
            .await
            .unwrap();
        let (events, counted) = (track.clone(), heard.clone());
        tokio::spawn(async move {
            while let Some(event) = events.poll().await {
                if let TrackLocalEvent::OnRtcpPacket(_) = event {
                    counted.rtcp.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        Self {
            pc: Arc::new(pc),
            heard,
            track,
            ssrc,
        }
    }

    pub(crate) async fn open_channel(&self) {
        let channel = self
            .pc
            .create_data_channel("_reliable", None)
            .await
            .unwrap();
        listen(channel, self.heard.clone());
    }

    async fn gathered(&self) -> String {
        wait("gathering", || *self.heard.gathered.lock().unwrap()).await;
        self.pc.local_description().await.unwrap().sdp
    }

    pub(crate) async fn offer(&self) -> String {
        let offer = self.pc.create_offer(None).await.unwrap();
        self.pc.set_local_description(offer).await.unwrap();
        self.gathered().await
    }

    pub(crate) async fn answer(&self, offer: &str) -> String {
        let offer = RTCSessionDescription::offer(offer.to_owned()).unwrap();
        self.pc.set_remote_description(offer).await.unwrap();
        let answer = self.pc.create_answer(None).await.unwrap();
        self.pc.set_local_description(answer).await.unwrap();
        self.gathered().await
    }

    pub(crate) async fn take_answer(&self, answer: &str) {
        let answer = RTCSessionDescription::answer(answer.to_owned()).unwrap();
        self.pc.set_remote_description(answer).await.unwrap();
    }

    pub(crate) fn connected(&self) -> bool {
        *self.heard.state.lock().unwrap() == Some(RTCPeerConnectionState::Connected)
    }

    pub(crate) fn channel_is_open(&self) -> bool {
        *self.heard.open.lock().unwrap()
    }

    pub(crate) async fn send_rtp(&self, pt: u8, n: u16, payload: &[u8]) {
        let packet = rtp::Packet {
            header: rtp::Header {
                version: 2,
                payload_type: pt,
                sequence_number: n,
                timestamp: u32::from(n) * 960,
                ssrc: self.ssrc,
                ..rtp::Header::default()
            },
            payload: bytes::Bytes::copy_from_slice(payload),
        };
        self.track.write_rtp(packet).await.unwrap();
    }

    pub(crate) async fn send_data(&self, data: &[u8]) {
        let channel = self.heard.channel.lock().unwrap().clone();
        channel
            .expect("a channel")
            .send(BytesMut::from(data))
            .await
            .unwrap();
    }
}

/// Waits up to 20 s.
pub(crate) async fn wait(what: &str, condition: impl Fn() -> bool) {
    for _ in 0..2000 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("20 s without {what}");
}
