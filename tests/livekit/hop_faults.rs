//! What breaks around the AIC hop costs quality, never the call: a link that loses packets, models that go, an origin that dies.

use crate::chain::{
    ALL_OFF, Chain, GOOD_SPEECH, LEFT, Link, RIGHT, ROOMS, encoded, heard_well, hop, models,
    natives, options, runtime, talker, undisturbed, usable, with_models, with_runtime,
};
use crate::client::{Kind, Report, Running};
use crate::harness::{Load, Trial, array, unix_now, wait_for};
use crate::servers::{LiveKit, Options, Sidecar};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::time::Duration;

/// Origin and server at one end of a bad link, edge and clients at the other: Anna's client is of this kind, Ben's is Python's. They stay
/// for so many seconds after both have joined, and hear each other at least so well (ViSQOL).
fn bad_link(name: &'static str, impairments: &[&str], anna: Kind, seconds: f64, least: f64) {
    let trial = Trial::new(name, Load::Alone);
    let room = trial.room("neural");
    let (_link, _livekit, origin, edge, anna, ben, statuses) = undisturbed(&trial, || {
        let link = Link::new(&trial, impairments);
        let rules = with_models(&models(), ROOMS);
        let (livekit, origin) = link.right(|| {
            let livekit = LiveKit::start(&trial.dir);
            let origin = Sidecar::start(
                &trial.dir.join("origin"),
                livekit.port,
                Options {
                    ips: vec![RIGHT.to_owned()],
                    ..options(rules.clone())
                },
            );
            (livekit, origin)
        });
        let (edge, anna, ben) = link.left(|| {
            let edge = Sidecar::start(
                &trial.dir.join("edge"),
                origin.port,
                Options {
                    ips: vec![LEFT.to_owned()],
                    upstream_ip: RIGHT.to_owned(),
                    ..options(rules.clone())
                },
            );
            let make = |kind: Kind, identity: &str, name: &str| {
                let client = talker(&trial, kind, &edge.url(), &room, identity, name);
                // As an application would that knows its link. Where the Python SDK's first try is too slow for its 5 s, the second joins,
                // but then no audio stream of it ever gives a frame, whatever comes.
                let client = match kind {
                    Kind::Python => client.with("--connect-timeout", 20),
                    _ => client,
                };
                client.seconds(seconds).spawn(&trial)
            };
            let anna = make(anna, "anna", "talker-a");
            let ben = make(Kind::Python, "ben", "talker-b");
            (edge, anna, ben)
        });
        for process in [&livekit.process, &origin.process, &edge.process] {
            trial.watch(&process.log);
        }
        let (anna, ben) = (anna.finish(), ben.finish());
        let statuses = [link.left(|| edge.status()), link.right(|| origin.status())];
        (
            (link, livekit, origin, edge, anna, ben, statuses.clone()),
            statuses,
        )
    });
    for (side, status) in ["edge", "origin"].into_iter().zip(&statuses) {
        let totals = &status["totals"]["hop"];
        println!("{name}: {side}: {totals}");
        assert!(
            hop(status, "/originals/coded") > 200.0
                && hop(status, "/originals/coded") >= 2.0 * natives(status),
            "{side}: not coded: {totals:#}"
        );
        // A packet counts as lost where no copy of it came either.
        let copied = hop(status, "/packets/lost_but_copied");
        let lost = hop(status, "/packets/lost") + copied;
        assert!(lost > 8.0, "{side}: the link lost nothing: {totals:#}");
        // Copies are there while losses are reported, and most losses are covered by one.
        assert!(
            hop(status, "/packets/sent_with_copy") > 0.2 * hop(status, "/packets/sent"),
            "{side}: redundancy is not sent: {totals:#}"
        );
        assert!(
            copied > 0.3 * lost,
            "{side}: copies are not used: {totals:#}"
        );
        assert!(
            hop(status, "/originals/lost") < 0.04 * hop(status, "/originals/restored"),
            "{side}: gaps in the restored streams: {totals:#}"
        );
    }
    // What either of them sent, of whatever make its client is.
    let sent = anna.sent_audio() + ben.sent_audio();
    assert!(
        hop(&statuses[0], "/originals/coded") > 0.75 * sent,
        "edge: of {sent} packets: {:#}",
        statuses[0]["totals"]["hop"]
    );
    for (ear, peer, name) in [(&anna, &ben, "talker-b"), (&ben, &anna, "talker-a")] {
        heard_well(&trial, ear, peer, name, least);
        ear.met_only(&edge);
    }
    for sidecar in [&edge, &origin] {
        sidecar.wait_empty(&room, Duration::from_secs(40));
        assert_eq!(sidecar.complaints(), Vec::<String>::new());
    }
}

