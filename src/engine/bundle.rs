//! Bundles of models: a folder with a `manifest.yaml` that names every file with its sha256. `docs/models.md` is the format.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::Deserialize;
use sha2::{Digest, Sha256};

/// The manifest's name in the folder.
pub const MANIFEST: &str = "manifest.yaml";
/// The format this engine reads.
const FORMAT: u32 = 1;
const LARGEST_MANIFEST: u64 = 256 * 1024;
const LARGEST_FILE: u64 = 1024 * 1024 * 1024;

/// Why a bundle can't be used: what is wrong, where, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// A file is missing or can't be read.
    #[error("{file}: {error}; run `make models`, or set the bundle's path right")]
    Read {
        /// Its path.
        file: String,
        /// What the operating system says.
        error: std::io::Error,
    },
    /// The manifest isn't one.
    #[error("{file}: {error}")]
    Manifest {
        /// Its path.
        file: String,
        /// With line and column.
        error: serde_yaml::Error,
    },
    /// A file isn't what the manifest says.
    #[error("{file}: {what}; run `make models` to make the bundle anew")]
    Damaged {
        /// Its path.
        file: String,
        /// Its length or sha256, and the manifest's.
        what: String,
    },
    /// The manifest says what this engine can't do.
    #[error("{file}: {what}")]
    Unsupported {
        /// The manifest's path.
        file: String,
        /// The key and what is allowed.
        what: String,
    },
}

/// A size in a tensor's shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
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

/// An input or output of a graph: all are f32.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Tensor {
    /// Its name in the graph.
    pub name: String,
    /// Its shape, with one `batch` in it.
    pub shape: Vec<Dimension>,
}

/// The state that goes in and comes out; a stream's begins with zeros.
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
    /// What is kept.
    pub state: State,
    /// Name of a scalar int64 input that takes the sample rate, if it has one.
    pub sample_rate_input: Option<String>,
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

/// A file's length and digest.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Entry {
    /// Its length.
    pub bytes: u64,
    /// In hexadecimal.
    pub sha256: String,
}

/// What the models are for.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
// There are two of them in a process.
#[allow(clippy::large_enum_variant)]
pub enum Kind {
    /// A speech codec: encoder, quantizer, decoder.
    Codec {
        /// From sound to features.
        encoder: Graph,
        /// From features to sound.
        decoder: Graph,
        /// Between them.
        quantizer: Codebooks,
    },
    /// A voice activity detector.
    Vad {
        /// From sound to a probability.
        model: Graph,
        /// Samples of the frame before that go in front of each.
        context: usize,
    },
}

/// `manifest.yaml`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Manifest {
    /// 1.
    pub format: u32,
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
    #[serde(flatten)]
    pub kind: Kind,
    /// Every file but the manifest.
    pub files: BTreeMap<String, Entry>,
}

/// A bundle that was read and found whole. It is in memory: what happens to the folder afterwards changes nothing.
#[derive(Debug, Clone)]
pub struct Bundle {
    /// What it says of itself.
    pub manifest: Manifest,
    /// The sha256 of the manifest, in hexadecimal: it names the whole bundle.
    pub sha256: String,
    files: BTreeMap<String, Vec<u8>>,
}

impl Bundle {
    /// Reads a folder and compares every file with the manifest.
    ///
    /// # Errors
    /// The first thing that is wrong, with its path.
    pub fn read(folder: &Path) -> Result<Self, BundleError> {
        let path = folder.join(MANIFEST);
        let place = path.display().to_string();
        let text = read(&path, LARGEST_MANIFEST)?;
        let manifest: Manifest =
            serde_yaml::from_slice(&text).map_err(|error| BundleError::Manifest {
                file: place.clone(),
                error,
            })?;
        let unsupported = |what: String| BundleError::Unsupported {
            file: place.clone(),
            what,
        };
        if manifest.format != FORMAT {
            return Err(unsupported(format!(
                "format is {}, this engine reads {FORMAT}",
                manifest.format
            )));
        }
        let mut files = BTreeMap::new();
        for (name, entry) in &manifest.files {
            // A manifest must not point anywhere else than into its own folder.
            if name.is_empty() || name.starts_with('.') || name.contains(['/', '\\', '\0']) {
                return Err(unsupported(format!(
                    "files: {name:?} is not a plain file name"
                )));
            }
            let path = folder.join(name);
            let bytes = read(&path, entry.bytes.min(LARGEST_FILE))?;
            let damaged = |what: String| BundleError::Damaged {
                file: path.display().to_string(),
                what,
            };
            if bytes.len() as u64 != entry.bytes {
                let length = std::fs::metadata(&path).map_or(bytes.len() as u64, |m| m.len());
                return Err(damaged(format!(
                    "it has {length} bytes, the manifest says {}",
                    entry.bytes
                )));
            }
            let digest = hex(&Sha256::digest(&bytes));
            if !digest.eq_ignore_ascii_case(&entry.sha256) {
                return Err(damaged(format!(
                    "its sha256 is {digest}, the manifest says {}",
                    entry.sha256
                )));
            }
            files.insert(name.clone(), bytes);
        }
        let bundle = Self {
            sha256: hex(&Sha256::digest(&text)),
            manifest,
            files,
        };
        for name in bundle.used() {
            if !bundle.files.contains_key(name) {
                return Err(unsupported(format!("files: {name} is used but not listed")));
            }
        }
        Ok(bundle)
    }

