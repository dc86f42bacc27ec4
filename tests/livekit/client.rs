//! The stock clients of tests/clients, and what their reports must say.

use crate::harness::{Process, Trial, array, number, root, setting, string, wait_for};
use crate::servers::Sidecar;
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::process::Command;
use std::time::Duration;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Python,
    Node,
    Chromium,
    Firefox,
    Go,
}

/// A participant to be.
#[derive(Clone)]
pub(crate) struct Client {
    pub(crate) kind: Kind,
    pub(crate) identity: String,
    pub(crate) tone: Option<f64>,
    wav: Option<String>,
    pub(crate) stereo: bool,
    pub(crate) video: Option<(u32, u32)>,
    pub(crate) data: Option<(u32, u32)>,
    pub(crate) seconds: f64,
    /// After so many seconds of the call the test breaks it off.
    cut: Option<f64>,
    e2ee: bool,
    args: Vec<String>,
    namespace: Option<String>,
}

impl Client {
    pub(crate) fn new(kind: Kind, url: &str, room: &str, identity: &str) -> Self {
        let mut args = Vec::new();
        if kind == Kind::Firefox {
            args.extend(["--browser".to_owned(), "firefox".to_owned()]);
        }
        let client = Self {
            kind,
            identity: identity.to_owned(),
            tone: None,
            wav: None,
            stereo: false,
            video: None,
            data: None,
            seconds: 6.0,
            cut: None,
            e2ee: false,
            args,
            namespace: None,
        };
        client
            .with("--url", url)
            .with("--room", room)
            .with("--identity", identity)
            .with("--wait-timeout", "45")
    }

    /// Any other option.
    pub(crate) fn with(mut self, option: &str, value: impl ToString) -> Self {
        self.args.extend([option.to_owned(), value.to_string()]);
        self
    }

    pub(crate) fn flag(mut self, option: &str) -> Self {
        self.stereo |= option == "--stereo";
        self.args.push(option.to_owned());
        self
    }

    pub(crate) fn seconds(mut self, seconds: f64) -> Self {
        self.seconds = seconds;
        self
    }

    pub(crate) fn tone(mut self, hz: f64) -> Self {
        self.tone = Some(hz);
        self.with("--audio", format!("tone:{hz}"))
    }

    pub(crate) fn wav(mut self, path: &str) -> Self {
        self.wav = Some(path.to_owned());
        self.with("--audio", format!("wav:{path}"))
    }

    pub(crate) fn video(mut self, width: u32, height: u32) -> Self {
        self.video = Some((width, height));
        self.with("--video", format!("{width}x{height}"))
    }

    pub(crate) fn data(mut self, count: u32, bytes: u32) -> Self {
        self.data = Some((count, bytes));
        self.with("--data", format!("{count}:{bytes}"))
    }

    pub(crate) fn e2ee(mut self, key: &str) -> Self {
        self.e2ee = true;
        self.with("--e2ee", key)
    }

    pub(crate) fn dual(self) -> Self {
        self.with("--pc", "dual")
    }

    /// Says when the test itself will end what goes on, in seconds of the call: no death later than that can be noticed.
    pub(crate) fn cut_after(mut self, seconds: f64) -> Self {
        self.cut = Some(seconds);
        self
    }

    pub(crate) fn scenario(self, name: &str, at: f64) -> Self {
        self.with("--scenario", name).with("--scenario-at", at)
    }

    /// Runs it in a network namespace.
    pub(crate) fn inside(mut self, namespace: &str) -> Self {
        self.namespace = Some(namespace.to_owned());
        self
    }

    /// Whether it publishes audio.
    fn speaks(&self) -> bool {
        self.tone.is_some() || self.wav.is_some()
    }

    /// The longest silence in what it says, which is a loop, in seconds.
    fn pause(&self) -> f64 {
        let Some(path) = &self.wav else {
            return 0.0;
        };
        let file = fs::read(path).unwrap_or_else(|error| panic!("{path}: {error}"));
        let channels = usize::from(u16::from_le_bytes([file[22], file[23]]));
        let data = file.windows(4).position(|name| name == b"data");
        let samples = &file[data.unwrap_or_else(|| panic!("{path} is no WAV file")) + 8..];
        let blocks = samples.chunks_exact(480 * 2 * channels).map(|block| {
            let power = |pair: &[u8]| f64::from(i16::from_le_bytes([pair[0], pair[1]])).powi(2);
            let sum: f64 = block.chunks_exact(2).map(power).sum();
            // -60 dBFS, as the clients have it.
            sum / (480 * channels) as f64 <= 1e-6 * 32768.0 * 32768.0
        });
        let silent: Vec<bool> = blocks.collect();
        let mut longest = 0;
        let mut length = 0;
        for silent in silent.iter().chain(&silent) {
            length = if *silent { length + 1 } else { 0 };
            longest = longest.max(length);
        }
        f64::from(longest) / 100.0
    }

