//! One sidecar alone that codes speech anew: enhanced on its way to the server, at a low rate on its way to subscribers.

use crate::chain::{GOOD_SPEECH, Link, RIGHT, heard_well, speech, talker};
use crate::client::{Client, Kind, Report};
use crate::harness::{Load, Trial, array, number, wait_for};
use crate::servers::{LiveKit, Options, Sidecar, Stack};
use crate::wire::{Flow, Wire, kbps};
use serde_json::Value;
use std::time::Duration;

/// Lean rooms with and without enhancement; in rooms `ears-*` subscribers `ear-*` are constrained and publishers stay alone.
/// No models: libopus is all that this needs.
const RULES: &str = r#"
engine: { threads: 2 }
rooms:
  - { match: "lean-*", mode: lean }
  - { match: "enhance-*", mode: lean, audio: { enhance: true } }
  - { match: "low-lean-*", mode: lean, audio: { max_bitrate: 9k } }
  - { match: "low-enhance-*", mode: lean, audio: { max_bitrate: 9k, enhance: true } }
  - { match: "lossy-*", identities: "ear-*", mode: lean, audio: { recode: L4 } }
  - { match: "ears-*", identities: "ear-*", mode: lean, audio: { recode: L4, recode_for: all } }
"#;

fn stack(trial: &Trial) -> Stack {
    Stack::own(
        trial,
        Options {
            rules: RULES.to_owned(),
            ..Options::default()
        },
    )
}

/// kbps of UDP between this participant and these ports: to them and from them.
fn wire(flows: &[Flow], ports: &[u16], report: &Report) -> (f64, f64) {
    let own = report.local_ports();
    let to = |f: &Flow| f.udp && own.contains(&f.src) && ports.contains(&f.dst);
    let from = |f: &Flow| f.udp && own.contains(&f.dst) && ports.contains(&f.src);
    (kbps(flows, to), kbps(flows, from))
}

fn recode(status: &Value, what: &str) -> f64 {
    number(status, &format!("/totals/recode/packets/{what}"))
}

fn jobs(status: &Value, what: &str) -> f64 {
    number(status, &format!("/engine/jobs/{what}"))
}

/// Makes a call, and makes it once more where the codecs had no CPU to spare: then packets go as they came. `call` is given its number.
fn undisturbed<T>(trial: &Trial, sidecar: &Sidecar, mut call: impl FnMut(usize) -> T) -> T {
    let before = sidecar.status();
    let seen = call(0);
    let after = sidecar.status();
    let since = |what| recode(&after, what) - recode(&before, what);
    let late = since("missed") + since("resting") + since("off");
    let recoded = since("recoded");
    if late <= 0.1 * recoded
        || !trial.again(&format!(
            "codecs were late for {late} packets and in time for {recoded}"
        ))
    {
        return seen;
    }
    call(1)
}

/// kbps from the publisher and to the listener, and how it sounded there.
struct Heard {
    up: f64,
    down: f64,
    visqol: f64,
    pesq: f64,
}

impl std::fmt::Display for Heard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            up,
            down,
            visqol,
            pesq,
        } = self;
        write!(
            f,
            "up {up:.1} kbps, from the server {down:.1}, ViSQOL {visqol:.2}, PESQ {pesq:.2}"
        )
    }
}

/// A publisher behind the sidecar, and one who hears it from the server itself.
fn heard_at_the_server(trial: &Trial, stack: &Stack, room: &str, name: &str) -> Heard {
    let sidecar = &stack.sidecar;
    let ann = format!("{room}-ann");
    let ann = talker(trial, Kind::Python, &sidecar.url(), room, &ann, name).seconds(18.0);
    let ben = Client::new(
        Kind::Python,
        &stack.livekit.url(),
        room,
        &format!("{room}-ben"),
    )
    .with("--record", trial.dir.display())
    .seconds(18.0);
    let (ann, ben) = (ann.spawn(trial), ben.spawn(trial));
    wait_for("the publisher", Duration::from_secs(60), || {
        (sidecar.sessions_in(room) == 1).then_some(())
    });
    std::thread::sleep(Duration::from_secs(4));
    let ports = [sidecar.udp_ports(), vec![stack.livekit.udp_port]].concat();
    let flows = Wire::count(trial, &format!("wire-{room}"), 8.0, &ports).flows();
    let (ann, ben) = (ann.finish(), ben.finish());
    let score = heard_well(trial, &ben, &ann, name, GOOD_SPEECH);
    sidecar.wait_empty(room, Duration::from_secs(30));
    Heard {
        up: wire(&flows, &sidecar.udp_ports(), &ann).0,
        down: wire(&flows, &[stack.livekit.udp_port], &ben).1,
        visqol: number(&score, "/visqol"),
        pesq: number(&score, "/pesq_wb"),
    }
}

