//! Other codecs than Lyra as `make models` makes it: real weights in the form in which integer codes come out of the graph, at another
//! rate and frame.

use std::path::Path;

use auralink_proto::ladder::{CodecId, Frames, Rung};

use super::call::{config, decode, encode, hop_with, payload, port, sound, switch_does_not_click};
use crate::bundle::Bundle;
use crate::codec::{Codec, DecodeTask, EncodeTask, FRAME};
use crate::lyra::Lyra;
use crate::testing::{
    client, codes_bundle, copy_of, environment, heard, level, likeness, lyra_bundle,
    signal_to_noise, speech,
};
use crate::{Decode, Engine, EngineConfig, Job, Outcome};

pub(super) fn codec(folder: &Path) -> Lyra {
    Lyra::new(&environment(), &Bundle::read(folder).unwrap()).unwrap()
}

fn wide() -> EngineConfig {
    EngineConfig {
        lyra: Some(codes_bundle("lyra2-24k")),
        ..config()
    }
}

/// Speech through a codec in groups of `frames`; every tenth group doesn't come.
fn through(codec: &mut Lyra, rung: Rung, frames: usize, pcm: &[f32]) -> (Vec<Vec<u8>>, Vec<f32>) {
    let (mut encoder, mut decoder) = (codec.encoder().unwrap(), codec.decoder().unwrap());
    let (mut payloads, mut got) = (Vec::new(), Vec::new());
    for (k, group) in pcm.chunks_exact(codec.format().frame * frames).enumerate() {
        let mut batch = [EncodeTask::new(&mut encoder, rung, group)];
        codec.encode(&mut batch);
        let [task] = batch;
        task.done.unwrap();
        let came = (k % 10 != 9).then_some(task.payload.as_slice());
        let mut batch = [DecodeTask::new(
            &mut decoder,
            rung.codec(),
            came,
            group.len(),
        )];
        codec.decode(&mut batch);
        let [back] = batch;
        back.done.unwrap();
        got.extend(back.pcm);
        payloads.push(task.payload);
    }
    (payloads, got)
}

#[test]
fn codes_from_the_graph_are_those_of_our_quantizer() {
    let (mut features, mut codes) = (codec(&lyra_bundle()), codec(&codes_bundle("lyra2-codes")));
    assert_eq!(features.format(), codes.format());
    let pcm = speech("talker-b", 8);
    for (rung, bytes) in [(Rung::L1, 8), (Rung::L2, 15)] {
        let (wanted, sound) = through(&mut features, rung, 2, &pcm);
        let (found, other) = through(&mut codes, rung, 2, &pcm);
        assert!(found.iter().all(|payload| payload.len() == 2 * bytes));
        // Two entries may be equally near but for the order in which a sum was rounded; what follows then differs.
        let frames = |payloads: &[Vec<u8>]| -> Vec<Vec<u8>> {
            let frames = payloads.iter().flat_map(|p| p.chunks_exact(bytes));
            frames.map(<[u8]>::to_vec).collect()
        };
        let (wanted, found) = (frames(&wanted), frames(&found));
        let same = wanted.iter().zip(&found).filter(|(a, b)| a == b).count();
        assert!(
            same * 1000 >= wanted.len() * 995,
            "{rung}: {same} of {} frames",
            wanted.len()
        );
        let snr = signal_to_noise(&sound, &other);
        assert!(snr > 30.0, "{rung}: {snr} dB, losses included");
    }
}

#[test]
fn the_same_payloads_decode_to_the_same_sound_in_either_form() {
    let (mut features, mut codes) = (codec(&lyra_bundle()), codec(&codes_bundle("lyra2-codes")));
    let pcm = speech("talker-a", 4);
    let (payloads, _) = through(&mut features, Rung::L2, 1, &pcm);
    let (mut one, mut two) = (features.decoder().unwrap(), codes.decoder().unwrap());
    for (k, payload) in payloads.iter().enumerate() {
        // Of some frames the copy alone came, which is the beginning, and of some nothing.
        let (id, came) = match k % 20 {
            5..8 => (CodecId::Lyra3, Some(&payload[..8])),
            12..15 => (CodecId::Lyra6, None),
            _ => (CodecId::Lyra6, Some(payload.as_slice())),
        };
        let mut batch = [DecodeTask::new(&mut one, id, came, FRAME)];
        features.decode(&mut batch);
        let [wanted] = batch;
        let mut batch = [DecodeTask::new(&mut two, id, came, FRAME)];
        codes.decode(&mut batch);
        let [found] = batch;
        assert_eq!((&wanted.done, &found.done), (&Ok(()), &Ok(())));
        let apart = wanted
            .pcm
            .iter()
            .zip(&found.pcm)
            .map(|(a, b)| (a - b).abs());
        let apart = apart.fold(0.0, f32::max);
        assert!(apart < 1e-3, "frame {k}: {apart}");
    }
}