    /// A file of it.
    #[must_use]
    pub fn file(&self, name: &str) -> &[u8] {
        self.files.get(name).map_or(&[], Vec::as_slice)
    }

    fn used(&self) -> Vec<&str> {
        match &self.manifest.kind {
            Kind::Codec {
                encoder,
                decoder,
                quantizer,
            } => vec![&encoder.file, &decoder.file, &quantizer.file],
            Kind::Vad { model, .. } => vec![&model.file],
        }
    }
}

/// At most `most` bytes and one more, so that a longer file shows.
fn read(path: &Path, most: u64) -> Result<Vec<u8>, BundleError> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(most + 1).read_to_end(&mut bytes))
        .map_err(|error| BundleError::Read {
            file: path.display().to_string(),
            error,
        })?;
    Ok(bytes)
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::testing::{copy_of, lyra_bundle, vad_bundle};

    fn damaged(change: impl FnOnce(&Path)) -> String {
        let folder = copy_of(&lyra_bundle());
        Bundle::read(folder.path()).unwrap();
        change(folder.path());
        Bundle::read(folder.path()).unwrap_err().to_string()
    }

    #[test]
    fn both_bundles_are_whole() {
        let lyra = Bundle::read(&lyra_bundle()).unwrap();
        assert_eq!(
            (lyra.manifest.sample_rate, lyra.manifest.frame),
            (16_000, 320)
        );
        assert!(
            matches!(&lyra.manifest.kind, Kind::Codec { quantizer, .. } if quantizer.stages == 46)
        );
        assert_eq!(lyra.sha256.len(), 64);
        let vad = Bundle::read(&vad_bundle()).unwrap();
        assert!(matches!(&vad.manifest.kind, Kind::Vad { context: 64, .. }));
        assert!(vad.file("vad.onnx").len() > 1_000_000);
    }

    #[test]
    fn damage_is_found_and_named() {
        let truncated = |name: &'static str| {
            move |folder: &Path| {
                let file = File::options().write(true).open(folder.join(name)).unwrap();
                file.set_len(1000).unwrap();
            }
        };
        let text = damaged(truncated("decoder.onnx"));
        assert!(text.contains("decoder.onnx: it has 1000 bytes"), "{text}");
        let text = damaged(|folder| {
            let mut bytes = std::fs::read(folder.join("encoder.onnx")).unwrap();
            bytes[5000] ^= 1;
            std::fs::write(folder.join("encoder.onnx"), bytes).unwrap();
        });
        assert!(text.contains("encoder.onnx: its sha256 is"), "{text}");
        let text = damaged(|folder| std::fs::remove_file(folder.join("codebooks.f32")).unwrap());
        assert!(
            text.contains("codebooks.f32") && text.contains("make models"),
            "{text}"
        );
        let edit = |from: &'static str, to: &'static str| {
            move |folder: &Path| {
                let path = folder.join(MANIFEST);
                let text = std::fs::read_to_string(&path).unwrap();
                assert!(text.contains(from), "{from}");
                std::fs::write(path, text.replacen(from, to, 1)).unwrap();
            }
        };
        let text = damaged(edit("format: 1", "format: 2"));
        assert!(text.contains("format is 2"), "{text}");
        let text = damaged(edit("stages: 46", "stages: many"));
        assert!(text.contains(MANIFEST), "{text}");
        let text = damaged(edit("files:\n", "files:\n  ../x: {bytes: 1, sha256: aa}\n"));
        assert!(text.contains("plain file name"), "{text}");
        let text = Bundle::read(&PathBuf::from("/nowhere"))
            .unwrap_err()
            .to_string();
        assert!(
            text.contains("/nowhere/manifest.yaml") && text.contains("make models"),
            "{text}"
        );
    }
}
