//! Graphs that take several frames of a stream in one run.

use auralink_proto::ladder::{CodecId, Rung};

use crate::bundle::Bundle;
use crate::codec::{Codec, DecodeTask, EncodeTask, FRAME};
use crate::lyra::Lyra;
use crate::testing::{copy_of, environment, likeness, lyra_bundle, speech};

fn codec_of(folder: &std::path::Path) -> Result<Lyra, String> {
    Lyra::new(&environment(), &Bundle::read(folder).unwrap())
}

/// Coded bytes and sound of packets of one frame.
fn one_by_one(codec: &mut Lyra, pcm: &[f32]) -> (Vec<u8>, Vec<f32>) {
    let (mut encoder, mut decoder) = (codec.encoder().unwrap(), codec.decoder().unwrap());
    let (mut coded, mut heard) = (Vec::new(), Vec::new());
    for frame in pcm.chunks_exact(FRAME) {
        let mut batch = [EncodeTask::new(&mut encoder, Rung::L2, frame)];
        codec.encode(&mut batch);
        let [task] = batch;
        let payload = task.payload;
        let mut batch = [DecodeTask::new(
            &mut decoder,
            CodecId::Lyra6,
            Some(&payload),
            FRAME,
        )];
        codec.decode(&mut batch);
        let [task] = batch;
        task.done.unwrap();
        heard.extend(task.pcm);
        coded.extend(payload);
    }
    (coded, heard)
}

#[test]
fn packets_of_one_to_three_frames_share_a_batch() {
    let mut codec = codec_of(&lyra_bundle()).unwrap();
    let pcm = speech("talker-a", 4);
    let said: Vec<&[f32]> = (0..3).map(|k| &pcm[k * 50 * FRAME..]).collect();
    let mut encoders: Vec<_> = (0..3).map(|_| codec.encoder().unwrap()).collect();
    let mut decoders: Vec<_> = (0..3).map(|_| codec.decoder().unwrap()).collect();
    let (mut coded, mut heard) = (vec![Vec::new(); 3], vec![Vec::new(); 3]);
    for packet in 0..20 {
        let mut batch: Vec<_> = encoders
            .iter_mut()
            .zip(&said)
            .zip(1..)
            .map(|((state, said), frames)| {
                let pcm = &said[packet * frames * FRAME..][..frames * FRAME];
                EncodeTask::new(state, Rung::L2, pcm)
            })
            .collect();
        codec.encode(&mut batch);
        let payloads: Vec<Vec<u8>> = batch.into_iter().map(|task| task.payload).collect();
        let mut batch: Vec<_> = decoders
            .iter_mut()
            .zip(&payloads)
            .zip(1..)
            .map(|((state, payload), frames)| {
                DecodeTask::new(state, CodecId::Lyra6, Some(payload), frames * FRAME)
            })
            .collect();
        codec.decode(&mut batch);
        for (heard, task) in heard.iter_mut().zip(batch) {
            task.done.unwrap();
            heard.extend(task.pcm);
        }
        for (coded, payload) in coded.iter_mut().zip(payloads) {
            coded.extend(payload);
        }
    }
    for (k, frames) in (1..=3).enumerate() {
        let alone = one_by_one(&mut codec, &said[k][..20 * frames * FRAME]);
        // A feature that lies between two entries may fall to the other when sums come in another order.
        let pairs = alone.0.iter().zip(&coded[k]);
        let same = pairs.filter(|(a, b)| a == b).count();
        assert_eq!(alone.0.len(), coded[k].len());
        assert!(
            same * 50 > coded[k].len() * 49,
            "{same} of {}",
            coded[k].len()
        );
        assert_eq!(alone.1.len(), heard[k].len());
        assert!(likeness(&alone.1, &heard[k]) > 0.99);
    }
}

/// The Lyra bundle with another text in its manifest.
fn changed(from: &str, to: &str) -> Result<Lyra, String> {
    let folder = copy_of(&lyra_bundle());
    let path = folder.path().join("manifest.yaml");
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains(from));
    std::fs::write(&path, text.replace(from, to)).unwrap();
    codec_of(folder.path())
}

#[test]
fn a_bundle_that_says_nothing_of_steps_gets_its_frames_one_by_one() {
    let pcm = speech("talker-b", 1);
    let (coded, _) = one_by_one(&mut codec_of(&lyra_bundle()).unwrap(), &pcm);
    let mut plain = changed("  steps: 6\n", "").unwrap();
    let mut state = plain.encoder().unwrap();
    let mut found = Vec::new();
    for group in pcm.chunks_exact(2 * FRAME) {
        let mut batch = [EncodeTask::new(&mut state, Rung::L2, group)];
        plain.encode(&mut batch);
        let [task] = batch;
        task.done.unwrap();
        found.extend(task.payload);
    }
    assert_eq!(found, coded, "the same runs give the same bytes");
}

#[test]
fn steps_that_make_no_sense_are_refused() {
    for steps in ["0", "65"] {
        let error = changed("steps: 6", &format!("steps: {steps}")).unwrap_err();
        assert!(
            error.contains(&format!("encoder.steps: {steps}")) && error.contains("1 to 64"),
            "{error}"
        );
    }
}
