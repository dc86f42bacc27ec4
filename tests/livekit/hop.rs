//! The AIC hop between two sidecars, with stock clients in front and the stock server behind: speech goes coded and comes back,
//! everything else crosses as it is.

use crate::chain::{
    ALL_OFF, Chain, GOOD_SPEECH, ROOMS, encoded, framed, heard_well, hop, models, natives, options,
    talker, undisturbed, with_models,
};
use crate::client::{Client, Kind, Running};
use crate::harness::{Load, Trial, number};
use crate::network::udp_ports_of;
use crate::servers::{LiveKit, Sidecar};
use crate::wire::{Wire, kbps};
use std::collections::HashSet;
use std::f64::consts::TAU;
use std::fs;
use std::path::Path;

/// Asserts that a hop that loses nothing lost nothing, and that what one sidecar coded the other restored.
fn nothing_lost(chain: &Chain) {
    let (edge, origin) = (chain.edge.status(), chain.origin.status());
    for (sender, receiver) in [(&edge, &origin), (&origin, &edge)] {
        for what in ["/packets/lost", "/packets/unreadable", "/originals/lost"] {
            assert_eq!(
                hop(receiver, what),
                0.0,
                "{what}: {:#}",
                receiver["totals"]["hop"]
            );
        }
        let (coded, restored) = (
            hop(sender, "/originals/coded"),
            hop(receiver, "/originals/restored"),
        );
        assert!(
            restored >= 0.98 * coded,
            "{restored} of {coded} coded packets were restored: {:#}",
            receiver["totals"]["hop"]
        );
    }
}

/// Asserts that this sidecar codes most of the speech, pauses aside.
fn mostly_coded(sidecar: &Sidecar) {
    let status = sidecar.status();
    let (coded, native) = (hop(&status, "/originals/coded"), natives(&status));
    assert!(
        coded > 200.0 && coded >= 4.0 * native,
        "{coded} originals coded, {native} native: {:#}\n{:#}",
        status["totals"]["hop"],
        status["engine"]
    );
    assert!(
        encoded(&status, "L1") + encoded(&status, "L2") > 50.0,
        "speech was not coded on L2: {:#}",
        status["engine"]
    );
}

