#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod properties;

use super::*;
use crate::description::HostCandidate;

const AIC: &str = "urn:auralink:params:rtp-hdrext:aic-hint:1";

/// As Chromium re-offers, shortened.
const OFFER: &str = "v=0\r
o=- 344437692306311129 3 IN IP4 127.0.0.1\r
s=-\r
t=0 0\r
a=extmap-allow-mixed\r
a=msid-semantic:  WMS\r
a=group:BUNDLE 0 1 2\r
m=audio 40404 UDP/TLS/RTP/SAVPF 111 63 9\r
c=IN IP4 192.0.2.2\r
b=AS:64\r
a=rtpmap:111 opus/48000/2\r
a=rtpmap:63 red/48000/2\r
a=rtpmap:9 G722/8000\r
a=fmtp:111 minptime=10;useinbandfec=1\r
a=fmtp:63 111/111\r
a=rtcp:40405 IN IP4 192.0.2.2\r
a=rtcp-fb:111 transport-cc\r
a=extmap:1 urn:ietf:params:rtp-hdrext:ssrc-audio-level\r
a=extmap:4 urn:ietf:params:rtp-hdrext:sdes:mid\r
a=setup:actpass\r
a=mid:0\r
a=sendonly\r
a=msid:- 6773ccca\r
a=ice-ufrag:4ekN\r
a=ice-pwd:CkBy43fOSq1EfHQS1gpYMUx9\r
a=fingerprint:sha-256 DF:01:07\r
a=candidate:668589064 1 udp 2122194687 192.0.2.2 40404 typ host generation 0\r
a=candidate:3971948008 1 udp 2122265343 fd00::2 34106 typ host generation 0\r
a=ice-options:trickle goog-sped-v1 renomination\r
a=rtcp-mux\r
a=ssrc:3754189370 cname:V2wG\r
a=ssrc:3754189370 msid:- 6773ccca\r
m=video 9 UDP/TLS/RTP/SAVPF 96 97 98 99\r
c=IN IP4 0.0.0.0\r
a=rtcp:9 IN IP4 0.0.0.0\r
a=ice-ufrag:4ekN\r
a=ice-pwd:CkBy43fOSq1EfHQS1gpYMUx9\r
a=ice-options:goog-sped-v1\r
a=fingerprint:sha-256 DF:01:07\r
a=setup:actpass\r
a=mid:1\r
a=extmap:2/sendonly http://www.webrtc.org/experiments/rtp-hdrext/abs-send-time\r
a=inactive\r
a=rtpmap:96 VP8/90000\r
a=rtpmap:97 rtx/90000\r
a=fmtp:97 apt=96\r
a=rtpmap:98 red/90000\r
a=rtpmap:99 rtx/90000\r
a=fmtp:99 apt=98\r
a=rid:q send\r
a=rid:h send\r
a=simulcast:send q;h\r
a=ssrc-group:FID 11 12\r
a=ssrc:11 cname:V2wG\r
a=ssrc:12 cname:V2wG\r
m=application 0 UDP/DTLS/SCTP webrtc-datachannel\r
c=IN IP4 0.0.0.0\r
a=mid:2\r
a=sctp-port:5000\r
a=sctp-init:AQAAHvQg5EUAUAAA\r
";

fn edit() -> Edit {
    Edit {
        creds: Creds {
            ufrag: "ours".to_owned(),
            pwd: "0123456789012345678901".to_owned(),
        },
        fingerprint: "sha-256 AA:BB".to_owned(),
        candidates: vec![
            HostCandidate {
                addr: "203.0.113.9:7982".parse().unwrap(),
                tcp: false,
            },
            HostCandidate {
                addr: "[2001:db8::9]:7982".parse().unwrap(),
                tcp: false,
            },
            HostCandidate {
                addr: "203.0.113.9:7981".parse().unwrap(),
                tcp: true,
            },
        ],
        ice_lite: true,
        setup: Some(Setup::Passive),
        extmaps: Vec::new(),
        aic: Vec::new(),
        strip_extmap_uri: None,
        strip_extmap_id: None,
        media: Vec::new(),
    }
}

