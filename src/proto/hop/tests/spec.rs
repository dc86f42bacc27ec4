//! The tables of docs/protocol.md.

use super::*;
use crate::aic::payload::{Body, Part, Payload, Redundant, Short};
use crate::aic::tests::{bytes, vectors};

/// The fields of a row: `Codec, name value, …`.
fn part(text: &str) -> (Part<Vec<u8>>, Option<(u8, u32)>) {
    let field = |name: &str| {
        text.split(", ")
            .find_map(|field| field.strip_prefix(name)?.strip_prefix(' '))
    };
    let number = |name: &str| field(name).map(|value| value.parse::<i64>().unwrap());
    let wanted = |name: &str| number(name).unwrap_or_else(|| panic!("no {name} in {text}"));
    let media = field("media").unwrap();
    let media: Vec<u8> = (0..media.len() / 2)
        .map(|at| u8::from_str_radix(&media[2 * at..2 * at + 2], 16).unwrap())
        .collect();
    let codec = match text.split(',').next().unwrap() {
        "Lyra3" => Some(CodecId::Lyra3),
        "Lyra6" => Some(CodecId::Lyra6),
        "Opus" => Some(CodecId::Opus),
        "Native" | "Trimmed" => None,
        other => panic!("{other}"),
    };
    let body = match codec {
        Some(codec) => Body::Coded {
            codec,
            unit_ms: u8::try_from(wanted("unit")).unwrap(),
            gain: i8::try_from(wanted("gain")).unwrap(),
            payload: media,
        },
        None => Body::Native {
            payload_type: u8::try_from(wanted("pt")).unwrap(),
            marker: wanted("marker") == 1,
            trimmed_from: number("length").map(|length| u16::try_from(length).unwrap()),
            payload: media,
        },
    };
    let part = Part {
        sequence: u16::try_from(wanted("sequence")).unwrap(),
        packets: number("n").map_or(1, |n| u8::try_from(n).unwrap()),
        red: wanted("W") == 1,
        body,
    };
    let distance = number("packets").map(|packets| {
        let ticks = u32::try_from(wanted("ticks")).unwrap();
        (u8::try_from(packets).unwrap(), ticks)
    });
    (part, distance)
}

#[test]
fn its_payloads_are_read_and_written() {
    let rows = vectors("framed payload");
    assert!(rows.len() >= 10);
    for row in rows {
        let (own, copy) = match row[0].split_once(", copy ") {
            Some((own, copy)) => (own, Some(copy)),
            None => (&row[0][..], None),
        };
        let (own, _) = part(own);
        let copy = copy.map(|copy| {
            let (part, distance) = part(copy);
            let (hop_distance, ticks_back) = distance.unwrap();
            Redundant {
                hop_distance,
                ticks_back,
                part,
            }
        });
        let mut written = Vec::new();
        own.write(copy.as_ref(), Frames::LYRA, &mut written)
            .unwrap();
        assert_eq!(written, bytes(&row[1]), "{}", row[0]);
        let read = Payload::parse(&written, Frames::LYRA).unwrap();
        assert_eq!(read.part.to_owned(), own);
        let read = read.redundant.unwrap_or(Redundant {
            hop_distance: 0,
            ticks_back: 0,
            part: read.part,
        });
        if let Some(copy) = copy {
            assert_eq!(read.part.to_owned(), copy.part);
            assert_eq!(
                (read.hop_distance, read.ticks_back),
                (copy.hop_distance, copy.ticks_back)
            );
        }
    }
}

