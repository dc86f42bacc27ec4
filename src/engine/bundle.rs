//! Bundles of models: a folder with a `manifest.yaml` that names every file with its sha256. `docs/models.md` is the format.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use sha2::{Digest, Sha256};

mod manifest;

use manifest::Wrong;
pub use manifest::{
    BatchWord, Code, Codebooks, CodecModels, Codes, Dimension, Element, Entry, Graph, Kind,
    Manifest, Stages, State, Tensor, bits,
};

/// The manifest's name in the folder.
pub const MANIFEST: &str = "manifest.yaml";
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
    #[error("{file}: {error}; docs/models.md describes the keys")]
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
        let unsupported = |what: String| BundleError::Unsupported {
            file: place.clone(),
            what,
        };
        let manifest = Manifest::parse(&text).map_err(|wrong| match wrong {
            Wrong::Yaml(error) => BundleError::Manifest {
                file: place.clone(),
                error,
            },
            Wrong::Key(what) => unsupported(what),
        })?;
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
        for name in bundle.manifest.used() {
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

    use auralink_proto::ladder::Frames;

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
        let Kind::Codec(codec) = &lyra.manifest.kind else {
            panic!("{:?}", lyra.manifest.kind)
        };
        assert_eq!(codec.code.sizes(), (46, 16));
        assert_eq!((codec.rungs, codec.delay), (Stages { l1: 16, l2: 30 }, 0));
        assert_eq!(codec.frames, Frames::LYRA);
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