fn run(text: &str, edit: &Edit) -> String {
    rewrite(&Sdp::parse(text).unwrap(), edit)
}

/// Lines that one text has and the other has not, as in a diff.
fn diff(old: &str, new: &str) -> (Vec<String>, Vec<String>) {
    let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
    let mut gone = lines(old);
    let mut added = Vec::new();
    for line in lines(new) {
        match gone.iter().position(|old| *old == line) {
            Some(place) => drop(gone.remove(place)),
            None => added.push(line),
        }
    }
    (gone, added)
}

#[test]
fn an_offer_is_read() {
    let sdp = Sdp::parse(OFFER).unwrap();
    let creds = sdp.creds().unwrap();
    assert_eq!(creds.ufrag, "4ekN");
    assert_eq!(creds.pwd, "CkBy43fOSq1EfHQS1gpYMUx9");
    let fingerprint = sdp.fingerprints().remove(0);
    assert_eq!(fingerprint.algorithm, "sha-256");
    assert_eq!(fingerprint.digest, [0xDF, 0x01, 0x07]);
    assert_eq!(sdp.setup(), Some(Setup::Actpass));
    assert!(!sdp.ice_lite());
    assert!(sdp.allows_mixed_extmaps());
    assert_eq!(sdp.candidates().len(), 2);
    assert_eq!(
        sdp.candidates()[0],
        "candidate:668589064 1 udp 2122194687 192.0.2.2 40404 typ host generation 0"
    );
    assert_eq!(sdp.bundles(), [["0", "1", "2"]]);

    let [audio, video, data] = sdp.media() else {
        panic!("three m-sections")
    };
    assert_eq!(audio.kind, MediaKind::Audio);
    assert_eq!((audio.mid.as_str(), audio.port), ("0", 40404));
    assert_eq!(audio.direction, Direction::SendOnly);
    assert_eq!(audio.ssrcs, [3_754_189_370]);
    assert_eq!(audio.msid, Some(("-".to_owned(), "6773ccca".to_owned())));
    let pts: Vec<u8> = audio.codecs.iter().map(|c| c.pt).collect();
    assert_eq!(pts, [111, 63, 9]);
    let opus = audio.codec("OPUS").unwrap();
    assert_eq!((opus.clock, opus.channels), (48_000, 2));
    assert_eq!(opus.fmtp_value("useinbandfec"), Some("1"));
    assert_eq!(audio.codec("g722").unwrap().channels, 1);
    assert_eq!(
        audio.extmap_id("urn:ietf:params:rtp-hdrext:sdes:mid"),
        Some(4)
    );

    assert_eq!(video.kind, MediaKind::Video);
    assert_eq!(video.direction, Direction::Inactive);
    assert_eq!(video.ssrcs, [11, 12]);
    assert_eq!(video.ssrc_groups, [("FID".to_owned(), vec![11, 12])]);
    assert_eq!(video.send_rids, ["q", "h"]);
    assert_eq!(video.extmaps[0].0, 2);
    assert!(!video.rejected);
    assert_eq!(data.kind, MediaKind::Other);
    assert!(data.rejected);
}

#[test]
fn credentials_of_the_session_come_first_and_need_both_halves() {
    let text = "v=0\r\na=ice-ufrag:s\r\nm=audio 9 RTP/AVP 0\r\na=ice-ufrag:a\r\na=ice-pwd:b\r\n";
    let creds = Sdp::parse(text).unwrap().creds().unwrap();
    assert_eq!((creds.ufrag.as_str(), creds.pwd.as_str()), ("a", "b"));
}

