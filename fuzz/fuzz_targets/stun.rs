//! STUN on both legs: whatever comes, and the same attributes with a valid MESSAGE-INTEGRITY, as a
//! hostile but authentic peer would send them.
#![cfg_attr(fuzzing, no_main)]

use auralink_fuzz::fuzz_target;
use auralink_proto::description::{Creds, LegDescription};
use auralink_proto::ice::FullAgent;
use auralink_proto::stun::{Checked, LiteAgent, Path, addressed_ufrag};
use is::Sha1HmacProvider;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

static START: LazyLock<Instant> = LazyLock::new(Instant::now);

fn creds(n: u8) -> Creds {
    Creds {
        ufrag: format!("ufrag{n}"),
        pwd: format!("password-password-pass{n}"),
    }
}

/// Appends a MESSAGE-INTEGRITY (RFC 5389 section 15.4) that is right for `pwd`.
fn sign(message: &mut Vec<u8>, pwd: &str) {
    let body = u16::try_from(message.len() - 20 + 24).unwrap_or(u16::MAX);
    message[2..4].copy_from_slice(&body.to_be_bytes());
    let digest = is::DefaultSha1HmacProvider.sha1_hmac(pwd.as_bytes(), &[message.as_slice()]);
    message.extend([0, 8, 0, 20]);
    message.extend(digest);
}

fuzz_target!(|data: &[u8]| {
    let now = *START;
    let path = Path {
        local: ([127, 0, 0, 1], 7982).into(),
        remote: ([127, 0, 0, 1], 5000).into(),
        tcp: false,
    };
    let mut lite = LiteAgent::default();
    lite.set_local(&creds(1));
    lite.set_remote(&creds(2));
    let mut full = FullAgent::new(
        now,
        Duration::from_secs(30),
        vec![path.local],
        &LegDescription {
            local: creds(1),
            remote: Some(creds(2)),
            fingerprints: Vec::new(),
            dtls: None,
            remote_candidates: Vec::new(),
            remote_lite: false,
            controlling: data.first().is_some_and(|b| b & 1 == 0),
            short_tags: false,
            aic_pts: (None, None),
        },
    );
    let mut out = Vec::new();
    let _ = addressed_ufrag(data);
    // The fuzzer knows neither password; SHA-1 keeps it out.
    assert_eq!(lite.handle(now, path, data, &mut out), Checked::Ignored);
    assert!(!full.handle(now, path, data));
    assert!(!full.knows(&path));

    let Some((kind, attributes)) = data.split_first() else {
        return;
    };
    // Request, success or error response, with the fuzzer's attributes before the integrity.
    let kind = [[0, 1], [1, 1], [1, 0x11], [0, 0x11]][usize::from(kind & 3)];
    let mut message = kind.to_vec();
    message.extend([0, 0, 0x21, 0x12, 0xa4, 0x42]);
    message.extend([7; 12]);
    message.extend([0, 6, 0, 11]);
    message.extend(b"ufrag1:peer\0");
    message.extend(&attributes[..attributes.len().min(1200) & !3]);
    sign(&mut message, &creds(1).pwd);
    let _ = addressed_ufrag(&message);
    lite.handle(now, path, &message, &mut out);
    full.handle(now, path, &message);
    full.handle_timeout(now);
    while full.poll_transmit().is_some() {}
    while full.poll_event().is_some() {}
});