#[test]
fn a_codec_of_24_khz_and_40_ms_carries_speech() {
    let packets = client("talker-a", 12, 20);
    let said = heard(&packets);
    let lyra = |rung| likeness(&said, &sound(&hop_with(config(), &packets, 2, |_| rung).1));
    for (rung, bytes) in [(Rung::L1, 16), (Rung::L2, 30)] {
        let (coded, restored) = hop_with(wide(), &packets, 2, |_| rung);
        assert!(
            coded.iter().all(|c| c.rung <= rung
                && c.payload.len() == if c.rung == Rung::L1 { 16 } else { bytes }),
            "{rung}: {:?}",
            coded
                .iter()
                .map(|c| (c.rung, c.payload.len()))
                .collect::<Vec<_>>()
        );
        let got = sound(&restored);
        assert_eq!(got.len(), said.len());
        let (like, wanted) = (likeness(&said, &got), lyra(rung));
        assert!(
            like > 0.88 && like > wanted - 0.02,
            "{rung}: {like}, at 16 kHz and 20 ms {wanted}"
        );
        let off = level(&got) - level(&said);
        assert!(off.abs() < 2.0, "{rung}: {off} dB louder");
    }
}

#[test]
fn groups_that_are_no_whole_frames_take_opus() {
    let engine = Engine::start(wide()).unwrap();
    let (port, _) = port(&engine);
    assert_eq!(port.frames(), Frames::new(1920, 16, 30).unwrap());
    for (ms, count, rung) in [
        (20, 2, Rung::L2),
        (20, 1, Rung::L3),
        (20, 3, Rung::L3),
        (40, 1, Rung::L2),
        (60, 1, Rung::L3),
    ] {
        let packets = client("talker-a", 2, ms);
        let groups: Vec<_> = packets.chunks_exact(count).collect();
        // Where somebody speaks.
        let group = groups[groups.len() / 2];
        let coded = encode(&port, 1, Rung::L2, group);
        assert_eq!(
            (coded.rung, coded.codec),
            (rung, rung.codec()),
            "{count} of {ms} ms"
        );
        let restored = decode(&port, payload(&coded, count));
        assert_eq!(restored.packets.len(), count);
    }
    // Payloads that are no whole frames are a stranger's, and nothing against the codec.
    for (count, len) in [(1, 30), (1, 15), (2, 29), (2, 31), (4, 30)] {
        let job = Decode {
            track: 9,
            id: 5,
            codec: CodecId::Lyra6,
            payload: vec![1; len],
            gain: 0,
            unit_ms: 20,
            count,
            lost: false,
        };
        port.try_send(Job::Decode(job)).unwrap();
        let outcome = super::call::next(&port, std::time::Duration::from_secs(10));
        assert_eq!(outcome, Outcome::Failed { track: 9, id: 5 }, "{count}");
    }
    assert_eq!(engine.rungs(), auralink_proto::ladder::Rungs::ALL);
}

#[test]
fn losses_at_40_ms_a_frame_are_concealed_to_the_sample() {
    let engine = Engine::start(wide()).unwrap();
    let (port, _) = port(&engine);
    let packets = client("talker-a", 4, 20);
    let groups: Vec<_> = packets.chunks_exact(2).collect();
    for (k, group) in groups.iter().enumerate() {
        let coded = encode(&port, k as u64, Rung::L2, group);
        decode(&port, payload(&coded, 2));
    }
    let mut levels = Vec::new();
    for (k, count) in [1, 2, 3, 4, 1, 1].into_iter().enumerate() {
        let lost = Decode {
            track: 7,
            id: k as u64,
            codec: CodecId::Lyra6,
            payload: Vec::new(),
            gain: 0,
            unit_ms: 20,
            count,
            lost: true,
        };
        levels.extend(decode(&port, lost).levels);
    }
    assert_eq!(levels.len(), 12);
    assert!(levels[11] > 60, "{levels:?}");
}

#[test]
fn a_switch_to_a_codec_of_24_khz_does_not_click() {
    switch_does_not_click(&wide());
}

#[test]
fn quiet_speech_keeps_its_level_at_24_khz() {
    let quiet: Vec<i16> = speech("talker-a", 8)
        .iter()
        .flat_map(|x| [(x * 0.05 * 32767.0) as i16; 3])
        .collect();
    let packets = crate::testing::packets_of(&quiet, 64_000, 20);
    let said = heard(&packets);
    let (coded, restored) = hop_with(wide(), &packets, 2, |_| Rung::L2);
    assert!(coded.last().unwrap().gain > 10, "{:?}", coded.last());
    let off = level(&sound(&restored)) - level(&said);
    assert!(off.abs() < 2.5, "{off} dB louder");
}