#[test]
fn transport_lines_change_and_nothing_else() {
    let new = run(OFFER, &edit());
    let (gone, added) = diff(OFFER, &new);
    let mut expected_gone = vec![
        "m=audio 40404 UDP/TLS/RTP/SAVPF 111 63 9",
        "c=IN IP4 192.0.2.2",
        "a=rtcp:40405 IN IP4 192.0.2.2",
        "a=setup:actpass",
        "a=ice-ufrag:4ekN",
        "a=ice-pwd:CkBy43fOSq1EfHQS1gpYMUx9",
        "a=fingerprint:sha-256 DF:01:07",
        "a=candidate:668589064 1 udp 2122194687 192.0.2.2 40404 typ host generation 0",
        "a=candidate:3971948008 1 udp 2122265343 fd00::2 34106 typ host generation 0",
        "a=ice-options:trickle goog-sped-v1 renomination",
    ];
    expected_gone.extend([
        "a=ice-ufrag:4ekN",
        "a=ice-pwd:CkBy43fOSq1EfHQS1gpYMUx9",
        "a=ice-options:goog-sped-v1",
        "a=fingerprint:sha-256 DF:01:07",
        "a=setup:actpass",
        "a=sctp-init:AQAAHvQg5EUAUAAA",
    ]);
    assert_eq!(gone, expected_gone);
    let expected_added = [
        "a=ice-lite",
        "m=audio 7982 UDP/TLS/RTP/SAVPF 111 63 9",
        "c=IN IP4 203.0.113.9",
        "a=setup:passive",
        "a=ice-ufrag:ours",
        "a=ice-pwd:0123456789012345678901",
        "a=fingerprint:sha-256 AA:BB",
        "a=ice-options:trickle",
        "a=candidate:1 1 udp 2130706431 203.0.113.9 7982 typ host",
        "a=candidate:2 1 udp 2130706175 2001:db8::9 7982 typ host",
        "a=candidate:3 1 tcp 1671429631 203.0.113.9 7981 typ host tcptype passive",
        "a=end-of-candidates",
        "a=rtcp:9 IN IP4 0.0.0.0",
        "a=ice-ufrag:ours",
        "a=ice-pwd:0123456789012345678901",
        "a=fingerprint:sha-256 AA:BB",
        "a=setup:passive",
    ];
    assert_eq!(added, expected_added);
    assert!(new.ends_with("\r\n"));
    assert_eq!(run(&new, &edit()), new, "a second edit changes nothing");
}

#[test]
fn line_endings_and_an_open_end_are_kept() {
    let text = "v=0\no=- 1 1 IN IP4 0.0.0.0\nm=audio 9 RTP/AVP 0\nc=IN IP4 0.0.0.0\na=mid:x";
    let new = run(text, &edit());
    assert!(!new.contains('\r'));
    assert!(new.ends_with("\na=end-of-candidates"));
    let none = Edit {
        candidates: Vec::new(),
        ice_lite: false,
        ..edit()
    };
    assert_eq!(run(text, &none), text);
    assert_eq!(run("v=0", &none), "v=0");
    assert_eq!(run("v=0", &edit()), "v=0\r\na=ice-lite");
    // Blank lines at the end stay at the end.
    let blank = "v=0\r\nm=audio 9 RTP/AVP 0\r\n\r\n";
    assert!(run(blank, &edit()).ends_with("a=end-of-candidates\r\n\r\n"));
}

#[test]
fn candidates_go_where_stacks_read_them() {
    let sections = |group: &str, ports: [u16; 3]| {
        let [a, b, c] = ports;
        format!(
            "v=0\r\n{group}m=audio {a} X 0\r\na=mid:a\r\nm=audio {b} X 0\r\na=mid:b\r\nm=audio {c} X 0\r\na=mid:c\r\n"
        )
    };
    let carriers = |text: &str| {
        let new = run(text, &edit());
        let sdp = Sdp::parse(&new).unwrap();
        (0..3)
            .filter(|i| {
                sdp.section(*i)
                    .iter()
                    .any(|l| l.text == "a=end-of-candidates")
            })
            .collect::<Vec<_>>()
    };
    // The first of the group, wherever it stands.
    assert_eq!(
        carriers(&sections("a=group:BUNDLE b a c\r\n", [9, 9, 9])),
        [1]
    );
    // An unbundled m-section has a transport of its own.
    assert_eq!(
        carriers(&sections("a=group:BUNDLE a b\r\n", [9, 9, 9])),
        [0, 2]
    );
    // A rejected one has none.
    assert_eq!(
        carriers(&sections("a=group:BUNDLE a b c\r\n", [0, 9, 9])),
        [1]
    );
    assert_eq!(carriers(&sections("", [9, 0, 9])), [0, 2]);
    let new = run(&sections("", [9, 0, 9]), &edit());
    assert!(new.contains("m=audio 0 X 0"), "a rejected one stays so");
}