/// Two Python clients talk: little crosses the hop, the speech is good, speakers are still told of, and the server's only
/// peer is the origin.
#[test]
fn neural_speech_between_python_clients() {
    let trial = Trial::new("neural_speech_between_python_clients", Load::Alone);
    let room = trial.room("neural");
    let (chain, flows, origin, anna, ben) = undisturbed(&trial, || {
        let chain = Chain::neural(&trial);
        let make = |identity: &str, name: &str| {
            talker(
                &trial,
                Kind::Python,
                &chain.edge.url(),
                &room,
                identity,
                name,
            )
            .seconds(13.0)
            .spawn(&trial)
        };
        let (anna, ben) = (make("anna", "talker-a"), make("ben", "talker-b"));
        chain.wait_talking(&room, 2);
        let ports = [
            chain.edge.udp_ports(),
            chain.origin.udp_ports(),
            vec![chain.livekit.udp_port, chain.livekit.tcp_port],
        ]
        .concat();
        let flows = Wire::count(&trial, "wire", 7.0, &ports).flows();
        let origin = udp_ports_of(chain.origin.process.pid());
        let (anna, ben) = (anna.finish(), ben.finish());
        let statuses = [chain.edge.status(), chain.origin.status()];
        ((chain, flows, origin, anna, ben), statuses)
    });
    let server = [chain.livekit.udp_port, chain.livekit.tcp_port];
    let (clients, hops) = (chain.edge.udp_ports(), chain.origin.udp_ports());

    let up = (
        kbps(&flows, |f| clients.contains(&f.dst)),
        kbps(&flows, |f| hops.contains(&f.dst)),
    );
    let down = (
        kbps(&flows, |f| clients.contains(&f.src)),
        kbps(&flows, |f| hops.contains(&f.src)),
    );
    println!(
        "two talkers: up {:.1} kbps, {:.1} on the hop; down {:.1} kbps, {:.1} on the hop",
        up.0, up.1, down.0, down.1
    );
    assert!(up.0 > 120.0, "the clients hardly sent: {:.1} kbps", up.0);
    for (way, native, coded) in [("up", up.0, up.1), ("down", up.0, down.1)] {
        assert!(
            coded <= 0.2 * native,
            "{way}: {coded:.1} kbps on the hop for {native:.1} kbps of the clients"
        );
    }
    let peers: HashSet<u16> = flows
        .iter()
        .flat_map(|f| [(f.src, f.dst), (f.dst, f.src)])
        .filter_map(|(own, peer)| server.contains(&own).then_some(peer))
        .collect();
    assert!(
        !peers.is_empty() && peers.iter().all(|port| origin.contains(port)),
        "the server's peers {peers:?} are not the origin's {origin:?}"
    );

    let mut visqol = 0.0;
    for (ear, peer, name) in [(&anna, &ben, "talker-b"), (&ben, &anna, "talker-a")] {
        let score = heard_well(&trial, ear, peer, name, GOOD_SPEECH);
        visqol += number(&score, "/visqol") / 2.0;
        assert!(
            ear.number("/active_speakers") >= 1.0,
            "{} never heard of the active speaker: {}",
            ear.client.identity,
            ear.json
        );
        ear.met_only(&chain.edge);
    }
    assert!(visqol >= 3.0, "ViSQOL {visqol:.2} over both talkers");
    for (side, sidecar) in [("edge", &chain.edge), ("origin", &chain.origin)] {
        // The wire's figures above, by the sidecar's own count: what came over the hop, and what was made of it.
        let status = sidecar.status();
        let received = hop(&status, "/bytes/received");
        let restored = hop(&status, "/bytes/restored");
        assert!(
            received > 5000.0 && received < 0.4 * restored,
            "{side}: {:#}",
            status["totals"]["hop"]
        );
    }
    for sidecar in [&chain.edge, &chain.origin] {
        mostly_coded(sidecar);
    }
    chain.wait_over(&room);
    nothing_lost(&chain);
}

/// The same with another bundle at both ends, named by a line: integer codes out of the graph, 24 kHz, frames of 40 ms.
#[test]
fn neural_speech_over_another_codec() {
    let trial = Trial::new("neural_speech_over_another_codec", Load::Alone);
    let room = trial.room("neural");
    let (chain, anna, ben) = undisturbed(&trial, || {
        let rules = with_models(&models(), ROOMS);
        let rules = rules.replacen("engine: {", "engine: { codec: lyra2-24k,", 1);
        let chain = Chain::start(&trial, rules.clone(), rules);
        let make = |identity: &str, name: &str| {
            let url = chain.edge.url();
            talker(&trial, Kind::Python, &url, &room, identity, name)
                .seconds(13.0)
                .spawn(&trial)
        };
        let (anna, ben) = (make("anna", "talker-a"), make("ben", "talker-b"));
        chain.wait_talking(&room, 2);
        let (anna, ben) = (anna.finish(), ben.finish());
        let statuses = [chain.edge.status(), chain.origin.status()];
        ((chain, anna, ben), statuses)
    });
    for (ear, peer, name) in [(&anna, &ben, "talker-b"), (&ben, &anna, "talker-a")] {
        let score = heard_well(&trial, ear, peer, name, GOOD_SPEECH);
        println!("{name}: {score}");
    }
    for sidecar in [&chain.edge, &chain.origin] {
        mostly_coded(sidecar);
        let status = sidecar.status();
        assert!(status.to_string().contains("lyra2-24k"), "{status:#}");
    }
    chain.wait_over(&room);
    nothing_lost(&chain);
}