#[test]
fn neural_over_a_link_that_loses_5_percent() {
    bad_link(
        "neural_over_a_link_that_loses_5_percent",
        &["--loss", "5", "--delay", "50", "--jitter", "10"],
        Kind::Chromium,
        16.0,
        // Seen between Python clients: 2.9 to 3.6.
        2.3,
    );
}

#[test]
fn neural_over_a_slow_link_that_loses_10_percent() {
    bad_link(
        "neural_over_a_slow_link_that_loses_10_percent",
        &["--loss", "10", "--delay", "300", "--jitter", "20"],
        Kind::Python,
        // Joining has taken eight of them.
        24.0,
        // Seen: 2.6 to 3.7, and 2.1 on a loaded machine.
        1.9,
    );
}

#[test]
fn neural_over_a_link_that_loses_10_percent_in_bursts() {
    bad_link(
        "neural_over_a_link_that_loses_10_percent_in_bursts",
        &["--loss", "10", "--burst", "2", "--delay", "50"],
        Kind::Firefox,
        20.0,
        // Seen: 2.9; another's speech scores 1.4.
        1.9,
    );
}

/// A satellite and what is behind it: 1.2 s there and back.
#[test]
fn neural_over_a_link_of_600_ms() {
    bad_link(
        "neural_over_a_link_of_600_ms",
        &["--loss", "3", "--delay", "600", "--jitter", "10"],
        Kind::Python,
        36.0,
        2.3,
    );
}

/// Waits until `count` has grown by `least`.
fn wait_growth(what: &str, least: f64, limit: Duration, count: impl Fn() -> f64) {
    let before = count();
    wait_for(what, limit, || (count() >= before + least).then_some(()));
}