#[test]
fn addresses_never_pass() {
    let text = "v=0\r\nc=IN IP6 2001:db8::1\r\na=candidate:1 1 udp 1 192.0.2.1 1 typ host\r\n\
        m=audio 5000/2 X 0\r\nc=IN IP4 host.local\r\na=remote-candidates:1 192.0.2.1 5\r\na=rtcp:5001\r\n\
        a=end-of-candidates\r\nm=audio 0 X 0\r\nc=IN IP6 ::\r\n";
    let none = Edit {
        candidates: Vec::new(),
        ice_lite: false,
        ..edit()
    };
    assert_eq!(
        run(text, &none),
        "v=0\r\nc=IN IP4 0.0.0.0\r\nm=audio 9 X 0\r\nc=IN IP4 0.0.0.0\r\na=rtcp:9\r\n\
         m=audio 0 X 0\r\nc=IN IP6 ::\r\n"
    );
    let v6 = Edit {
        candidates: vec![HostCandidate {
            addr: "[2001:db8::9]:7982".parse().unwrap(),
            tcp: false,
        }],
        ..none
    };
    let new = run(text, &v6);
    assert!(new.contains("m=audio 7982 X 0\r\nc=IN IP6 2001:db8::9\r\n"));
}

#[test]
fn ice_lite_and_setup_follow_the_edit() {
    let lite =
        "v=0\r\na=ice-lite\r\na=ice-lite\r\nm=audio 9 X 0\r\na=setup:actpass\r\na=ice-lite\r\n";
    let keep = Edit {
        candidates: Vec::new(),
        setup: None,
        ..edit()
    };
    assert_eq!(
        run(lite, &keep),
        "v=0\r\na=ice-lite\r\nm=audio 9 X 0\r\na=setup:actpass\r\n"
    );
    let strip = Edit {
        ice_lite: false,
        ..keep
    };
    assert_eq!(
        run(lite, &strip),
        "v=0\r\nm=audio 9 X 0\r\na=setup:actpass\r\n"
    );
}

#[test]
fn fingerprints_are_replaced_where_they_stand() {
    let text = "v=0\r\na=fingerprint:sha-1 01\r\na=fingerprint:SHA-256 02\r\n\
        m=audio 9 X 0\r\nm=audio 9 X 0\r\na=fingerprint:sha-256 03\r\na=tls-id:x\r\na=identity:abc\r\n";
    let none = Edit {
        candidates: Vec::new(),
        ice_lite: false,
        ..edit()
    };
    assert_eq!(
        run(text, &none),
        "v=0\r\na=fingerprint:sha-256 AA:BB\r\nm=audio 9 X 0\r\nm=audio 9 X 0\r\n\
         a=fingerprint:sha-256 AA:BB\r\na=tls-id:x\r\n"
    );
    assert_eq!(
        Sdp::parse(text).unwrap().fingerprints()[0].algorithm,
        "sha-1"
    );
}