/// A browser and a Python client talk, send messages and a picture. One of them may lose its signalling meanwhile.
fn browser_call(name: &'static str, browser_dual: bool, resume: bool) {
    let trial = Trial::new(name, Load::Alone);
    let room = trial.room("neural");
    let chain = Chain::neural(&trial);
    let url = chain.edge.url();
    let mut anna = talker(&trial, Kind::Chromium, &url, &room, "anna", "talker-a")
        .data(20, 20_000)
        .seconds(13.0);
    let mut ben = talker(&trial, Kind::Python, &url, &room, "ben", "talker-b")
        .data(20, 20_000)
        .seconds(13.0);
    if browser_dual {
        anna = anna.dual();
    } else {
        ben = ben.dual();
    }
    if resume {
        anna = anna.scenario("resume", 4.0);
    } else {
        ben = ben.video(320, 240);
    }
    let (anna, ben) = (anna.spawn(&trial), ben.spawn(&trial));
    let (anna, ben) = (anna.finish(), ben.finish());
    for (ear, peer, speech) in [(&anna, &ben, "talker-b"), (&ben, &anna, "talker-a")] {
        ear.received(peer);
        // A browser on two cores leaves the codecs little: some of it may go native, some of it late.
        heard_well(&trial, ear, peer, speech, 2.6);
        ear.met_only(&chain.edge);
    }
    for sidecar in [&chain.edge, &chain.origin] {
        let status = sidecar.status();
        assert!(
            encoded(&status, "L1") + encoded(&status, "L2") > 25.0
                && hop(&status, "/originals/restored") > 50.0,
            "no speech went coded: {:#}",
            status["totals"]["hop"]
        );
        let resumed = sidecar
            .joins(&room)
            .iter()
            .filter(|join| join["resumed"] == true)
            .count();
        assert_eq!(resumed > 0, resume, "resumes: {:?}", sidecar.joins(&room));
    }
    if resume {
        assert!(
            anna.number("/reconnecting") >= 1.0 && anna.number("/reconnected") >= 1.0,
            "no resume happened: {}",
            anna.json
        );
    }
    chain.wait_over(&room);
    if !resume {
        nothing_lost(&chain);
    }
}

#[test]
fn neural_chromium_single_and_python_dual() {
    browser_call("neural_chromium_single_and_python_dual", false, false);
}

#[test]
fn neural_chromium_dual_resumes() {
    browser_call("neural_chromium_dual_resumes", true, true);
}

/// Chords of plucked strings: what a voice detector has to keep off the speech codecs. 16 bit, 48 kHz, mono.
fn write_music(path: &Path) {
    const RATE: usize = 48_000;
    const CHORDS: [[f64; 3]; 4] = [
        [220.0, 277.2, 329.6],
        [174.6, 220.0, 261.6],
        [196.0, 246.9, 293.7],
        [164.8, 207.7, 246.9],
    ];
    let samples: Vec<i16> = (0..RATE * 8)
        .map(|n| {
            let (t, beat) = (n as f64 / RATE as f64, n / (RATE / 2));
            let since = (n % (RATE / 2)) as f64 / RATE as f64;
            let voices = CHORDS[beat / 2 % 4];
            let sound: f64 = voices
                .iter()
                .flat_map(|hz| (1..=6).map(move |k| (hz * f64::from(k), f64::from(k))))
                .map(|(hz, k)| (TAU * hz * t).sin() / k * (-since * k).exp())
                .sum();
            (sound * 4_000.0) as i16
        })
        .collect();
    let bytes = u32::try_from(samples.len() * 2).unwrap();
    let mut wav = Vec::new();
    wav.extend_from_slice(b"RIFF");
    wav.extend_from_slice(&(36 + bytes).to_le_bytes());
    wav.extend_from_slice(b"WAVEfmt \x10\0\0\0\x01\0\x01\0");
    wav.extend_from_slice(&(RATE as u32).to_le_bytes());
    wav.extend_from_slice(&(RATE as u32 * 2).to_le_bytes());
    wav.extend_from_slice(b"\x02\0\x10\0data");
    wav.extend_from_slice(&bytes.to_le_bytes());
    wav.extend(samples.iter().flat_map(|s| s.to_le_bytes()));
    fs::write(path, wav).unwrap();
}