    pub(crate) fn spawn(self, trial: &Trial) -> Running {
        let clients = root().join("tests/clients");
        let script = |name: &str| clients.join(name).display().to_string();
        let mut line = match &self.namespace {
            Some(name) => vec![
                "ip".to_owned(),
                "netns".to_owned(),
                "exec".to_owned(),
                name.clone(),
            ],
            None => Vec::new(),
        };
        match self.kind {
            Kind::Python => line.extend([setting("AURALINK_PYTHON"), script("python/client.py")]),
            Kind::Node => line.extend([setting("AURALINK_NODE"), script("node/client.mjs")]),
            Kind::Chromium | Kind::Firefox => {
                line.extend([setting("AURALINK_NODE"), script("browser/client.mjs")]);
            }
            Kind::Go => line.push(setting("AURALINK_GO_CLIENT")),
        }
        let mut command = Command::new(&line[0]);
        command.args(&line[1..]).args(&self.args);
        command.args(["--seconds", &self.seconds.to_string()]);
        for name in ["AURALINK_NODE_DIR", "AURALINK_CHROMIUM", "AURALINK_FIREFOX"] {
            if matches!(self.kind, Kind::Chromium | Kind::Firefox | Kind::Node) {
                command.env(name, setting(name));
            }
        }
        let lasts = self.cut.unwrap_or(self.seconds);
        let process = trial.participant(&self.identity, command, lasts);
        Running {
            client: self,
            process,
        }
    }
}

/// A participant at work.
pub(crate) struct Running {
    pub(crate) client: Client,
    pub(crate) process: Process,
}

impl Running {
    /// Waits until all its peers are there.
    pub(crate) fn wait_begun(&mut self) {
        let me = self.client.identity.clone();
        wait_for(
            &format!("the call of {me}"),
            Duration::from_secs(60),
            || {
                let log = fs::read_to_string(&self.process.log).unwrap_or_default();
                assert!(self.process.running(), "{me} ended: {log}");
                log.lines().any(|line| line == BEGINS).then_some(())
            },
        );
    }

    /// Its report, whatever it says.
    pub(crate) fn report(mut self) -> Report {
        // Waiting for peers, the call, and a browser's start and end on a busy machine.
        let limit = Duration::from_secs_f64(self.client.seconds + 120.0);
        let code = self.process.wait(limit);
        let text = fs::read_to_string(&self.process.out).unwrap_or_default();
        let json = text
            .lines()
            .last()
            .and_then(|line| serde_json::from_str(line).ok())
            .unwrap_or_else(|| {
                let log = fs::read_to_string(&self.process.log).unwrap_or_default();
                panic!(
                    "{} ended with {code} and without a report:\n{log}",
                    self.client.identity
                )
            });
        Report {
            client: self.client,
            json,
            code,
        }
    }

    /// Its report; fails where it names an error.
    pub(crate) fn finish(self) -> Report {
        let report = self.report();
        assert!(
            report.code == 0,
            "{} ended with {} and the errors {}\n{:#}",
            report.client.identity,
            report.code,
            report.json["errors"],
            report.json
        );
        report
    }
}

/// What a participant saw.
pub(crate) struct Report {
    pub(crate) client: Client,
    pub(crate) json: Value,
    pub(crate) code: i32,
}

/// What clients say on standard error when the call begins for them.
pub(crate) const BEGINS: &str = "the call begins";

/// Of sounds and pictures so much may be missing at the end, in seconds: a client's buffers hold it, and one leaves before the other.
const LAST_SOUND: f64 = 1.0;
const LAST_PICTURE: f64 = 1.5;

/// What is shorter, after a silence, was said by nobody, in seconds.
const BLIP: f64 = 0.25;

/// Of a tone so much may be silent: a jitter buffer that finds its measure, a link that is changed.
const MOST_SILENCE: f64 = 0.15;

/// How many seconds of a `[seconds since 1970, ms]` lie in a span.
fn within(one: &Value, span: (f64, f64)) -> f64 {
    let from = number(one, "/0");
    let to = from + number(one, "/1") / 1000.0;
    (to.min(span.1) - from.max(span.0)).max(0.0)
}

/// The part of a list that is about one peer.
fn about<'a>(report: &'a Value, list: &str, peer: &str) -> &'a Value {
    array(report, list)
        .iter()
        .find(|entry| string(entry, "/from") == peer)
        .unwrap_or(&Value::Null)
}

impl Report {
    pub(crate) fn number(&self, pointer: &str) -> f64 {
        number(&self.json, pointer)
    }