#[test]
fn its_short_payloads_are_read_and_written() {
    use crate::hop::run::Anchors;
    let mut read = 0;
    for row in vectors("short payload") {
        let lyra = row[0].contains("after Lyra6");
        let whole = if lyra {
            [&[0x34, 1, 0, 3][..], &[7; 30]].concat()
        } else {
            vec![0x46, 1, 0, 0x1f, 0x50, 0xaa]
        };
        let mut anchors = Anchors::default();
        let first = (1000, 960_000);
        anchors.read(first, &whole, Frames::LYRA).unwrap();
        let (position, said) = row[0].split_once(": ").unwrap();
        let number = |name: &str| {
            let found = position
                .split(", ")
                .find_map(|part| part.strip_prefix(name));
            found.unwrap().trim().parse::<u32>().unwrap()
        };
        let position = (
            u16::try_from(number("packet")).unwrap(),
            number("timestamp"),
        );
        let payload = bytes(&row[1]);
        let result = anchors.read(position, &payload, Frames::LYRA);
        if row[0].starts_with("none") {
            assert!(result.is_err(), "{}", row[0]);
            continue;
        }
        let (expected, _) = part(said);
        assert_eq!(result.unwrap().part.to_owned(), expected, "{}", row[0]);
        let (short, _) = Short::parse(&payload).unwrap().unwrap();
        let mut written = Vec::new();
        short.write(&expected, &mut written);
        assert_eq!(written, payload, "{}", row[0]);
        read += 1;
    }
    assert!(read >= 3);
}

#[test]
fn what_it_calls_no_payload_is_none() {
    for row in vectors("no payload") {
        assert!(
            Payload::parse(&bytes(&row[1]), Frames::LYRA).is_err(),
            "{}",
            row[0]
        );
    }
}

#[test]
fn its_report_is_read_and_written() {
    use crate::hop::report::{self, Report};
    for row in vectors("report") {
        let value = |name: &str| {
            let found = row[0].split(", ").find_map(|part| part.strip_prefix(name));
            found.unwrap().trim().to_owned()
        };
        let number = |name: &str| value(name).parse::<u32>().unwrap();
        let small = |name: &str| u8::try_from(number(name)).unwrap();
        let rungs = value("rungs")
            .split_whitespace()
            .map(|number| Rung::new(number.parse().unwrap()).unwrap())
            .fold(Rungs::NONE, Rungs::with);
        let report = Report {
            ssrc: number("stream"),
            fraction_lost: small("lost"),
            fraction_missing: small("missing"),
            rungs,
            highest: u16::try_from(number("highest")).unwrap(),
            jitter: number("jitter"),
            ratio: small("ratio"),
            unrestored: u16::try_from(number("unrestored")).unwrap(),
        };
        let mut out = Vec::new();
        report::write(number("writer"), &[report], &mut out);
        assert_eq!(out, bytes(&row[1]), "{}", row[0]);
        let mut read = None;
        report::read(&out, |report| read = Some(report));
        assert_eq!(read, Some(report));
    }
}

fn hex(bytes: &[u8]) -> String {
    let bytes: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    bytes.join(" ")
}

#[test]
fn its_packets_go_over_the_hop_and_back() {
    let rows = vectors("packet of the example");
    let packet = |name: &str| {
        let row = rows.iter().find(|row| row[0].starts_with(name));
        bytes(&row.unwrap_or_else(|| panic!("no {name}"))[1])
    };
    let clock = Clock::new();
    let mut packer = packer(Rung::L2);
    packer.take(clock.at(0), &packet("original 1"), 100);
    packer.take(clock.at(20), &packet("original 2"), 100);
    let job = packer.poll_job().unwrap();
    let mut encoded = lyra6(&job);
    encoded.payload = [[0xaa; 15], [0xbb; 15]].concat();
    packer.encoded(clock.at(21), job.id, encoded);
    let mut out = Vec::new();
    packer.poll_packet(0x7e80_8000, &mut out).unwrap();
    assert_eq!(hex(&out), hex(&packet("framed")));

    let mut restorer = restorer();
    restorer.take(clock.at(30), 0, &out, out.len());
    let job = restorer.poll_job().unwrap();
    assert_eq!((job.gain, job.count), (3, 2));
    let mut decoded = opus(&job);
    decoded.packets[1] = vec![0x48, 2];
    restorer.decoded(clock.at(31), job.id, decoded);
    for name in ["restored 1", "restored 2"] {
        restorer.poll_packet(&mut out).unwrap();
        assert_eq!(hex(&out), hex(&packet(name)), "{name}");
    }
}