/// A tone and music stay off the neural rungs and arrive; a mute ends in sound again.
#[test]
fn a_tone_and_music_stay_off_the_neural_rungs() {
    let trial = Trial::new("a_tone_and_music_stay_off_the_neural_rungs", Load::Alone);
    let chain = Chain::neural(&trial);
    let room = trial.room("neural");
    let music = trial.dir.join("music.wav");
    write_music(&music);
    let make = |identity: &str| {
        Client::new(Kind::Python, &chain.edge.url(), &room, identity).seconds(12.0)
    };
    let anna = make("anna").tone(440.0).with("--mute", "5:2").spawn(&trial);
    let ben = make("ben").wav(&music.display().to_string()).spawn(&trial);
    let (anna, ben) = (anna.finish(), ben.finish());
    for sidecar in [&chain.edge, &chain.origin] {
        let status = sidecar.status();
        let engine = &status["engine"];
        let neural = encoded(&status, "L1") + encoded(&status, "L2");
        let opus: f64 = ["L3", "L4", "L5", "L6"]
            .map(|rung| encoded(&status, rung))
            .iter()
            .sum();
        println!("{neural} groups of music on L1 and L2, {opus} on Opus rungs");
        // Half a second of each may pass until the detector is sure; LiveKit's silence is no music.
        assert!(
            opus > 150.0 && neural < 0.15 * opus,
            "tone or music on a neural rung: {engine:#}"
        );
        assert_eq!(encoded(&status, "L3"), 0.0, "music on L3: {engine:#}");
    }
    anna.lasted(&ben);
    ben.lasted(&anna);
    let tone = ben.audio_from("anna");
    assert!(
        (number(tone, "/tone_hz") / 440.0 - 1.0).abs() < 0.02 && number(tone, "/tone_share") > 0.9,
        "the tone did not survive: {tone}"
    );
    let (silent, seconds) = (number(tone, "/silent_ms"), number(tone, "/seconds"));
    assert!(
        (1_200.0..3_500.0).contains(&silent) && seconds - silent / 1000.0 > 7.0,
        "2 s of mute are {silent} ms of silence in {seconds} s: {tone}"
    );
    let music = anna.audio_from("ben");
    assert!(
        number(music, "/rms") > 0.02 && number(music, "/silent_ms") < 1_000.0,
        "the music did not arrive: {music}"
    );
    chain.wait_over(&room);
    nothing_lost(&chain);
}

/// Stereo and what is encrypted end to end cross untouched.
#[test]
fn stereo_and_encryption_cross_untouched() {
    let trial = Trial::new("stereo_and_encryption_cross_untouched", Load::Alone);
    let chain = Chain::neural(&trial);
    let url = chain.edge.url();
    let room = |what: &str| format!("{}-{what}", trial.room("neural"));

    // Only who has the key can read a frame, and only if not a bit of it has changed.
    let secret = |identity: &str, hz| {
        Client::new(Kind::Python, &url, &room("e2ee"), identity)
            .tone(hz)
            .e2ee("a shared key")
            .data(5, 10_000)
            .seconds(8.0)
            .spawn(&trial)
    };
    // Of the clients that can run without a browser only Go sends real stereo, and only the FFI receives it.
    let stereo = |kind, identity: &str| {
        Client::new(kind, &url, &room("stereo"), identity)
            .flag("--stereo")
            .seconds(8.0)
    };
    let pairs = [
        [secret("anna", 440.0), secret("ben", 620.0)],
        [
            stereo(Kind::Go, "carl").tone(500.0).spawn(&trial),
            stereo(Kind::Python, "dora").spawn(&trial),
        ],
    ];
    for pair in pairs {
        let [one, other] = pair.map(Running::finish);
        one.received(&other);
        other.received(&one);
    }
    for sidecar in [&chain.edge, &chain.origin] {
        let status = sidecar.status();
        assert_eq!(
            hop(&status, "/originals/coded"),
            0.0,
            "stereo or encrypted audio was coded: {:#}",
            status["totals"]["hop"]
        );
    }

    for sidecar in [&chain.edge, &chain.origin] {
        assert_eq!(sidecar.complaints(), Vec::<String>::new());
    }
}

