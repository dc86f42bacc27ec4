//! What a manifest says, and whether this engine can do it. `docs/models.md` is the format.

use std::collections::BTreeMap;
use std::fmt;

use auralink_proto::ladder::Frames;
use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

/// The format this engine reads.
const FORMAT: u32 = 1;
/// Sample rates at which libopus takes and gives speech no narrower than the ladder's.
const SAMPLE_RATES: [usize; 3] = [16_000, 24_000, 48_000];
/// The detector's sample rate.
const VAD_RATE: usize = 16_000;
/// Ticks a second by which frames of every rate are whole.
const TICKS: usize = 48_000;
/// A frame of L2 in bytes.
const LARGEST_FRAME: usize = 255;
/// And a packet of 40 ms: 102 kbit/s, more than what comes in.
const LARGEST_PACKET: usize = 510;
/// Stages of the two neural rungs where the manifest doesn't say: those of Lyra v2.
const LYRA: Stages = Stages { l1: 16, l2: 30 };

/// A size in a tensor's shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(untagged, expecting = "a size, or the word batch")]
pub enum Dimension {
    /// A fixed one.
    Fixed(usize),
    /// As many as streams are in the batch; written `batch`.
    Batch(BatchWord),
}

/// The word `batch`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BatchWord {
    /// The only one.
    Batch,
}

/// What a tensor's elements are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Element {
    /// Sound, features, states.
    #[default]
    F32,
    /// Codes.
    I64,
}

/// An input or output of a graph.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Tensor {
    /// Its name in the graph.
    pub name: String,
    /// Its shape, with one `batch` in it.
    pub shape: Vec<Dimension>,
    /// f32 where nothing is said.
    #[serde(default)]
    pub dtype: Element,
}

/// A state that goes in and comes out, f32; a stream's begins with zeros.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct State {
    /// The input's name.
    pub input: String,
    /// The output's name.
    pub output: String,
    /// The shape of both.
    pub shape: Vec<Dimension>,
}

/// One ONNX file.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Graph {
    /// Its name in the bundle.
    pub file: String,
    /// What goes in.
    pub input: Tensor,
    /// What comes out.
    pub output: Tensor,
    /// What is kept: one, or a list of them.
    #[serde(deserialize_with = "one_or_many")]
    pub state: Vec<State>,
    /// Name of a scalar int64 input that takes the sample rate, if it has one.
    pub sample_rate_input: Option<String>,
    /// Frames of a stream that it takes in one run at most, one after another along the last dimension of input and output; 1
    /// where it isn't said.
    #[serde(default)]
    pub steps: Option<usize>,
}

/// A residual vector quantizer's codebooks.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Codebooks {
    /// Its name in the bundle: little-endian f32.
    pub file: String,
    /// `residual`.
    pub kind: String,
    /// How many stages.
    pub stages: usize,
    /// Entries of each.
    pub entries: usize,
    /// Numbers of each entry.
    pub dimension: usize,
}

/// Integer codes that the encoder's graph gives and the decoder's takes: a number below `entries` for each stage of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct Codes {
    /// How many a frame.
    pub stages: usize,
    /// How many values each may have.
    pub entries: usize,
}

/// What stands between encoder and decoder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Code {
    /// The graphs give and take features; the engine quantizes them.
    Quantizer(Codebooks),
    /// The graphs give and take codes.
    Codes(Codes),
}

impl Code {
    /// Stages, and entries of each.
    #[must_use]
    pub const fn sizes(&self) -> (usize, usize) {
        match self {
            Self::Quantizer(books) => (books.stages, books.entries),
            Self::Codes(codes) => (codes.stages, codes.entries),
        }
    }
}

/// How many of the first stages a rung sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct Stages {
    /// On L1.
    #[serde(rename = "L1")]
    pub l1: usize,
    /// On L2.
    #[serde(rename = "L2")]
    pub l2: usize,
}

/// A speech codec.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CodecModels {
    /// From sound to features or codes.
    pub encoder: Graph,
    /// Back to sound.
    pub decoder: Graph,
    /// Between them.
    pub code: Code,
    /// What the rungs send.
    pub rungs: Stages,
    /// Samples by which sound comes out later than it went in.
    pub delay: usize,
    /// Frames on the wire.
    pub frames: Frames,
}

/// What the models are for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A speech codec.
    Codec(Box<CodecModels>),
    /// A voice activity detector.
    Vad {
        /// From sound to a probability.
        model: Graph,
        /// Samples of the frame before that go in front of each.
        context: usize,
    },
}