#[test]
fn red_leaves_with_all_that_belongs_to_it() {
    let steered = Edit {
        media: ["0", "1"]
            .map(|mid| MediaSteer {
                mid: mid.to_owned(),
                remove_red: true,
                ..MediaSteer::default()
            })
            .to_vec(),
        ..edit()
    };
    let new = run(OFFER, &steered);
    assert!(new.contains("m=audio 7982 UDP/TLS/RTP/SAVPF 111 9\r\n"));
    assert!(new.contains("m=video 9 UDP/TLS/RTP/SAVPF 96 97\r\n"));
    assert!(!new.contains("red/") && !new.contains("a=fmtp:63") && !new.contains("apt=98"));
    assert!(new.contains("a=fmtp:97 apt=96"));

    let only = "v=0\r\nm=audio 9 X 63\r\na=rtpmap:63 red/48000/2\r\na=mid:0\r\n";
    let steered = Edit {
        candidates: Vec::new(),
        ice_lite: false,
        ..steered
    };
    assert_eq!(run(only, &steered), only, "an m= line needs a format");
}

#[test]
fn opus_is_steered() {
    let pairs = |list: &[(&str, &str)]| {
        list.iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect::<Vec<_>>()
    };
    let steered = Edit {
        media: vec![MediaSteer {
            mid: "0".to_owned(),
            fmtp: vec![
                (
                    111,
                    pairs(&[("maxaveragebitrate", "12000"), ("UseInbandFec", "0")]),
                ),
                (9, pairs(&[("x", "1")])),
                (77, pairs(&[("nobody", "1")])),
            ],
            ptime: Some(40),
            maxptime: Some(60),
            tias: Some(12_000),
            ..MediaSteer::default()
        }],
        ..edit()
    };
    let new = run(OFFER, &steered);
    let plain = run(OFFER, &edit());
    let (gone, added) = diff(&plain, &new);
    assert_eq!(gone, ["b=AS:64", "a=fmtp:111 minptime=10;useinbandfec=1"]);
    assert_eq!(
        added,
        [
            "b=TIAS:12000",
            "a=fmtp:9 x=1",
            "a=fmtp:111 minptime=10;useinbandfec=0;maxaveragebitrate=12000",
            "a=ptime:40",
            "a=maxptime:60",
        ]
    );
    assert!(new.contains("c=IN IP4 203.0.113.9\r\nb=TIAS:12000\r\na=rtpmap:111"));
    assert!(new.contains("a=rtpmap:9 G722/8000\r\na=fmtp:9 x=1\r\n"));
    assert_eq!(run(&new, &steered), new);

    // A second steering replaces the first.
    let again = Edit {
        media: vec![MediaSteer {
            mid: "0".to_owned(),
            ptime: Some(20),
            tias: Some(9_000),
            ..MediaSteer::default()
        }],
        ..edit()
    };
    let newer = run(&new, &again);
    assert!(newer.contains("b=TIAS:9000") && !newer.contains("TIAS:12000"));
    assert!(newer.contains("a=ptime:20") && newer.contains("a=maxptime:60"));
}

#[test]
fn bandwidth_stands_behind_i_and_m_where_there_is_no_c() {
    let steered = Edit {
        candidates: Vec::new(),
        ice_lite: false,
        media: vec![MediaSteer {
            mid: "0".to_owned(),
            tias: Some(1),
            ..MediaSteer::default()
        }],
        ..edit()
    };
    assert_eq!(
        run(
            "v=0\r\nm=audio 9 X 0\r\ni=title\r\nb=CT:9\r\na=mid:0\r\n",
            &steered
        ),
        "v=0\r\nm=audio 9 X 0\r\ni=title\r\nb=TIAS:1\r\nb=CT:9\r\na=mid:0\r\n"
    );
    assert_eq!(
        run("v=0\r\nm=audio 9 X 0\r\na=mid:0\r\n", &steered),
        "v=0\r\nm=audio 9 X 0\r\nb=TIAS:1\r\na=mid:0\r\n"
    );
    // Rejected m-sections are left alone.
    let rejected = "v=0\r\nm=audio 0 X 0\r\na=mid:0\r\n";
    assert_eq!(run(rejected, &steered), rejected);
}

