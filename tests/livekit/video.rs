//! What lean video does to real calls: codec and rate are steered, and everybody who can't follow still sees and is seen.

use crate::client::{Client, Kind, Report};
use crate::harness::{Load, Trial, array, number, string, wait_for};
use crate::servers::{Options, Stack};
use crate::wire::{Wire, kbps};
use serde_json::Value;
use std::time::Duration;

/// Rooms are steered as their names begin.
const RULES: &str = r#"
rooms:
  - match: "vp9-*"
    mode: lean
    video: { codec: vp9, max_bitrate: 360k }
  - match: "av1-*"
    mode: lean
    video: { codec: av1, max_bitrate: 360k }
  - match: "cap-*"
    mode: lean
    video: { codec: keep, max_bitrate: 150k }
  - match: "all-*"
    mode: lean
    video: { codec: keep, max_bitrate: 150k, screen_share: same }
"#;

/// 16:9, small and slow enough for software encoders that share two cores with their decoders. libwebrtc makes two spatial layers
/// of it, and sends the upper one from some 290 kbit/s on only.
const WIDTH: u32 = 640;
const HEIGHT: u32 = 360;
const FPS: u32 = 15;

fn stack(trial: &Trial) -> Stack {
    let options = Options {
        rules: RULES.to_owned(),
        ..Options::default()
    };
    Stack::own(trial, options)
}

/// A Chromium that publishes a moving picture as an application without a wish for a codec would.
fn camera(stack: &Stack, room: &str, identity: &str) -> Client {
    Client::new(Kind::Chromium, &stack.sidecar.url(), room, identity)
        .video(WIDTH, HEIGHT)
        .with("--fps", FPS)
        .flag("--timeline")
}

fn viewer(kind: Kind, stack: &Stack, room: &str, identity: &str) -> Client {
    Client::new(kind, &stack.sidecar.url(), room, identity)
}

/// Streams of video that this participant sent packets on.
fn sent(report: &Report) -> Vec<&Value> {
    array(&report.json, "/outbound")
        .iter()
        .filter(|flow| string(flow, "/kind") == "video" && number(flow, "/packets") > 0.0)
        .collect()
}

/// Asserts that `report` saw `peer`'s picture to its end, in this codec, at half of the sent frame rate at least.
fn saw(report: &Report, peer: &Report, codec: &str) {
    report.lasted(peer);
    let peer = &peer.client.identity;
    let video = report.video_from(peer);
    let least = 0.5 * f64::from(FPS) * report.client.seconds;
    let me = &report.client.identity;
    assert!(
        string(video, "/codec") == codec && number(video, "/frames") >= least,
        "{me}: not {least} frames of {codec} from {peer}: {video}\n{:#}",
        report.json
    );
    assert!(
        number(video, "/numbered") >= 0.5 * least,
        "{me}: the pictures of {peer} can't be read: {video}"
    );
}

/// A number of all video streams together, at each second of the call: `(seconds, sum)`.
fn over_time(report: &Report, direction: &str, field: &str) -> Vec<(f64, f64)> {
    array(&report.json, "/timeline")
        .iter()
        .map(|sample| {
            let sum = array(sample, direction)
                .iter()
                .filter(|flow| string(flow, "/kind") == "video")
                .map(|flow| number(flow, field))
                .sum();
            (number(sample, "/at"), sum)
        })
        .collect()
}

/// How much a counter grew a second between two times of the call.
fn rate(series: &[(f64, f64)], from: f64, to: f64) -> f64 {
    let within: Vec<_> = series
        .iter()
        .filter(|(at, _)| (from..=to).contains(at))
        .collect();
    let (Some(first), Some(last)) = (within.first(), within.last()) else {
        panic!("no samples between {from} and {to} s: {series:?}");
    };
    assert!(
        last.0 - first.0 > 0.5 * (to - from),
        "too few samples between {from} and {to} s: {series:?}"
    );
    (last.1 - first.1) / (last.0 - first.0)
}

/// Between which samples a counter did not grow for longest.
fn longest_pause(series: &[(f64, f64)]) -> (f64, f64) {
    let mut longest = (0.0, 0.0);
    let mut since = 0.0;
    for pair in series.windows(2) {
        if pair[1].1 > pair[0].1 {
            since = pair[1].0;
        } else if pair[1].0 - since > longest.1 - longest.0 {
            longest = (since, pair[1].0);
        }
    }
    longest
}

fn wait_sessions(stack: &Stack, room: &str, count: usize) {
    wait_for("all participants", Duration::from_secs(60), || {
        (stack.sidecar.sessions_in(room) >= count).then_some(())
    });
}

