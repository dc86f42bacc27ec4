//! What a relayed packet costs, stage by stage: receive, unprotect, rule, protect, send.
//! `make bench`; docs/benchmarks.md has the figures and what they mean.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

use auralink_proto::aic::payload::{Body, Part, Redundant};
use auralink_proto::coding::{Coding, EngineRungs};
use auralink_proto::description::{MediaKind, RestoreRule, TrackRule};
use auralink_proto::dtls::{SrtpKeys, SrtpProtectionProfile};
use auralink_proto::flow::Flow;
use auralink_proto::ladder::Frames;
use auralink_proto::relay::Now;
use auralink_proto::srtp::Srtp;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use quinn_udp::{BATCH_SIZE, RecvMeta, Transmit, UdpSockRef, UdpSocketState};
use std::hint::black_box;
use std::io::IoSliceMut;
use std::net::UdpSocket;
use std::time::Instant;

const SSRC: u32 = 7;

fn rtp(len: usize, sequence: u16, payload_type: u8) -> Vec<u8> {
    let mut packet = vec![0x80, payload_type];
    packet.extend(sequence.to_be_bytes());
    packet.extend((u32::from(sequence) * 960).to_be_bytes());
    packet.extend(SSRC.to_be_bytes());
    packet.resize(len, 0x55);
    packet
}

fn pair(profile: SrtpProtectionProfile) -> (Srtp, Srtp) {
    let len = match profile {
        SrtpProtectionProfile::Srtp_Aead_Aes_128_Gcm => 56,
        _ => 60,
    };
    let keys = |is_client| SrtpKeys {
        profile,
        material: (0..len).collect(),
        is_client,
    };
    (
        Srtp::new(&keys(true)).unwrap(),
        Srtp::new(&keys(false)).unwrap(),
    )
}

fn srtp(c: &mut Criterion) {
    for (name, profile) in [
        ("gcm", SrtpProtectionProfile::Srtp_Aead_Aes_128_Gcm),
        (
            "cm_sha1_80",
            SrtpProtectionProfile::Srtp_Aes128_Cm_Hmac_Sha1_80,
        ),
    ] {
        for len in [100, 1200] {
            let mut group = c.benchmark_group(format!("srtp/{name}/{len}"));
            group.throughput(Throughput::Elements(1));
            let (mut sender, mut receiver) = pair(profile);
            let plain = rtp(len, 1, 111);
            let mut protected = Vec::new();
            group.bench_function("protect", |b| {
                b.iter(|| assert!(sender.protect_rtp(black_box(&plain), &mut protected)));
            });
            let mut out = Vec::new();
            group.bench_function("unprotect", |b| {
                b.iter(|| {
                    receiver
                        .unprotect_rtp(black_box(&protected), &mut out)
                        .unwrap()
                });
            });
        }
    }
}

fn flow(c: &mut Criterion) {
    let mut group = c.benchmark_group("rule");
    group.throughput(Throughput::Elements(1));
    let rule = |rule: TrackRule| {
        let mut flow = Flow::default();
        flow.set_rules(
            &[TrackRule {
                ssrcs: vec![SSRC],
                kind: MediaKind::Audio,
                ..rule
            }],
            None,
        );
        flow
    };
    let mut none = Flow::default();
    let mut wrap = rule(TrackRule {
        wrap_red: Some((111, 63)),
        default_bytes_per_second: 14_687,
        ..TrackRule::default()
    });
    let mut shed = rule(TrackRule {
        shed_red: Some(63),
        shed_always: true,
        ..TrackRule::default()
    });
    let plain = rtp(100, 1, 111);
    let mut red = rtp(17, 1, 63);
    red[12..17].copy_from_slice(&[0x80 | 111, 0x0f, 0x00, 80, 111]);
    red.resize(17 + 80 + 80, 0x55);
    for (name, flow, packet) in [
        ("none", &mut none, &plain),
        ("wrap", &mut wrap, &plain),
        ("shed", &mut shed, &red),
    ] {
        group.bench_function(name, |b| {
            let mut buffer = Vec::with_capacity(2048);
            b.iter(|| {
                buffer.clear();
                buffer.extend_from_slice(packet);
                black_box(flow.apply(&mut buffer, packet.len(), 0, |_| None));
            });
        });
    }
}

