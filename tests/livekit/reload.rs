//! Reload under running calls.

use crate::client::{Client, Kind};
use crate::harness::{Load, Trial, array, number, setting, string, wait_for};
use crate::http;
use crate::servers::{Options, Sidecar, Stack};
use crate::wire::{Flow, Wire};
use std::time::Duration;

/// Who is `lean-*` in rooms `mixed-*` is lean.
const BEFORE: &str = "rooms:\n  - { match: \"mixed-*\", identities: \"lean-*\", mode: lean }\n";
/// Nobody is.
const AFTER: &str = "rooms:\n  - { match: \"mixed-*\", mode: off }\n";

fn heaviest_down(flows: &[Flow], sidecar: &Sidecar) -> f64 {
    let ports = sidecar.udp_ports();
    flows
        .iter()
        .filter(|flow| flow.udp && ports.contains(&flow.src))
        .map(|flow| flow.kbps)
        .fold(0.0, f64::max)
}

fn ready(sidecar: &Sidecar) -> String {
    let answer = http::get(sidecar.admin_port, "/readyz").expect("/readyz");
    assert_eq!(
        answer.status,
        200,
        "a bad file does not make a running sidecar unready: {}",
        answer.text()
    );
    answer.text()
}

/// A room that is switched off gets its redundancy back at once, in running calls too.
#[test]
fn a_room_switched_off_ends_shedding_at_once() {
    let trial = Trial::new("a_room_switched_off_ends_shedding_at_once", Load::Alone);
    let stack = Stack::own(
        &trial,
        Options {
            rules: BEFORE.to_owned(),
            ..Options::default()
        },
    );
    let sidecar = &stack.sidecar;
    let room = trial.room("mixed");
    let make =
        |kind, identity: &str| Client::new(kind, &sidecar.url(), &room, identity).seconds(28.0);
    let wav = format!("{}/talker-a.wav", setting("AURALINK_SPEECH"));
    let talker = make(Kind::Python, "talker").wav(&wav).spawn(&trial);
    let ear = make(Kind::Node, "lean-ear").spawn(&trial);
    wait_for("both to join", Duration::from_secs(40), || {
        (sidecar.sessions_in(&room) == 2).then_some(())
    });
    std::thread::sleep(Duration::from_secs(8));
    let count = |name: &str| Wire::count(&trial, name, 5.0, &sidecar.udp_ports()).flows();
    let shed = heaviest_down(&count("shed"), sidecar);
    let shedding = |sidecar: &Sidecar| -> f64 {
        let status = sidecar.status();
        array(&status, "/sessions")
            .iter()
            .flat_map(|session| array(session, "/pcs"))
            .map(|pc| number(pc, "/shedding"))
            .sum()
    };
    assert!(
        shedding(sidecar) >= 1.0,
        "nothing is shed: {:#}",
        sidecar.status()
    );

    // A file that is no configuration changes nothing, and everyone who looks is told.
    sidecar.write_rules("rooms:\n  - { match: \"mixed-*\", mode: sideways }\n");
    wait_for("the bad file to be refused", Duration::from_secs(6), || {
        ready(sidecar).contains("sideways").then_some(())
    });
    let refusal = sidecar.logged("configuration not reloaded; the old settings stay");
    assert!(
        refusal
            .iter()
            .any(|fields| string(fields, "/error").contains("auralink.yaml:")),
        "the log does not name file and line: {refusal:?}"
    );
    let metrics = http::get(sidecar.admin_port, "/metrics").unwrap().text();
    assert!(
        metrics.contains("auralink_config_reloads_total{result=\"failed\"} 1"),
        "no metric of the failed reload:\n{metrics}"
    );
    assert!(shedding(sidecar) >= 1.0, "the bad file ended the shedding");

    sidecar.write_rules(AFTER);
    wait_for("the new file to be taken", Duration::from_secs(6), || {
        (!sidecar.logged("configuration reloaded").is_empty()).then_some(())
    });
    assert!(
        !ready(sidecar).contains("sideways"),
        "/readyz still tells of the bad file"
    );
    std::thread::sleep(Duration::from_millis(1500));
    let full = heaviest_down(&count("full"), sidecar);
    println!("downlink of the running call: {shed:.1} kbps shed, {full:.1} kbps after the reload");
    assert!(
        shed < 0.75 * full,
        "{shed:.1} kbps before and {full:.1} kbps after the reload: shedding did not end"
    );
    // Running calls keep their generation; new joins get the new one.
    let late = Client::new(Kind::Go, &sidecar.url(), &room, "lean-late")
        .seconds(2.0)
        .spawn(&trial)
        .finish();
    let joins = sidecar.joins(&room);
    let modes: Vec<_> = joins
        .iter()
        .map(|join| (string(join, "/mode"), number(join, "/generation")))
        .collect();
    assert_eq!(
        modes.iter().filter(|(mode, _)| *mode == "lean").count(),
        1,
        "{modes:?}"
    );
    let newest = modes.last().expect("joins");
    assert!(
        newest.0 == "off" && newest.1 > modes[0].1,
        "the late join: {modes:?}"
    );
    let (talker, ear) = (talker.finish(), ear.finish());
    late.lasted(&talker);
    ear.lasted(&talker);
    assert!(
        number(ear.audio_from("talker"), "/heard_ms") > 20_000.0,
        "the call broke: {}",
        ear.json
    );
}

/// SIGHUP reads the file at once; what only a restart can change is refused by name.
#[test]
fn sighup_reloads_and_refuses_by_name() {
    let trial = Trial::new("sighup_reloads_and_refuses_by_name", Load::Light);
    let mut stack = Stack::own(&trial, Options::default());
    let sidecar = &mut stack.sidecar;
    sidecar.process.signal("HUP");
    wait_for("SIGHUP to be heard", Duration::from_secs(3), || {
        (!sidecar
            .logged("configuration read again: nothing new")
            .is_empty())
        .then_some(())
    });
    let old = std::fs::read_to_string(&sidecar.config).unwrap();
    std::fs::write(&sidecar.config, old.replace("workers: 2", "workers: 1")).unwrap();
    sidecar.process.signal("HUP");
    wait_for("the change to be refused", Duration::from_secs(3), || {
        ready(sidecar).contains("media.workers").then_some(())
    });
    std::fs::write(&sidecar.config, old).unwrap();
    sidecar.process.signal("HUP");
    wait_for("the old file to be fine", Duration::from_secs(3), || {
        (!ready(sidecar).contains("media.workers")).then_some(())
    });
    assert!(sidecar.process.running(), "a reload ended the process");
}