/// A file's length and digest.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Entry {
    /// Its length.
    pub bytes: u64,
    /// In hexadecimal.
    pub sha256: String,
}

/// `manifest.yaml`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// The model's.
    pub name: String,
    /// The model's.
    pub version: String,
    /// SPDX.
    pub licence: String,
    /// Samples a second.
    pub sample_rate: usize,
    /// Samples of a frame.
    pub frame: usize,
    /// By kind.
    pub kind: Kind,
    /// Every file but the manifest.
    pub files: BTreeMap<String, Entry>,
}

/// The keys as they stand in the file; which of them are needed depends on `kind`.
#[derive(Deserialize)]
struct Written {
    format: u32,
    kind: WrittenKind,
    name: String,
    version: String,
    licence: String,
    sample_rate: usize,
    frame: usize,
    encoder: Option<Graph>,
    decoder: Option<Graph>,
    quantizer: Option<Codebooks>,
    codes: Option<Codes>,
    rungs: Option<Stages>,
    #[serde(default)]
    delay: usize,
    model: Option<Graph>,
    context: Option<usize>,
    files: BTreeMap<String, Entry>,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum WrittenKind {
    Codec,
    Vad,
}

/// Why a manifest is none.
pub(super) enum Wrong {
    /// It isn't YAML, or a key's value is of another type.
    Yaml(serde_yaml::Error),
    /// A key, what it says and what is allowed.
    Key(String),
}

impl Manifest {
    pub(super) fn parse(text: &[u8]) -> Result<Self, Wrong> {
        /// Only the number that says whether the rest can be understood.
        #[derive(Deserialize)]
        struct Format {
            format: u32,
        }
        let Format { format } = serde_yaml::from_slice(text).map_err(Wrong::Yaml)?;
        if format != FORMAT {
            let what = format!("format is {format}, this engine reads {FORMAT}");
            return Err(Wrong::Key(what));
        }
        let written: Written = serde_yaml::from_slice(text).map_err(Wrong::Yaml)?;
        written.check().map_err(Wrong::Key)
    }

