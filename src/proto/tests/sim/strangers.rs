//! What a request to join may cost before LiveKit has accepted it: not more for its bytes than that of a real client does.

use crate::golden::{Entry, golden, read_query};
use crate::media::lean;
use crate::session::session;
use auralink_proto::asked::{Asked, Request};
use auralink_proto::policy::{Mode, Policy, RedPolicy};
use auralink_proto::signal::{MAX_JOIN_REQUEST, SignalError, wire::write_bytes};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE;
use flate2::{Compression, write::GzEncoder};
use std::io::Write;
use std::time::Duration;

/// So much more than a real client's request may one cost, by the byte unzipped. The worst is at 3 to 4; what grows with the product of two
/// numbers, such as the m-sections and the header extensions of the session, was at hundreds.
const RATIO: f64 = 8.0;

fn bytes(number: u32, value: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    write_bytes(&mut out, number, value);
    out
}

/// A query of a gzipped `JoinRequest`.
fn query(request: &[u8]) -> String {
    let mut zip = GzEncoder::new(Vec::new(), Compression::best());
    zip.write_all(request).unwrap();
    let wrapped = [vec![8, 1], bytes(2, &zip.finish().unwrap())].concat();
    format!(
        "join_request={}",
        URL_SAFE.encode(wrapped).replace('=', "%3D")
    )
}

fn offer(sdp: &str) -> Vec<u8> {
    let description = [bytes(1, b"offer"), bytes(2, sdp.as_bytes())].concat();
    bytes(6, &description)
}

/// Nanoseconds that this thread has run (proc(5), `schedstat`): others on the machine don't make them more, as they do time. The kernel
/// counts in ticks.
fn ran() -> u64 {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    stat.split(' ').next().unwrap().parse().unwrap()
}

/// What a request takes of a processor, on average over some time.
fn cost(query: &str) -> (Duration, Result<(), SignalError>) {
    const ENOUGH: u64 = 100_000_000;
    let policy = Policy {
        mode: Mode::Neural,
        ..lean(RedPolicy::Auto)
    };
    let started = ran();
    let mut runs = 0;
    loop {
        let (mut session, mut env) = session(policy);
        let result = Asked::read(&Request::of(query))
            .and_then(|asked| session.open(&mut env, &asked, None).map(drop));
        runs += 1;
        let took = ran() - started;
        // What costs nothing need not be known exactly.
        if took > ENOUGH || runs > 2000 {
            return (Duration::from_nanos(took) / runs, result);
        }
    }
}

/// So many lines more an offer may have beside its 64 sections.
const LINES: usize = 7_800;

/// As much of `piece` as a request may hold.
fn full(head: &str, piece: impl Fn(usize) -> String) -> String {
    let mut text = head.to_owned();
    for n in 0..LINES {
        let piece = piece(n);
        if text.len() + piece.len() + 100 > MAX_JOIN_REQUEST {
            break;
        }
        text.push_str(&piece);
    }
    text
}