#[test]
fn a_browser_is_steered_from_simulcast_to_svc() {
    let trial = Trial::new("a_browser_is_steered_from_simulcast_to_svc", Load::Alone);
    let stack = stack(&trial);
    let ports = stack.sidecar.udp_ports();
    let mut measured = Vec::new();
    for (mode, codec) in [("off", "vp8"), ("vp9", "vp9"), ("av1", "av1")] {
        let room = trial.room(mode);
        let publisher = camera(&stack, &room, &format!("{mode}-camera")).seconds(18.0);
        let subscriber =
            viewer(Kind::Chromium, &stack, &room, &format!("{mode}-viewer")).seconds(18.0);
        let (publisher, subscriber) = (publisher.spawn(&trial), subscriber.spawn(&trial));
        wait_sessions(&stack, &room, 2);
        // Until the browser's estimate of the bandwidth has grown.
        std::thread::sleep(Duration::from_secs(9));
        let flows = Wire::count(&trial, &format!("wire-{mode}"), 6.0, &ports).flows();
        let (publisher, subscriber) = (publisher.finish(), subscriber.finish());
        saw(&subscriber, &publisher, codec);
        let streams = sent(&publisher);
        let mime = format!("video/{}", codec.to_uppercase());
        assert!(
            streams.iter().all(|flow| string(flow, "/codec") == mime),
            "not all is {mime}: {streams:?}"
        );
        if mode == "off" {
            assert!(streams.len() >= 2, "no simulcast: {streams:?}");
        } else {
            let layers: Vec<_> = streams
                .iter()
                .map(|flow| (string(flow, "/scalability"), number(flow, "/width")))
                .collect();
            assert_eq!(
                layers,
                [("L2T3_KEY", f64::from(WIDTH))],
                "one stream with all layers: {streams:?}"
            );
        }
        for report in [&publisher, &subscriber] {
            report.met_only(&stack.sidecar);
        }
        let own = publisher.local_ports();
        let up = kbps(&flows, |f| {
            f.udp && own.contains(&f.src) && ports.contains(&f.dst)
        });
        println!("uplink of a {WIDTH}x{HEIGHT} camera in {mode}: {up:.0} kbps");
        measured.push(up);
    }
    let [off, vp9, av1] = measured[..] else {
        unreachable!()
    };
    for (codec, up) in [("VP9", vp9), ("AV1", av1)] {
        // 360 kbit/s of payload; headers, reports and retransmissions beside it.
        assert!(
            (100.0..430.0).contains(&up) && up < 0.75 * off,
            "{codec} takes {up:.0} kbps where VP8 takes {off:.0}"
        );
    }
    assert_eq!(stack.sidecar.complaints(), Vec::<String>::new());
}

#[test]
fn a_publisher_without_the_codec_still_works() {
    let trial = Trial::new("a_publisher_without_the_codec_still_works", Load::Browser);
    let stack = stack(&trial);
    let room = trial.room("av1");
    // A browser that can't encode AV1, and an application that insists on VP8, as Go's does that plays a file.
    let old = camera(&stack, &room, "old").with("--without", "av1,vp9");
    let go = Client::new(Kind::Go, &stack.sidecar.url(), &room, "go").video(320, 240);
    let viewer = viewer(Kind::Python, &stack, &room, "viewer");
    let reports: Vec<_> = [old, go, viewer]
        .map(|client| client.with("--wait-peers", 2).seconds(12.0).spawn(&trial))
        .into_iter()
        .map(crate::client::Running::finish)
        .collect();
    let [old, go, viewer] = &reports[..] else {
        unreachable!()
    };
    saw(viewer, old, "vp8");
    viewer.received(go);
    assert_eq!(string(viewer.video_from("go"), "/codec"), "vp8");
    old.received(go);
    go.received(old);
    assert_eq!(string(go.video_from("old"), "/codec"), "vp8");
    assert_eq!(stack.sidecar.complaints(), Vec::<String>::new());
}

#[test]
fn a_subscriber_without_the_codec_gets_the_backup() {
    let trial = Trial::new(
        "a_subscriber_without_the_codec_gets_the_backup",
        Load::Browser,
    );
    let stack = stack(&trial);
    let room = trial.room("av1");
    let publisher = camera(&stack, &room, "camera");
    let old = viewer(Kind::Chromium, &stack, &room, "old").with("--without", "av1,vp9");
    let new = viewer(Kind::Python, &stack, &room, "new");
    let reports: Vec<_> = [publisher, old, new]
        .map(|client| client.with("--wait-peers", 2).seconds(16.0).spawn(&trial))
        .into_iter()
        .map(crate::client::Running::finish)
        .collect();
    let [publisher, old, new] = &reports[..] else {
        unreachable!()
    };
    saw(old, publisher, "vp8");
    // livekit-client's default policy for backup codecs: the track falls back for everybody.
    saw(new, publisher, "vp8");
    let codecs: Vec<_> = sent(publisher)
        .iter()
        .map(|flow| string(flow, "/codec").to_owned())
        .collect();
    assert!(
        codecs.iter().any(|codec| codec == "video/AV1")
            && codecs.iter().any(|codec| codec == "video/VP8"),
        "AV1 and its backup VP8 were to be sent: {codecs:?}"
    );
    assert_eq!(stack.sidecar.complaints(), Vec::<String>::new());
}

