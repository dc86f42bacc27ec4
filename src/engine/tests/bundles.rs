//! Bundles that say what isn't so, and what is said of one that is well.

use std::path::Path;

use auralink_proto::ladder::CodecId;

use super::call::config;
use super::codecs::{changed, codec};
use crate::codec::{Codec, CodecError, DecodeTask, FRAME};
use crate::source::tried_codec;
use crate::testing::{codes_bundle, lyra_bundle, runtime, vad_bundle};
use crate::{Engine, EngineConfig, verify};

/// What is said of a bundle whose manifest has one of its lines changed.
fn said_of(folder: &Path, from: &str, to: &str) -> String {
    let copy = changed(folder, from, to);
    verify(copy.path(), &runtime()).unwrap_err().to_string()
}

#[test]
fn a_manifest_that_is_wrong_is_told_what_where_and_what_to_do() {
    let (wide, lyra) = (codes_bundle("lyra2-24k"), lyra_bundle());
    let vad = vad_bundle();
    for (folder, from, to, parts) in [
        // What is no manifest.
        (
            &wide,
            "kind: \"codec\"",
            "kind: \"music\"",
            vec![
                "manifest.yaml: ",
                "unknown variant `music`",
                "docs/models.md",
            ],
        ),
        (
            &wide,
            "stages: 60",
            "stages: many",
            vec!["manifest.yaml: codes.stages", "line ", "docs/models.md"],
        ),
        (
            &wide,
            "dtype: i64",
            "dtype: u8",
            vec!["encoder.output.dtype", "expected `f32` or `i64`", "line "],
        ),
        (
            &wide,
            "shape: [batch, 960]",
            "shape: [many, 960]",
            vec!["encoder.input.shape", "a size, or the word batch"],
        ),
        (
            &wide,
            "- {input: resampler_in, ",
            "- {in: resampler_in, ",
            vec!["missing field `input`", "line "],
        ),
        // What the ladder can't carry.
        (
            &wide,
            "sample_rate: 24000",
            "sample_rate: 44100",
            vec![
                "manifest.yaml: sample_rate is 44100",
                "16000, 24000 and 48000",
            ],
        ),
        (
            &wide,
            "frame: 960",
            "frame: 700",
            vec!["frame is 700", "960 of 24000 Hz", "whole number"],
        ),
        (&wide, "frame: 960", "frame: 0", vec!["frame is 0"]),
        (
            &wide,
            "delay: 96",
            "delay: 9600",
            vec!["delay is 9600", "2400"],
        ),
        (&wide, "  L2: 60", "  L2: 61", vec!["L2: 61", "60 of codes"]),
        (&wide, "  L1: 32", "  L1: 60", vec!["L1: 60", "L2 has more"]),
        (
            &wide,
            "  L1: 32",
            "  L1: 59",
            vec!["30 bytes on L1 and 30 on L2"],
        ),
        (
            &wide,
            "entries: 16",
            "entries: 1",
            vec!["codes.entries is 1"],
        ),
        (
            &wide,
            "entries: 16",
            "entries: 99999999999",
            vec!["codes.entries is 99999999999"],
        ),
        (
            &wide,
            "codes:\n",
            "codex:\n",
            vec!["quantizer or codes is missing"],
        ),
        (
            &wide,
            "decoder:\n",
            "decodes:\n",
            vec!["decoder is missing", "kind codec"],
        ),
        (
            &wide,
            "dtype: i64",
            "dtype: f32",
            vec!["encoder.output.dtype is f32; i64 is needed"],
        ),
        (
            &lyra,
            "kind: residual",
            "kind: lattice",
            vec!["quantizer.kind is \"lattice\"", "with codes"],
        ),
        (
            &lyra,
            "dimension: 64",
            "dimension: 0",
            vec!["quantizer.dimension is 0"],
        ),
        (
            &lyra,
            "quantizer:\n",
            "codes: {stages: 46, entries: 16}\nquantizer:\n",
            vec!["exclude each other"],
        ),
        // What the files don't bear out.
        (
            &lyra,
            "entries: 16",
            "entries: 17",
            vec!["codebooks.f32: ", "46 × 17 × 64"],
        ),
        (
            &lyra,
            "dimension: 64",
            "dimension: 32",
            vec!["codebooks.f32: "],
        ),
        (
            &wide,
            "name: codes",
            "name: kodes",
            vec![
                "encoder.onnx: the graph has no output kodes",
                "codes, state_out",
            ],
        ),
        (
            &wide,
            "input: state_in,",
            "input: nothing,",
            vec!["encoder.onnx: the graph has no input nothing"],
        ),
        (
            &wide,
            "[batch, 13808]",
            "[batch, 13807]",
            vec!["encoder.onnx: input state_in", "13808", "[batch, 13807]"],
        ),
        (
            &wide,
            "[batch, 13808]",
            "[13808, batch]",
            vec!["encoder.onnx: input state_in"],
        ),
        (
            &wide,
            "[batch, 13808]",
            "[batch, 99999999]",
            vec!["encoder.state.shape: a size of 99999999"],
        ),
        (
            &wide,
            "    - {input: resampler_in, output: resampler_out, shape: [batch, 96]}\n",
            "",
            vec![
                "encoder.onnx: the graph wants an input resampler_in",
                "state",
            ],
        ),
        (
            &wide,
            "stages: 60",
            "stages: 64",
            vec!["encoder.output.shape has 60 numbers a stream, codes.stages says 64"],
        ),
        (
            &wide,
            "frame: 960",
            "frame: 480",
            vec!["encoder.input.shape has 960 numbers a stream, frame says 480"],
        ),
        (
            &lyra,
            "frame: 320",
            "frame: 160",
            vec!["encoder.input.shape has 320", "frame says 160"],
        ),
        // Another kind.
        (
            &vad,
            "context: 64",
            "context: 18446744073709551615",
            vec!["context is 18446744073709551615", "512 are the most"],
        ),
        (
            &vad,
            "sample_rate: 16000",
            "sample_rate: 18446744073709551615",
            vec!["16000 Hz"],
        ),
        (&vad, "frame: 512", "frame: 256", vec!["windows of 256"]),
        (
            &vad,
            "context:",
            "contest:",
            vec!["context is missing", "kind vad"],
        ),
        // The graph's codes are 0 to 15.
        (
            &wide,
            "entries: 16",
            "entries: 8",
            vec!["a trial of 1 streams on L2 failed", "codes.entries"],
        ),
    ] {
        let said = said_of(folder, from, to);
        for part in parts {
            assert!(
                said.contains(part),
                "{from} -> {to}: {part:?} is not in {said:?}"
            );
        }
    }
}