#[test]
fn a_stranger_pays_for_work_by_the_byte() {
    let real = golden("chromium-single")
        .into_iter()
        .find_map(|entry| match entry {
            Entry::Query(value) => Some(value),
            _ => None,
        });
    let real = real.unwrap();
    let (took, result) = cost(&format!("join_request={}", real.replace('=', "%3D")));
    result.unwrap();
    let ordinary = took.as_secs_f64() / read_query(&real).len() as f64;

    let section = |n: usize| format!("m=audio 9 UDP/TLS/RTP/SAVPF 111\r\na=mid:{n}\r\n");
    let nameless = |_| "m=audio 9 UDP/TLS/RTP/SAVPF 111\r\n".to_owned();
    let sections: String = (0..64).map(section).collect();
    let unnamed: String = (0..64).map(nameless).collect();
    let sending = |n: usize| format!("{}a=msid:s t{n}\r\na=sendonly\r\n", section(n));
    let unknown: String = (0..64).map(sending).collect();
    let ids: String = (1..255)
        .map(|n| format!("a=extmap:{n} urn:x\r\n"))
        .collect();
    let track = |n: usize| {
        bytes(
            5,
            &[bytes(1, format!("t{n}").as_bytes()), vec![24, 0]].concat(),
        )
    };
    let fat = |n: usize| {
        bytes(
            5,
            &[bytes(1, &[b'a' + n as u8]), [0x98, 6, 1].repeat(330)].concat(),
        )
    };
    let v0 = "v=0\r\n";
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("m-sections", offer(&format!("{v0}{sections}"))),
        (
            "m-sections without a mid",
            offer(&full(&format!("{v0}{unnamed}"), |_| "a=x\r\n".into())),
        ),
        (
            "header extensions of the session",
            offer(&format!("{v0}{ids}{sections}")),
        ),
        (
            "header extensions of a section",
            offer(&full(&format!("{v0}{sections}"), |n| {
                format!("a=extmap:{} u\r\n", n % 255)
            })),
        ),
        (
            "groups",
            offer(&full(v0, |_| "a=group:BUNDLE x y z\r\n".into())),
        ),
        (
            "groups and m-sections",
            offer(&format!(
                "{v0}{}{sections}",
                "a=group:BUNDLE x y z 1 2 3\r\n".repeat(4000)
            )),
        ),
        (
            "blank lines",
            offer(&full(&format!("{v0}{sections}"), |_| "\n".into())),
        ),
        (
            "payload types",
            offer(&full(&format!("{v0}{sections}"), |n| {
                format!("a=fmtp:{} a=b\r\n", n % 128)
            })),
        ),
        (
            "ssrcs",
            offer(&full(&format!("{v0}{sections}"), |n| {
                format!("a=ssrc:{n} msid:a b\r\n")
            })),
        ),
        (
            "candidates",
            offer(&full(&format!("{v0}{sections}"), |n| {
                format!("a=candidate:{n} 1 udp 1 192.0.2.1 {n} typ host\r\n")
            })),
        ),
        (
            "tracks",
            [
                (0..200).flat_map(track).collect(),
                offer(&format!("{v0}{unknown}")),
            ]
            .concat(),
        ),
        (
            "long tracks",
            [
                (0..16).flat_map(fat).collect(),
                offer(&format!("{v0}{unknown}")),
            ]
            .concat(),
        ),
        ("fields", [0x98, 6, 1].repeat(MAX_JOIN_REQUEST / 3 - 10)),
        (
            "fields of the client",
            bytes(1, &[0x98, 6, 1].repeat(MAX_JOIN_REQUEST / 3 - 10)),
        ),
        (
            "fields of the offer",
            bytes(6, &[0x98, 6, 1].repeat(MAX_JOIN_REQUEST / 3 - 10)),
        ),
        ("zeros", bytes(88, &vec![0; MAX_JOIN_REQUEST - 10])),
        ("a bomb", bytes(88, &vec![0; 64 * MAX_JOIN_REQUEST])),
    ];
    let mut report = String::new();
    let mut worst: f64 = 0.0;
    for (name, request) in cases {
        let text = query(&request);
        if text.len() > 65_000 {
            panic!("{name}: no query is so long");
        }
        let (took, result) = cost(&text);
        let size = request.len().min(MAX_JOIN_REQUEST);
        // A short request's cost is that of what every request is.
        let ratio = took.as_secs_f64() / (ordinary * size.max(read_query(&real).len()) as f64);
        report += &format!("{name}: {size} bytes, {took:?}, {ratio:.2}, {result:?}\n");
        worst = worst.max(ratio);
    }
    eprintln!("{report}");
    assert!(worst < RATIO, "{worst}:\n{report}");
}

#[test]
fn more_than_real_clients_send_to_join_is_refused() {
    let section = "m=audio 9 UDP/TLS/RTP/SAVPF 111\r\n";
    let refused = |request: &[u8]| cost(&query(request)).1.unwrap_err();
    let many = offer(&format!("v=0\r\n{}", section.repeat(65)));
    assert!(matches!(refused(&many), SignalError::Refused(_)));
    // The 66 offers of 512 sections with which three requests held all threads.
    let offers = offer(&format!("v=0\r\n{}", section.repeat(64))).repeat(2);
    assert_eq!(refused(&offers), SignalError::Repeated(6));
    let bomb = bytes(88, &vec![0; MAX_JOIN_REQUEST]);
    assert!(matches!(refused(&bomb), SignalError::TooLong { .. }));
}