    pub(crate) fn audio_from(&self, peer: &str) -> &Value {
        about(&self.json, "/audio", peer)
    }

    pub(crate) fn video_from(&self, peer: &str) -> &Value {
        about(&self.json, "/video", peer)
    }

    pub(crate) fn data_from(&self, peer: &str) -> &Value {
        about(&self.json, "/data", peer)
    }

    /// Local ports of its peer connections.
    pub(crate) fn local_ports(&self) -> BTreeSet<u16> {
        array(&self.json, "/ice")
            .iter()
            .filter_map(|pair| string(pair, "/local").rsplit(':').next()?.parse().ok())
            .collect()
    }

    /// Audio packets it has sent, by its own statistics.
    pub(crate) fn sent_audio(&self) -> f64 {
        array(&self.json, "/outbound")
            .iter()
            .filter(|stream| string(stream, "/kind") == "audio")
            .map(|stream| number(stream, "/packets"))
            .sum()
    }

    /// A moment that it tells of, in seconds since 1970.
    pub(crate) fn moment(&self, pointer: &str) -> f64 {
        let at = self.number(pointer);
        let me = &self.client.identity;
        assert!(at > 0.0, "{me} gives no {pointer}: {}", self.json);
        at
    }

    /// While both of them were in the call with all their peers, in seconds since 1970.
    fn together(&self, peer: &Self) -> (f64, f64) {
        let from = self.moment("/began_at").max(peer.moment("/began_at"));
        (from, self.moment("/ended_at").min(peer.moment("/ended_at")))
    }

    /// For how many seconds of a span either of the two did not run at all, because the machine was busy with something else.
    fn stood_still(&self, peer: &Self, span: (f64, f64)) -> f64 {
        let stalls = [self, peer].map(|report| array(&report.json, "/stalls"));
        stalls
            .into_iter()
            .flatten()
            .map(|one| within(one, span))
            .sum()
    }

    /// Whether this one can read the peer's pictures: the Go client encrypts, and can decrypt, audio only.
    fn reads_pictures(&self, peer: &Client) -> bool {
        !(self.client.e2ee && (self.client.kind == Kind::Go || peer.kind == Kind::Go))
    }

    /// Asserts that what `peer` published was there to the end of the time that it published it, while this one was there too.
    pub(crate) fn lasted(&self, peer: &Self) {
        let (_, end) = self.together(peer);
        self.there_until(&peer.client, end, &|span| self.stood_still(peer, span));
    }

    /// The same of somebody whose call the test broke off then, in seconds since 1970.
    pub(crate) fn lasted_until(&self, peer: &Client, end: f64) {
        self.there_until(peer, end, &|span| self.stood_still(self, span));
    }

    fn there_until(&self, peer: &Client, end: f64, stood_still: &dyn Fn((f64, f64)) -> f64) {
        let from = &peer.identity;
        let pause = peer.pause();
        let audio = peer
            .speaks()
            .then(|| (self.audio_from(from), "heard", LAST_SOUND + pause));
        let pictures = peer.video.is_some() && self.reads_pictures(peer);
        let video = pictures.then(|| (self.video_from(from), "seen", LAST_PICTURE));
        for (entry, done, buffers) in audio.into_iter().chain(video) {
            let mut last = number(entry, "/last_at");
            // The server ends a track with some packets of silence, which a client may turn into a blip of what it played last.
            for hole in array(entry, "/holes").iter().rev() {
                let (at, seconds) = (number(hole, "/0"), number(hole, "/1") / 1000.0);
                if seconds > pause + BLIP && at < last && last - (at + seconds) < BLIP {
                    last = at;
                }
            }
            let still = stood_still((last.max(end - 30.0) - 0.5, end));
            let me = &self.client.identity;
            assert!(
                last >= end - buffers - still,
                "{me}: nothing of {from} was {done} in the last {:.1} s, of which {still:.1} s nothing ran: {entry}\n{}",
                end - last,
                self.json
            );
        }
    }