#[test]
fn what_a_bundle_keeps_silent_is_found_by_a_trial() {
    // A batch that is fixed in the graph is seen at once; a decoder that takes no -1 would be seen by the concealment.
    let mut codec = codec(&codes_bundle("lyra2-codes"));
    let mut decoder = codec.decoder().unwrap();
    let mut batch = [DecodeTask::new(
        &mut decoder,
        CodecId::Lyra6,
        None,
        7 * FRAME,
    )];
    codec.decode(&mut batch);
    assert!(
        matches!(batch[0].done, Err(CodecError::Input(_))),
        "over 120 ms"
    );
    assert!(tried_codec(codec).is_ok());
    // The engine goes on without one that can't be used, and says why.
    let copy = changed(&codes_bundle("lyra2-24k"), "entries: 16", "entries: 8");
    let engine = Engine::start(EngineConfig {
        lyra: Some(copy.path().to_owned()),
        vad: Some(vad_bundle()),
        ..config()
    })
    .unwrap();
    let status = engine.status();
    assert_eq!(status.decodable, auralink_proto::ladder::Rungs::OPUS);
    assert!(
        status
            .problems
            .iter()
            .any(|p| p.contains("lyra2-24k") && p.contains("codes.entries")),
        "{status:?}"
    );
}

#[test]
fn verify_says_what_a_codec_costs() {
    let report = verify(&codes_bundle("lyra2-24k"), &runtime()).unwrap();
    let said = report.to_string();
    assert!(
        said.contains("24000 Hz, frames of 960 samples (40.0 ms); L1 16 bytes a frame, 3.2 kbit/s; L2 30 bytes a frame, 6.0 kbit/s"),
        "{said}"
    );
    assert_eq!(report.timings.len(), 4);
    assert!(
        report
            .timings
            .iter()
            .all(|t| t.real_time_factor > 0.0 && t.real_time_factor < 0.7),
        "{said}"
    );
}