/// The bundles go and come back, and policy switches the room off: the call only changes its rungs.
#[test]
fn models_go_and_come_back_during_a_call() {
    let trial = Trial::new("models_go_and_come_back_during_a_call", Load::Alone);
    let own = trial.dir.join("models");
    let gone = trial.dir.join("models-gone");
    for bundle in ["lyra2", "silero-vad"] {
        fs::create_dir_all(own.join(bundle)).unwrap();
        let from = Path::new(&models()).join(bundle);
        for entry in fs::read_dir(&from).expect("a bundle: run `make models`") {
            let entry = entry.unwrap();
            fs::copy(entry.path(), own.join(bundle).join(entry.file_name())).unwrap();
        }
    }
    let own_rules = |rules: &str| with_models(&own.display().to_string(), rules);
    let room = trial.room("neural");
    let (chain, anna, ben) = undisturbed(&trial, || {
        let chain = Chain::start(&trial, own_rules(ROOMS), with_models(&models(), ROOMS));
        let make = |identity: &str, name: &str| {
            talker(
                &trial,
                Kind::Python,
                &chain.edge.url(),
                &room,
                identity,
                name,
            )
            .seconds(22.0)
            .spawn(&trial)
        };
        let (anna, ben) = (make("anna", "talker-a"), make("ben", "talker-b"));
        chain.wait_talking(&room, 2);
        let (edge, origin) = (|| chain.edge.status(), || chain.origin.status());
        let soon = Duration::from_secs(8);
        let lyra = |status: &Value| encoded(status, "L1") + encoded(status, "L2");
        wait_growth("Lyra at the edge", 20.0, soon, || lyra(&edge()));
        wait_growth("Lyra at the origin", 20.0, soon, || lyra(&origin()));

        fs::rename(&own, &gone).unwrap();
        wait_for("the edge to miss its models", soon, || {
            (!usable(&edge(), "L2")).then_some(())
        });
        let problems = edge()["engine"]["problems"].to_string();
        assert!(
            problems.contains("make models"),
            "the status does not say what to do: {problems}"
        );
        // Both directions go on: what the edge sends, and what it can decode.
        // Without the speech detector what may be music goes on L4.
        wait_growth("L4 at the edge", 20.0, soon, || encoded(&edge(), "L4"));
        wait_growth("L3 at the origin", 20.0, soon, || encoded(&origin(), "L3"));
        let (still_edge, still_origin) = (lyra(&edge()), lyra(&origin()));
        wait_growth("packets at the edge", 50.0, soon, || {
            hop(&edge(), "/packets/sent")
        });
        assert!(
            lyra(&edge()) == still_edge && lyra(&origin()) <= still_origin + 2.0,
            "Lyra goes on without models: {:#}",
            origin()["engine"]
        );

        fs::rename(&gone, &own).unwrap();
        wait_for("the edge to have its models again", soon, || {
            usable(&edge(), "L2").then_some(())
        });
        wait_growth("Lyra at the edge again", 20.0, soon, || lyra(&edge()));
        wait_growth("Lyra at the origin again", 20.0, soon, || lyra(&origin()));

        chain.edge.write_rules(&own_rules(ALL_OFF));
        wait_for("the new rules", soon, || {
            (!chain.edge.logged("configuration reloaded").is_empty()).then_some(())
        });
        // The status is a second old at most.
        std::thread::sleep(Duration::from_millis(1300));
        let coded = hop(&edge(), "/originals/coded");
        wait_growth("native packets", 50.0, soon, || {
            hop(&edge(), "/native/rung")
        });
        assert_eq!(
            hop(&edge(), "/originals/coded"),
            coded,
            "a room that is off is still coded"
        );

        let (anna, ben) = (anna.finish(), ben.finish());
        let statuses = [edge(), origin()];
        ((chain, anna, ben), statuses)
    });
    for (ear, peer, name) in [(&anna, &ben, "talker-b"), (&ben, &anna, "talker-a")] {
        heard_well(&trial, ear, peer, name, GOOD_SPEECH);
    }
    chain.wait_over(&room);
}

/// Somebody writes over ONNX Runtime in place, which would end a process that has that file mapped, and then removes it: the edge
/// runs from a copy of its own, and goes on coding both ways.
#[test]
fn the_runtime_is_overwritten_and_removed_during_a_call() {
    let trial = Trial::new(
        "the_runtime_is_overwritten_and_removed_during_a_call",
        Load::Alone,
    );
    let own = trial.dir.join("libonnxruntime.so");
    let rules = with_runtime(&models(), &own.display().to_string(), ROOMS);
    let room = trial.room("neural");
    let (chain, anna, ben) = undisturbed(&trial, || {
        // A call before this one has removed it.
        let length = fs::copy(runtime(), &own).expect("ONNX Runtime: run `make models`");
        let mut chain = Chain::start(&trial, rules.clone(), with_models(&models(), ROOMS));
        let make = |identity: &str, name: &str| {
            talker(
                &trial,
                Kind::Python,
                &chain.edge.url(),
                &room,
                identity,
                name,
            )
            .seconds(26.0)
            .spawn(&trial)
        };
        let (anna, ben) = (make("anna", "talker-a"), make("ben", "talker-b"));
        chain.wait_talking(&room, 2);
        let (edge, origin) = (|| chain.edge.status(), || chain.origin.status());
        let soon = Duration::from_secs(8);
        let grows = |when: &str| {
            for counter in ["/originals/coded", "/originals/restored"] {
                wait_growth(&format!("{counter} {when}"), 50.0, soon, || {
                    hop(&edge(), counter)
                });
            }
            wait_growth(&format!("Lyra {when}"), 10.0, soon, || {
                encoded(&edge(), "L1") + encoded(&edge(), "L2")
            });
        };
        grows("before");

        // Longer than the engine takes to notice that the file is another, and to load its models anew.
        let noticed = Duration::from_millis(2500);
        fs::write(&own, vec![0x5a; usize::try_from(length).unwrap()]).unwrap();
        std::thread::sleep(noticed);
        grows("with the library overwritten");
        fs::remove_file(&own).unwrap();
        std::thread::sleep(noticed);
        grows("with the library gone");
        assert!(
            usable(&edge(), "L2"),
            "the edge lost its codec: {:#}",
            edge()["engine"]
        );

        let (anna, ben) = (anna.finish(), ben.finish());
        let statuses = [edge(), origin()];
        assert!(chain.edge.process.running(), "the edge ended");
        ((chain, anna, ben), statuses)
    });
    for (ear, peer, name) in [(&anna, &ben, "talker-b"), (&ben, &anna, "talker-a")] {
        heard_well(&trial, ear, peer, name, GOOD_SPEECH);
    }
    chain.wait_over(&room);
}