#[test]
fn dynacast_stops_and_resumes_a_steered_publisher() {
    let trial = Trial::new(
        "dynacast_stops_and_resumes_a_steered_publisher",
        Load::Browser,
    );
    let stack = stack(&trial);
    let room = trial.room("vp9");
    let publisher = camera(&stack, &room, "camera").seconds(26.0).spawn(&trial);
    // The server waits 5 s before it stops a layer that nobody watches.
    let subscriber = viewer(Kind::Chromium, &stack, &room, "viewer")
        .with("--pause", "6:18")
        .flag("--timeline")
        .seconds(26.0)
        .spawn(&trial);
    let (publisher, subscriber) = (publisher.finish(), subscriber.finish());
    subscriber.lasted(&publisher);
    let sent = over_time(&publisher, "/outbound", "/bytes");
    // The clocks of the two differ by the time that publishing takes.
    let (from, to) = longest_pause(&sent);
    let (before, after) = (rate(&sent, 0.0, from), rate(&sent, to, 26.0));
    println!("camera: {before:.0} bytes a second, nothing from {from} to {to} s, then {after:.0}");
    assert!(
        to - from >= 4.0 && before > 5_000.0 && after > 0.3 * before,
        "{before:.0} bytes a second, none from {from} to {to} s, {after:.0} after: {sent:?}"
    );
    let frames = array(&subscriber.json, "/timeline")
        .last()
        .map(|sample| number(&sample["inbound"][0], "/frames"))
        .unwrap_or_default();
    assert!(
        frames > 2.0 * f64::from(FPS),
        "the picture didn't come back: {:#}",
        subscriber.json
    );
    assert_eq!(stack.sidecar.complaints(), Vec::<String>::new());
}

#[test]
fn adaptive_stream_picks_layers_of_a_steered_publisher() {
    let trial = Trial::new(
        "adaptive_stream_picks_layers_of_a_steered_publisher",
        Load::Browser,
    );
    let stack = stack(&trial);
    let room = trial.room("vp9");
    let publisher = camera(&stack, &room, "camera").seconds(24.0).spawn(&trial);
    let subscriber = viewer(Kind::Chromium, &stack, &room, "viewer")
        .flag("--adaptive-stream")
        .with("--element", "160@12:640")
        .flag("--timeline")
        .seconds(24.0)
        .spawn(&trial);
    let (publisher, subscriber) = (publisher.finish(), subscriber.finish());
    subscriber.lasted(&publisher);
    let widths = over_time(&subscriber, "/inbound", "/width");
    let widest = |from: f64, to: f64| {
        widths
            .iter()
            .filter(|(at, _)| (from..=to).contains(at))
            .map(|(_, width)| *width)
            .fold(0.0, f64::max)
    };
    let (small, large) = (widest(8.0, 11.5), widest(18.0, 24.0));
    assert!(
        small > 0.0 && small <= 320.0 && large == f64::from(WIDTH),
        "a picture of {small} for an element of 160, {large} for one of 640: {widths:?}"
    );
    assert_eq!(stack.sidecar.complaints(), Vec::<String>::new());
}

#[test]
fn screen_share_keeps_its_rate_unless_named() {
    let trial = Trial::new("screen_share_keeps_its_rate_unless_named", Load::Browser);
    let stack = stack(&trial);
    // Highest target of the encoders in the second half of a call, bit/s.
    let target = |mode: &str, source: &str| {
        let room = format!("{mode}-{source}-{}", trial.name);
        let publisher = camera(&stack, &room, &format!("{mode}-{source}"))
            .with("--video-source", source)
            .seconds(14.0)
            .spawn(&trial);
        let watching = viewer(
            Kind::Python,
            &stack,
            &room,
            &format!("{mode}-{source}-viewer"),
        )
        .seconds(14.0)
        .spawn(&trial);
        let (publisher, watching) = (publisher.finish(), watching.finish());
        saw(&watching, &publisher, "vp8");
        let series = over_time(&publisher, "/outbound", "/target");
        let highest = series
            .iter()
            .filter(|(at, _)| *at > 7.0)
            .map(|(_, target)| *target)
            .fold(0.0, f64::max);
        println!(
            "{source} in a room {mode}: {:.0} kbps wanted",
            highest / 1000.0
        );
        highest
    };
    let (camera, screen, named) = (
        target("cap", "camera"),
        target("cap", "screen"),
        target("all", "screen"),
    );
    // max_bitrate is 150k.
    for (what, target) in [("camera", camera), ("a named screen share", named)] {
        assert!(
            (20_000.0..=155_000.0).contains(&target),
            "{what} may take 150 kbps and wants {target}"
        );
    }
    assert!(
        screen > 250_000.0,
        "a screen share that isn't named wants only {screen} bit/s"
    );
    assert_eq!(stack.sidecar.complaints(), Vec::<String>::new());
}