/// The bundle with one line of its manifest changed.
pub(super) fn changed(folder: &Path, from: &str, to: &str) -> tempfile::TempDir {
    let copy = copy_of(folder);
    let path = copy.path().join("manifest.yaml");
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains(from), "{from} is not in {text}");
    std::fs::write(&path, text.replacen(from, to, 1)).unwrap();
    copy
}

#[test]
fn a_gain_is_taken_back_where_the_codec_s_delay_puts_it() {
    let packets = client("talker-a", 8, 20);
    let (coded, _) = hop_with(wide(), &packets, 2, |_| Rung::L2);
    let folder = codes_bundle("lyra2-24k");
    let without = changed(&folder, "delay: 96", "delay: 0");
    // As if each second packet had been 12 dB louder before coding: taken back, it comes out quieter.
    let heard_with = |folder: &Path, gain: i8| {
        let config = EngineConfig {
            lyra: Some(folder.to_owned()),
            ..config()
        };
        let engine = Engine::start(config).unwrap();
        let (port, _) = port(&engine);
        let restored: Vec<_> = coded
            .iter()
            .enumerate()
            .map(|(k, coded)| {
                let gain = if k % 2 == 1 { gain } else { 0 };
                decode(
                    &port,
                    Decode {
                        gain,
                        ..payload(coded, 2)
                    },
                )
            })
            .collect();
        sound(&restored)
    };
    let plain = heard_with(&folder, 0);
    // Milliseconds from such a packet's beginning until it is 6 dB quieter, over all where somebody speaks.
    let turn = |folder: &Path| {
        let stepped = heard_with(folder, 12);
        let energy = |pcm: &[f32]| pcm.iter().map(|x| x * x).sum::<f32>();
        (0..35)
            .find(|ms| {
                let (mut with, mut without) = (0.0, 0.0);
                for start in (2 * FRAME..plain.len() - 2 * FRAME).step_by(4 * FRAME) {
                    let here = start + ms * 16..start + (ms + 1) * 16;
                    with += energy(&stepped[here.clone()]);
                    without += energy(&plain[here]);
                }
                with < 0.25 * without
            })
            .unwrap()
    };
    let (right, early) = (turn(&folder), turn(without.path()));
    assert!(
        (3..=5).contains(&(right as i32 - early as i32)),
        "{right} ms, without the delay {early} ms: 4 ms apart"
    );
}

#[test]
fn a_bundle_of_another_shape_may_take_the_place_of_one_in_a_call() {
    let folder = copy_of(&lyra_bundle());
    let engine = Engine::start(EngineConfig {
        lyra: Some(folder.path().to_owned()),
        ..config()
    })
    .unwrap();
    let (port, _) = port(&engine);
    let packets = client("talker-a", 8, 20);
    let said = heard(&packets);
    let groups: Vec<_> = packets.chunks_exact(2).collect();
    let mut restored = Vec::new();
    let mut last = None;
    for (k, group) in groups.iter().enumerate() {
        if k == groups.len() / 2 {
            let next = codes_bundle("lyra2-24k");
            for entry in std::fs::read_dir(&next).unwrap() {
                let entry = entry.unwrap();
                std::fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
            }
            engine.reload();
            let wanted = Frames::new(1920, 16, 30).unwrap();
            let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
            while port.frames() != wanted || port.models().is_none() {
                assert!(std::time::Instant::now() < end, "{:?}", engine.status());
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            // Two frames of the old one happen to be as long as one of the new one, so a byte is taken off.
            let mut old: Decode = last.take().unwrap();
            old.payload.pop();
            port.try_send(Job::Decode(old)).unwrap();
            let outcome = super::call::next(&port, std::time::Duration::from_secs(10));
            assert!(matches!(outcome, Outcome::Failed { .. }), "{outcome:?}");
        }
        let coded = encode(&port, k as u64, Rung::L2, group);
        assert!(coded.rung <= Rung::L2, "{:?}", coded.rung);
        last = Some(payload(&coded, 2));
        restored.push(decode(&port, payload(&coded, 2)));
    }
    let got = sound(&restored);
    assert_eq!(got.len(), said.len());
    let half = got.len() / 2;
    for (said, got) in [(&said[..half], &got[..half]), (&said[half..], &got[half..])] {
        let like = likeness(said, got);
        assert!(like > 0.88, "{like}");
    }
}