/// What each side can do is what the hop does, and a stock peer gets a plain relay.
#[test]
fn a_hop_is_what_both_sides_can_do() {
    let trial = Trial::new("a_hop_is_what_both_sides_can_do", Load::Alone);
    let livekit = LiveKit::start(&trial.dir);
    let start = |name: &str, upstream: u16, rules: String| {
        let sidecar = Sidecar::start(&trial.dir.join(name), upstream, options(rules));
        trial.watch(&sidecar.process.log);
        sidecar
    };
    let full = with_models(&models(), ROOMS);
    // No models here: L3 to L6 only. And one where every room is off.
    let modest = start("modest", livekit.port, ROOMS.to_owned());
    let off = start("off", livekit.port, with_models(&models(), ALL_OFF));
    let lean = start("lean", modest.port, full.clone());
    let edge = start("edge", modest.port, full.clone());
    let to_off = start("to-off", off.port, full.clone());
    let alone = start("alone", livekit.port, full);

    let call = |mode: &str, url: String, name: &str, kind: Kind| {
        let room = format!("{}-{name}", trial.room(mode));
        ["anna", "ben"].map(|who| {
            let identity = format!("{name}-{who}");
            let kind = if who == "anna" { kind } else { Kind::Go };
            talker(&trial, kind, &url, &room, &identity, "talker-a")
                .seconds(8.0)
                .spawn(&trial)
        })
    };
    let calls = [
        call("neural", edge.url(), "modest", Kind::Go),
        call("lean", lean.url(), "lean", Kind::Python),
        call("neural", to_off.url(), "to-off", Kind::Go),
        call("neural", alone.url(), "alone", Kind::Chromium),
    ];
    for call in calls {
        let [anna, ben] = call.map(Running::finish);
        for (ear, peer) in [(&anna, &ben), (&ben, &anna)] {
            ear.lasted(peer);
            let heard = ear.audio_from(&peer.client.identity);
            assert!(
                number(heard, "/rms") > 0.01 && number(heard, "/heard_ms") > 4_000.0,
                "{} heard nothing: {heard}",
                ear.client.identity
            );
        }
    }

    let encodes = |name: &str, sidecar: &Sidecar, rung: &str| {
        let status = sidecar.status();
        let engine = &status["engine"];
        assert!(
            encoded(&status, rung) > 50.0,
            "{name}: not on {rung}: {engine:#}\n{:#}",
            status["totals"]["hop"]
        );
        for other in ["L1", "L2", "L3"].into_iter().filter(|other| *other < rung) {
            assert_eq!(encoded(&status, other), 0.0, "{name}: {engine:#}");
        }
    };
    // L3 is the cheapest rung that the origin decodes. It has no speech detector either: what may be music goes on L4.
    encodes("edge", &edge, "L3");
    encodes("modest", &modest, "L4");
    // What lean publishers send is steered, and crosses as it is; what they hear is coded.
    for (name, sidecar) in [("edge", &edge), ("lean", &lean)] {
        let status = sidecar.status();
        assert!(
            hop(&status, "/originals/restored") > 100.0,
            "{name}: nothing restored: {:#}",
            status["totals"]["hop"]
        );
    }
    // A stock peer on either side, or one that is off: nothing is framed.
    for (name, sidecar) in [("to-off", &to_off), ("off", &off), ("alone", &alone)] {
        let status = sidecar.status();
        assert!(
            !framed(&status),
            "{name} framed packets towards one that takes none: {:#}",
            status["totals"]["hop"]
        );
    }
    for sidecar in [&modest, &off, &lean, &edge, &to_off, &alone] {
        assert_eq!(sidecar.complaints(), Vec::<String>::new());
    }
}