    /// Asserts that all that `peer` sent arrived here as it was sent, from when both were there to the end.
    pub(crate) fn received(&self, peer: &Self) {
        let me = &self.client.identity;
        let report = peer;
        let peer = &report.client;
        let from = &peer.identity;
        self.lasted(report);
        if let Some(hz) = peer.tone {
            self.heard(from, hz, "");
            if peer.stereo && self.client.stereo {
                self.heard(from, hz * 1.5, "_right");
            }
            let audio = self.audio_from(from);
            let span = self.together(report);
            let long = span.1 - span.0;
            let holes = array(audio, "/holes").iter();
            let holes: f64 = holes.map(|one| within(one, span)).sum();
            let silent = holes + (span.1 - number(audio, "/last_at")).max(0.0);
            let still = self.stood_still(report, (span.0 - 1.0, span.1));
            assert!(
                silent <= MOST_SILENCE * long + still,
                "{me}: {silent:.1} s of {long:.1} s of {from}'s tone are silent, and for {still:.1} s nothing ran: {}\n{}",
                self.json,
                report.json
            );
            let heard = number(audio, "/heard_ms") / 1000.0;
            assert!(
                heard + still > 0.5 * long,
                "{me}: only {heard:.1} s of {long:.1} s of {from}'s tone: {audio}"
            );
        }
        let plain = self.reads_pictures(peer);
        if let (Some((width, height)), true) = (peer.video, plain) {
            let video = self.video_from(from);
            let least = 3.0 * self.client.seconds.min(peer.seconds);
            assert!(
                number(video, "/frames") >= least,
                "{me}: under {least} frames of {from}'s video: {video}\n{}",
                self.json
            );
            let seen = (number(video, "/width"), number(video, "/height"));
            assert!(
                seen.0 > 0.0
                    && (seen.0 / seen.1 - f64::from(width) / f64::from(height)).abs() < 0.05,
                "{me}: {from}'s video of {width}x{height} is {seen:?} here"
            );
        }
        if let (Some((count, bytes)), true) = (peer.data, plain) {
            let data = self.data_from(from);
            let count = f64::from(count);
            assert_eq!(
                number(data, "/reliable"),
                count,
                "{me}: reliable messages of {from}: {data}"
            );
            assert_eq!(
                number(data, "/bad"),
                0.0,
                "{me}: damaged messages of {from}: {data}"
            );
            assert_eq!(
                number(data, "/duplicates"),
                0.0,
                "{me}: repeated messages of {from}: {data}"
            );
            assert!(
                number(data, "/lossy") >= 0.8 * count,
                "{me}: under 80 % of {count} lossy messages of {from}: {data}"
            );
            assert!(
                number(data, "/bytes") >= count * f64::from(bytes),
                "{me}: {data}"
            );
        }
    }

    /// Asserts a pure tone of `hz` from a peer.
    fn heard(&self, peer: &str, hz: f64, side: &str) {
        let audio = self.audio_from(peer);
        let (got, share) = (
            number(audio, &format!("/tone_hz{side}")),
            number(audio, &format!("/tone_share{side}")),
        );
        let me = &self.client.identity;
        assert!(
            (got / hz - 1.0).abs() < 0.02 && share > 0.9,
            "{me}: {peer}'s tone{side} of {hz} Hz is {got} Hz here with {share} of the power: {}",
            self.json
        );
    }

    /// Asserts that the sidecar was the only ICE peer, and that packets went both ways.
    pub(crate) fn met_only(&self, sidecar: &Sidecar) {
        let me = &self.client.identity;
        let told = array(&self.json, "/remote_candidates");
        assert!(
            !told.is_empty(),
            "{me} was told of no candidate: {}",
            self.json
        );
        for address in told {
            let address = address.as_str().unwrap_or_default();
            assert!(
                sidecar.is_candidate(address),
                "{me} was told of {address}, which is none of the sidecar's {:?}",
                sidecar.candidates()
            );
        }
        let pairs = array(&self.json, "/ice");
        assert!(
            !pairs.is_empty(),
            "{me} has no selected pair: {}",
            self.json
        );
        for pair in pairs {
            let remote = string(pair, "/remote");
            assert!(
                sidecar.is_candidate(remote),
                "{me} sends to {remote}: {pair}"
            );
            assert!(
                number(pair, "/bytes_sent") > 0.0 && number(pair, "/bytes_received") > 0.0,
                "{me}: nothing went over {pair}"
            );
        }
    }
}

/// Runs a call through the sidecar to its end, and asserts that everyone received everything of everyone, that the sidecar was
/// everyone's only ICE peer, and that it has freed the sessions.
pub(crate) fn call(
    trial: &Trial,
    sidecar: &Sidecar,
    room: &str,
    clients: Vec<Client>,
) -> Vec<Report> {
    let running: Vec<_> = clients
        .into_iter()
        .map(|client| client.spawn(trial))
        .collect();
    let reports: Vec<_> = running.into_iter().map(Running::finish).collect();
    for report in &reports {
        for peer in reports
            .iter()
            .filter(|p| p.client.identity != report.client.identity)
        {
            report.received(peer);
        }
        report.met_only(sidecar);
    }
    assert!(
        sidecar.joins(room).len() >= reports.len(),
        "the sidecar's log has {} joins of {room}",
        sidecar.joins(room).len()
    );
    sidecar.wait_empty(room, Duration::from_secs(20));
    assert_eq!(sidecar.complaints(), Vec::<String>::new());
    reports
}