#[test]
fn steered_speech_reaches_the_server_enhanced() {
    let trial = Trial::new("steered_speech_reaches_the_server_enhanced", Load::Alone);
    let stack = stack(&trial);
    let room = |mode: &str, n: usize| format!("{}-{n}", trial.room(mode));
    let plain = heard_at_the_server(&trial, &stack, &room("lean", 0), "talker-a");
    assert_eq!(recode(&stack.sidecar.status(), "recoded"), 0.0);
    let enhanced = undisturbed(&trial, &stack.sidecar, |n| {
        heard_at_the_server(&trial, &stack, &room("enhance", n), "talker-a")
    });
    println!("lean: {plain}; enhanced: {enhanced}");
    for up in [plain.up, enhanced.up] {
        assert!(
            (15.0..32.0).contains(&up),
            "{up:.1} kbps up: the publisher isn't steered"
        );
    }
    // Neither has to be better than the other (docs/benchmarks.md), but nothing may be broken.
    assert!(enhanced.visqol > plain.visqol - 0.4);
    assert!(plain.down < 35.0, "{:.1} kbps from the server", plain.down);
    // 64 kbit/s and the headers of 25 packets a second.
    assert!(
        (55.0..95.0).contains(&enhanced.down),
        "{:.1} kbps from the server: not the local rate",
        enhanced.down
    );
    let status = stack.sidecar.status();
    assert!(
        recode(&status, "recoded") > 200.0,
        "{:#}",
        status["totals"]["recode"]
    );
    assert_eq!(jobs(&status, "shared"), 0.0, "nobody shares an uplink");
    assert_eq!(stack.sidecar.complaints(), Vec::<String>::new());
}

/// The figures of docs/benchmarks.md: three minutes.
#[test]
#[ignore = "a measurement, for docs/benchmarks.md"]
fn what_enhancement_is_worth() {
    let trial = Trial::new("what_enhancement_is_worth", Load::Alone);
    let stack = stack(&trial);
    for name in ["talker-a", "talker-b"] {
        for mode in ["lean", "enhance", "low-lean", "low-enhance"] {
            let room = format!("{}-{name}", trial.room(mode));
            let heard = heard_at_the_server(&trial, &stack, &room, name);
            println!("{name} {mode}: {heard}");
        }
    }
    println!("{:#}", stack.sidecar.status()["totals"]["recode"]);
}