/// The origin dies: clients behind the edge see what clients of a server that dies see.
#[test]
fn a_dead_origin_looks_like_a_dead_server() {
    let trial = Trial::new("a_dead_origin_looks_like_a_dead_server", Load::Alone);
    let livekit = LiveKit::start(&trial.dir);
    let rules = Options {
        resume_grace: "2s",
        consent_timeout: "5s",
        ..options(with_models(&models(), ROOMS))
    };
    let origin = Sidecar::start(&trial.dir.join("origin"), livekit.port, rules.clone());
    let edge = Sidecar::start(&trial.dir.join("edge"), origin.port, rules);
    for process in [&livekit.process, &origin.process, &edge.process] {
        trial.watch(&process.log);
    }
    let mut chain = Chain {
        edge,
        origin,
        livekit,
    };
    let room = trial.room("neural");
    let (direct, through) = (chain.livekit.url(), chain.edge.url());
    let mut clients: Vec<_> = [Kind::Python, Kind::Go]
        .into_iter()
        .flat_map(|kind| [(kind, &direct, "direct"), (kind, &through, "through")])
        .map(|(kind, url, way)| {
            let (room, who) = (format!("{room}-{way}"), format!("{kind:?}-{way}"));
            talker(&trial, kind, url, &room, &who, "talker-a")
                .seconds(12.0)
                .cut_after(4.0)
                .spawn(&trial)
        })
        .collect();
    chain.wait_talking(&format!("{room}-through"), 2);
    clients.iter_mut().for_each(Running::wait_begun);
    std::thread::sleep(Duration::from_secs(4));
    let crashed = unix_now();
    chain.origin.process.crash();
    chain.livekit.process.crash();
    chain
        .edge
        .wait_empty(&format!("{room}-through"), Duration::from_secs(20));
    let reports: Vec<_> = clients.into_iter().map(Running::report).collect();
    // Until then everybody heard everybody.
    for way in 0..2 {
        let (python, go) = (&reports[way], &reports[2 + way]);
        python.lasted_until(&go.client, crashed);
        go.lasted_until(&python.client, crashed);
    }
    let fate = |report: &Report| {
        (
            report.number("/reconnecting") >= 1.0,
            report.number("/reconnected") >= 1.0,
            report.json["disconnected"].is_null(),
            report.code == 0,
        )
    };
    for pair in reports.chunks(2) {
        let (direct, through) = (fate(&pair[0]), fate(&pair[1]));
        assert!(
            direct.0 || !direct.2,
            "directly the server's end was not seen: {}",
            pair[0].json
        );
        assert_eq!(
            through, direct,
            "(reconnecting, reconnected, stays connected, exit 0) of\n{}\nand directly of\n{}",
            pair[1].json, pair[0].json
        );
        assert!(
            array(&pair[1].json, "/audio").len() == 1,
            "nothing was heard before: {}",
            pair[1].json
        );
    }
    assert_eq!(chain.edge.complaints(), Vec::<String>::new());
}