#[test]
fn free_ids_are_free_everywhere() {
    let sdp = Sdp::parse(OFFER).unwrap();
    let free = free_extmap_ids(&sdp, 2);
    assert_eq!(free.ids, [3, 5]);
    assert!(!free.two_byte && free.allow_mixed);

    let mut full = String::from("v=0\r\nm=video 9 X 96\r\na=mid:0\r\n");
    for id in 1..=14 {
        full.push_str(&format!("a=extmap:{id} urn:{id}\r\n"));
    }
    let sdp = Sdp::parse(&full).unwrap();
    let free = free_extmap_ids(&sdp, 1);
    assert_eq!(free.ids, [16], "15 is reserved");
    assert!(free.two_byte && !free.allow_mixed);

    let added = Edit {
        extmaps: vec![("0".to_owned(), 16, AIC.to_owned())],
        candidates: Vec::new(),
        ice_lite: false,
        ..edit()
    };
    let new = run(&full, &added);
    assert!(new.starts_with("v=0\r\na=extmap-allow-mixed\r\nm=video"));
    assert!(new.ends_with(
        "a=extmap:14 urn:14\r\na=extmap:16 urn:auralink:params:rtp-hdrext:aic-hint:1\r\n"
    ));
    assert_eq!(run(&new, &added), new);
    assert_eq!(
        Sdp::parse(&new).unwrap().media()[0].extmap_id(AIC),
        Some(16)
    );

    let stripped = Edit {
        extmaps: Vec::new(),
        aic: Vec::new(),
        strip_extmap_uri: Some(AIC),
        strip_extmap_id: None,
        ..added
    };
    assert_eq!(
        run(&new, &stripped),
        full.replace("v=0\r\n", "v=0\r\na=extmap-allow-mixed\r\n")
    );
}

#[test]
fn an_extension_is_added_where_there_was_none_and_moves_when_its_id_changes() {
    let with = |id| Edit {
        extmaps: vec![("0".to_owned(), id, AIC.to_owned())],
        candidates: Vec::new(),
        ice_lite: false,
        ..edit()
    };
    let text = "v=0\r\nm=audio 9 X 0\r\na=mid:0\r\na=sendrecv\r\nm=audio 9 X 0\r\na=mid:1\r\n";
    let new = run(text, &with(5));
    assert_eq!(
        new,
        text.replace("a=mid:0\r\n", &format!("a=mid:0\r\na=extmap:5 {AIC}\r\n"))
    );
    assert_eq!(
        run(&new, &with(6)),
        text.replace("a=mid:0\r\n", &format!("a=mid:0\r\na=extmap:6 {AIC}\r\n"))
    );
    // Somebody else's id is not taken from them.
    let taken = text.replace("a=mid:0\r\n", "a=mid:0\r\na=extmap:5 urn:other\r\n");
    assert_eq!(run(&taken, &with(5)), taken);
}

#[test]
fn what_is_no_sdp_is_refused() {
    assert_eq!(Sdp::parse("").unwrap_err(), SdpError::NotSdp);
    assert_eq!(Sdp::parse("m=audio").unwrap_err(), SdpError::NotSdp);
    for bad in [
        "m=",
        "m=audio",
        "m=audio 9",
        "m=audio 70000 X 0",
        "m=audio -1 X 0",
    ] {
        assert_eq!(
            Sdp::parse(&format!("v=0\r\ns=-\r\n{bad}\r\n")).unwrap_err(),
            SdpError::BadMedia { line: 3 },
            "{bad}"
        );
    }
    let many = format!("v=0\r\n{}", "m=audio 9 X 0\r\n".repeat(MAX_MEDIA + 1));
    assert_eq!(Sdp::parse(&many).unwrap_err(), SdpError::TooManyMedia);
    let long = format!("v=0\r\n{}", "a".repeat(MAX_SDP));
    assert_eq!(
        Sdp::parse(&long).unwrap_err(),
        SdpError::TooLong(MAX_SDP + 5)
    );
}