#[test]
fn subscribers_share_what_is_coded_for_them() {
    let trial = Trial::new("subscribers_share_what_is_coded_for_them", Load::Alone);
    let stack = stack(&trial);
    let sidecar = &stack.sidecar;
    let call = |n: usize| {
        let room = format!("{}-{n}", trial.room("ears"));
        let url = sidecar.url();
        let make = |kind, who: &str| {
            let client = Client::new(kind, &url, &room, &format!("{who}-{n}"));
            client.with("--wait-peers", 3).seconds(16.0)
        };
        let wav = speech("talker-a");
        let ann = make(Kind::Python, "ann").wav(&wav).spawn(&trial);
        // Both ways of LiveKit's to name a track: with one peer connection and with two.
        let ears = [
            make(Kind::Python, "ear-one").with("--record", trial.dir.display()),
            make(Kind::Go, "ear-two"),
            make(Kind::Python, "free").with("--record", trial.dir.display()),
        ];
        let ears = ears.map(|ear| ear.spawn(&trial));
        wait_for("all participants", Duration::from_secs(60), || {
            (sidecar.sessions_in(&room) >= 4).then_some(())
        });
        std::thread::sleep(Duration::from_secs(5));
        // While all are there: what is coded for the first before the second has come nobody shares.
        let before = sidecar.status();
        let flows = Wire::count(&trial, &format!("wire-{n}"), 6.0, &sidecar.udp_ports()).flows();
        let after = sidecar.status();
        let (ann, ears) = (ann.finish(), ears.map(crate::client::Running::finish));
        sidecar.wait_empty(&room, Duration::from_secs(30));
        ([before, after], flows, ann, ears)
    };
    let ([before, after], flows, ann, [one, two, free]) = undisturbed(&trial, sidecar, call);
    let down = |report| wire(&flows, &sidecar.udp_ports(), report).1;
    let (up, _) = wire(&flows, &sidecar.udp_ports(), &ann);
    let rates = [down(&one), down(&two), down(&free)];
    println!(
        "up {up:.1} kbps; down {:.1} and {:.1}, and {:.1} as it came",
        rates[0], rates[1], rates[2]
    );
    assert!(up > 90.0, "the publisher was steered: {up:.1} kbps");
    assert!(
        rates[2] > 60.0,
        "who isn't constrained gets less: {rates:?}"
    );
    for rate in &rates[..2] {
        // Opus 12 kbit/s in 50 packets a second, and RTCP.
        assert!((20.0..45.0).contains(rate), "{rates:?}");
    }
    let since = |what| jobs(&after, what) - jobs(&before, what);
    let (made, shared) = (since("recoded"), since("shared"));
    println!(
        "{made} packets coded, {shared} taken from those: {:#}",
        after["totals"]["recode"]
    );
    assert!(made > 200.0, "{:#}", after["engine"]);
    assert!(
        (0.9 * made..=1.02 * made).contains(&shared),
        "two subscribers on two workers don't share: {made} made, {shared} shared"
    );
    heard_well(&trial, &one, &ann, "talker-a", GOOD_SPEECH);
    heard_well(&trial, &free, &ann, "talker-a", GOOD_SPEECH);
    two.lasted(&ann);
    let heard = two.audio_from(&ann.client.identity);
    assert!(number(heard, "/rms") > 0.01, "{heard}");
    assert_eq!(sidecar.complaints(), Vec::<String>::new());
}

/// Of two subscribers only the one behind a bad link gets the low rate.
#[test]
fn a_subscriber_that_loses_packets_is_constrained() {
    let trial = Trial::new(
        "a_subscriber_that_loses_packets_is_constrained",
        Load::Alone,
    );
    let room = trial.room("lossy");
    let link = Link::new(&trial, &["--delay", "20", "--loss", "8"]);
    let (_livekit, sidecar) = link.right(|| {
        let livekit = LiveKit::start(&trial.dir);
        let options = Options {
            ips: vec![RIGHT.to_owned()],
            rules: RULES.to_owned(),
            ..Options::default()
        };
        let sidecar = Sidecar::start(&trial.dir, livekit.port, options);
        (livekit, sidecar)
    });
    trial.watch(&sidecar.process.log);
    let make = |who: &str| {
        let client = Client::new(Kind::Python, &sidecar.url(), &room, who);
        client.with("--wait-peers", 2).seconds(20.0)
    };
    let far = link.left(|| make("ear-far").spawn(&trial));
    let (ann, near) = link.right(|| {
        let ann = make("ann").wav(&speech("talker-a"));
        (ann.spawn(&trial), make("ear-near").spawn(&trial))
    });
    // Of each session to which audio is coded anew: how many packets.
    let recoded = || {
        let status = link.right(|| sidecar.status());
        let pcs = array(&status, "/sessions").iter();
        let pcs = pcs.flat_map(|session| array(session, "/pcs"));
        let counts = pcs.map(|pc| number(pc, "/recode_down/packets/recoded"));
        counts.filter(|count| *count > 0.0).collect::<Vec<f64>>()
    };
    // Its reports come every few seconds.
    let counts = wait_for(
        "the constrained subscriber",
        Duration::from_secs(60),
        || {
            let counts = recoded();
            (counts.iter().sum::<f64>() > 200.0).then_some(counts)
        },
    );
    assert_eq!(
        counts.len(),
        1,
        "who loses nothing is constrained too: {counts:?}"
    );
    let (ann, near, far) = (ann.finish(), near.finish(), far.finish());
    for ear in [&near, &far] {
        ear.lasted(&ann);
        let heard = ear.audio_from("ann");
        assert!(
            number(heard, "/rms") > 0.01 && number(heard, "/heard_ms") > 10_000.0,
            "{} heard nothing: {heard}",
            ear.client.identity
        );
    }
    assert_eq!(sidecar.complaints(), Vec::<String>::new());
}