/// What a packet costs beside so many streams that are coded: one of them, one without a rule, and the question when it is due,
/// which the worker asks after each.
fn streams(c: &mut Criterion) {
    for count in [5u32, 50, 500] {
        let mut group = c.benchmark_group(format!("streams/{count}"));
        group.throughput(Throughput::Elements(1));
        let rules: Vec<TrackRule> = (0..count)
            .map(|n| TrackRule {
                ssrcs: vec![1000 + n],
                mid: n.to_string(),
                kind: MediaKind::Audio,
                opus_pts: (Some(111), None),
                restore: Some(RestoreRule {
                    pt: 20,
                    models: None,
                    hint_id: 5,
                    level_id: None,
                }),
                ..TrackRule::default()
            })
            .collect();
        let now = Now {
            instant: Instant::now(),
            ntp: 0,
        };
        let mut coding = Coding::new(0, 512, EngineRungs::NONE);
        let mut flow = Flow::default();
        coding.set_rules(now.instant, &rules, None);
        flow.set_rules(&rules, None);
        // A native packet in a framed one.
        let framed = |ssrc: u32, sequence: u16| {
            let mut packet = rtp(12, sequence, 20);
            packet[8..12].copy_from_slice(&ssrc.to_be_bytes());
            let part = Part {
                sequence,
                packets: 1,
                red: false,
                body: Body::Native {
                    payload_type: 111,
                    marker: false,
                    trimmed_from: None,
                    payload: vec![0x48, 0xaa, 0xbb],
                },
            };
            let copy: Option<&Redundant<Vec<u8>>> = None;
            part.write(copy, Frames::LYRA, &mut packet).unwrap();
            packet
        };
        let mut out = Vec::new();
        for n in 0..count {
            coding.take(now, &framed(1000 + n, 1), 50, |_| None);
            while coding.poll_packet(now, &mut out).is_some() {}
        }
        let mut sequence = 1u16;
        group.bench_function("framed", |b| {
            b.iter(|| {
                sequence = u16::wrapping_add(sequence, 1);
                let packet = framed(999 + count, sequence);
                black_box(coding.take(now, &packet, 50, |_| None));
                while coding.poll_packet(now, &mut out).is_some() {}
                coding.poll_report(&mut out);
                black_box(coding.poll_timeout());
            });
        });
        let video = rtp(1200, 1, 96);
        let mut buffer = video.clone();
        group.bench_function("unruled", |b| {
            b.iter(|| {
                black_box(coding.take(now, &video, 1228, |_| None));
                black_box(flow.apply(&mut buffer, 1228, 0, |_| None));
                black_box(coding.poll_timeout());
            });
        });
        group.bench_function("poll_timeout", |b| {
            b.iter(|| black_box(coding.poll_timeout()))
        });
    }
}

/// The kernel's share, through the same library as the workers.
fn socket(c: &mut Criterion) {
    let bound = || {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let state = UdpSocketState::new(UdpSockRef::from(&socket)).unwrap();
        (socket, state)
    };
    for len in [100, 1200] {
        let mut group = c.benchmark_group(format!("socket/{len}"));
        group.throughput(Throughput::Elements(1));
        let ((from, from_state), (to, to_state)) = (bound(), bound());
        let bytes = vec![0x55; len];
        let send = |contents: &[u8]| {
            let transmit = Transmit {
                destination: to.local_addr().unwrap(),
                ecn: None,
                contents,
                segment_size: None,
                src_ip: None,
            };
            from_state
                .try_send(UdpSockRef::from(&from), &transmit)
                .unwrap();
        };
        let mut buffers = vec![vec![0u8; 64 * 1024]; BATCH_SIZE];
        let mut metas = vec![RecvMeta::default(); BATCH_SIZE];
        let mut receive = || {
            let mut slices: Vec<IoSliceMut<'_>> =
                buffers.iter_mut().map(|b| IoSliceMut::new(b)).collect();
            to_state
                .recv(UdpSockRef::from(&to), &mut slices, &mut metas)
                .unwrap()
        };
        group.bench_function("send_and_receive_one", |b| {
            b.iter(|| {
                send(&bytes);
                assert_eq!(receive(), 1);
            });
        });
        group.bench_function("send", |b| {
            // Drained between batches, outside the time.
            b.iter_batched(
                || {
                    to.set_nonblocking(true).unwrap();
                    let mut buffer = [0; 2048];
                    while to.recv(&mut buffer).is_ok() {}
                    to.set_nonblocking(false).unwrap();
                },
                |()| send(&bytes),
                BatchSize::NumIterations(64),
            );
        });
    }
}

criterion_group!(benches, srtp, flow, streams, socket);
criterion_main!(benches);