    /// The files that it has a use for.
    pub(super) fn used(&self) -> Vec<&str> {
        match &self.kind {
            Kind::Codec(codec) => {
                let mut used: Vec<&str> = vec![&codec.encoder.file, &codec.decoder.file];
                if let Code::Quantizer(books) = &codec.code {
                    used.push(&books.file);
                }
                used
            }
            Kind::Vad { model, .. } => vec![&model.file],
        }
    }
}

impl Written {
    fn check(self) -> Result<Manifest, String> {
        debug_assert_eq!(self.format, FORMAT);
        let missing =
            |key: &str, kind: &str| format!("{key} is missing: a bundle of kind {kind} needs it");
        let kind = match self.kind {
            WrittenKind::Codec => {
                let code = match (self.quantizer, self.codes) {
                    (Some(books), None) => Code::Quantizer(books),
                    (None, Some(codes)) => Code::Codes(codes),
                    (Some(_), Some(_)) => {
                        return Err("quantizer and codes exclude each other: leave out codes where the encoder gives features, \
                                    quantizer where it gives codes"
                            .to_owned());
                    }
                    (None, None) => return Err(missing("quantizer or codes", "codec")),
                };
                let rungs = self.rungs.unwrap_or(LYRA);
                let codec = CodecModels {
                    encoder: self.encoder.ok_or_else(|| missing("encoder", "codec"))?,
                    decoder: self.decoder.ok_or_else(|| missing("decoder", "codec"))?,
                    frames: frames(self.sample_rate, self.frame, &code, rungs)?,
                    code,
                    rungs,
                    delay: self.delay,
                };
                codec.check(self.sample_rate)?;
                Kind::Codec(Box::new(codec))
            }
            WrittenKind::Vad => {
                let context = self.context.ok_or_else(|| missing("context", "vad"))?;
                if context > self.frame {
                    return Err(format!(
                        "context is {context} samples; a frame's {} are the most",
                        self.frame
                    ));
                }
                if self.sample_rate != VAD_RATE || !(1..=VAD_RATE).contains(&self.frame) {
                    return Err(format!(
                        "sample_rate is {}, frame {}; a detector takes {VAD_RATE} Hz and up to a second of it",
                        self.sample_rate, self.frame
                    ));
                }
                Kind::Vad {
                    model: self.model.ok_or_else(|| missing("model", "vad"))?,
                    context,
                }
            }
        };
        Ok(Manifest {
            name: self.name,
            version: self.version,
            licence: self.licence,
            sample_rate: self.sample_rate,
            frame: self.frame,
            kind,
            files: self.files,
        })
    }
}

impl CodecModels {
    fn check(&self, sample_rate: usize) -> Result<(), String> {
        if self.delay > sample_rate / 10 {
            return Err(format!(
                "delay is {} samples; a tenth of a second, {}, is the most",
                self.delay,
                sample_rate / 10
            ));
        }
        let between = match &self.code {
            Code::Quantizer(books) => {
                if books.kind != "residual" {
                    return Err(format!(
                        "quantizer.kind is {:?}; this engine has residual only: export other quantizers in the graph, with codes",
                        books.kind
                    ));
                }
                if !(1..=65_536).contains(&books.dimension) {
                    return Err(format!(
                        "quantizer.dimension is {}; 1 to 65536 are possible",
                        books.dimension
                    ));
                }
                Element::F32
            }
            Code::Codes(_) => Element::I64,
        };
        for (key, tensor, wanted) in [
            ("encoder.input", &self.encoder.input, Element::F32),
            ("encoder.output", &self.encoder.output, between),
            ("decoder.input", &self.decoder.input, between),
            ("decoder.output", &self.decoder.output, Element::F32),
        ] {
            if tensor.dtype != wanted {
                return Err(format!(
                    "{key}.dtype is {}; {} is needed (codes are i64, all else is f32)",
                    tensor.dtype, wanted
                ));
            }
        }
        Ok(())
    }
}

/// Bits of a code below `entries`.
#[must_use]
pub const fn bits(entries: usize) -> u32 {
    usize::BITS - entries.saturating_sub(1).leading_zeros()
}

/// The frames on the wire that follow from the sizes, where the ladder can carry them.
fn frames(rate: usize, frame: usize, code: &Code, rungs: Stages) -> Result<Frames, String> {
    if !SAMPLE_RATES.contains(&rate) {
        return Err(format!(
            "sample_rate is {rate}; 16000, 24000 and 48000 Hz are possible: resample in the graph, or export the codec at one of them"
        ));
    }
    if frame == 0 || !(rate / 25).is_multiple_of(frame) {
        return Err(format!(
            "frame is {frame} samples; a packet of 40 ms has {} of {rate} Hz, which has to be a whole number of frames",
            rate / 25
        ));
    }
    let (stages, entries) = code.sizes();
    let part = match code {
        Code::Quantizer(_) => "quantizer",
        Code::Codes(_) => "codes",
    };
    if !(2..=65_536).contains(&entries) {
        return Err(format!(
            "{part}.entries is {entries}; 2 to 65536 are possible"
        ));
    }
    if !(1..=2048).contains(&stages) {
        return Err(format!("{part}.stages is {stages}; 1 to 2048 are possible"));
    }
    let Stages { l1, l2 } = rungs;
    if l1 == 0 || l1 >= l2 || l2 > stages {
        return Err(format!(
            "rungs are L1: {l1} and L2: {l2} stages; both are the first of the {stages} of {part}, and L2 has more than L1"
        ));
    }
    let bytes = |stages: usize| (stages * bits(entries) as usize).div_ceil(8);
    if bytes(l2) > LARGEST_FRAME || bytes(l1) == bytes(l2) {
        return Err(format!(
            "rungs: a frame takes {} bytes on L1 and {} on L2; they have to differ, and {LARGEST_FRAME} are the most",
            bytes(l1),
            bytes(l2)
        ));
    }
    let packet = rate.div_ceil(25 * frame) * bytes(l2);
    if packet > LARGEST_PACKET {
        return Err(format!(
            "rungs: 40 ms take {packet} bytes on L2; {LARGEST_PACKET} are the most"
        ));
    }
    Frames::new(frame * (TICKS / rate), bytes(l1), bytes(l2))
        .ok_or_else(|| format!("frame is {frame} samples: 40 ms are no whole number of them"))
}

impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::I64 => "i64",
        })
    }
}

/// A map, or a list of maps. Not an untagged enum: its errors don't say what is wrong.
fn one_or_many<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<State>, D::Error> {
    struct States;

    impl<'de> Visitor<'de> for States {
        type Value = Vec<State>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a state {input, output, shape}, or a list of them")
        }

        fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Vec<State>, A::Error> {
            State::deserialize(MapAccessDeserializer::new(map)).map(|state| vec![state])
        }

        fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Vec<State>, A::Error> {
            Vec::deserialize(SeqAccessDeserializer::new(seq))
        }
    }

    deserializer.deserialize_any(States)
}
