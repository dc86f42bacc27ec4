//! One message under edit, in either encoding.

use serde_json::{Map, Value as Json};

use super::message::Message;
use super::wire::{self, Change};
use super::{Frame, MAX_FRAME, SignalError, Step, Verdict, json};

/// Reads the original, changes a copy.
pub(super) struct Editor<'a> {
    original: Original<'a>,
    changed: Option<Changed>,
}

enum Original<'a> {
    Wire(&'a [u8]),
    Json(&'a str, Map<String, Json>),
}

enum Changed {
    Wire(Vec<u8>),
    Json(String),
}

impl<'a> Editor<'a> {
    /// Checks that the outermost message can be read.
    pub(super) fn new(frame: Frame<'a>) -> Result<Self, SignalError> {
        let length = match frame {
            Frame::Binary(bytes) => bytes.len(),
            Frame::Text(text) => text.len(),
        };
        if length > MAX_FRAME {
            return Err(SignalError::TooLong {
                what: "signal message",
                limit: MAX_FRAME,
            });
        }
        let original = match frame {
            Frame::Binary(bytes) => {
                for field in wire::Fields::new(bytes) {
                    field?;
                }
                Original::Wire(bytes)
            }
            Frame::Text(text) => {
                let parsed = serde_json::from_str::<Map<String, Json>>(text);
                Original::Json(text, parsed.map_err(|e| SignalError::Json(e.to_string()))?)
            }
        };
        Ok(Self {
            original,
            changed: None,
        })
    }

    /// The message as it came.
    pub(super) fn message(&self) -> Message<'_> {
        match &self.original {
            Original::Wire(bytes) => Message::Wire(bytes),
            Original::Json(_, map) => Message::Json(map),
        }
    }

    /// Asks for a replacement of the string at the end of a path. An empty one counts as none, as everywhere in protobuf.
    pub(super) fn replace(
        &mut self,
        path: &[Step],
        replace: &mut dyn FnMut(&str) -> Result<Option<String>, SignalError>,
    ) -> Result<(), SignalError> {
        let replace = &mut |old: &str| {
            if old.is_empty() {
                return Ok(None);
            }
            replace(old)
        };
        match self.current() {
            Current::Wire(bytes) => {
                let numbers: Vec<u32> = path.iter().map(|(number, _)| *number).collect();
                if let Some(new) = wire::patch_string(bytes, &numbers, replace)? {
                    self.changed = Some(Changed::Wire(new));
                }
            }
            Current::Json(text) => {
                let names: Vec<&str> = path.iter().map(|(_, name)| *name).collect();
                if let Some(new) = json::patch_string(text, &names, replace)? {
                    self.changed = Some(Changed::Json(new));
                }
            }
        }
        Ok(())
    }

    /// Filters `join.enabled_publish_codecs` by MIME type.
    pub(super) fn keep_publish_codecs(&mut self, keep: &[String]) -> Result<(), SignalError> {
        let stays = |mime: &str| keep.iter().any(|kept| kept.eq_ignore_ascii_case(mime));
        match self.current() {
            Current::Wire(bytes) => {
                let new = wire::patch(bytes, 1, |join| {
                    let new = wire::patch(join, 14, |codec| {
                        let mime = Message::Wire(codec).text(1, "mime");
                        Ok(if stays(&mime) {
                            Change::Keep
                        } else {
                            Change::Drop
                        })
                    })?;
                    Ok(new.map_or(Change::Keep, Change::Replace))
                })?;
                if let Some(new) = new {
                    self.changed = Some(Changed::Wire(new));
                }
            }
            Current::Json(text) => {
                let path = ["join", "enabledPublishCodecs"];
                let new = json::filter_array(text, &path, &mut |codec| {
                    serde_json::from_str::<Map<String, Json>>(codec)
                        .is_ok_and(|codec| stays(&Message::Json(&codec).text(1, "mime")))
                })?;
                if let Some(new) = new {
                    self.changed = Some(Changed::Json(new));
                }
            }
        }
        Ok(())
    }

    /// The message as it is to pass.
    pub(super) fn verdict(self) -> Verdict {
        match self.changed {
            None => Verdict::Keep,
            Some(Changed::Wire(bytes)) => Verdict::Binary(bytes),
            Some(Changed::Json(text)) => Verdict::Text(text),
        }
    }

    fn current(&self) -> Current<'_> {
        match (&self.changed, &self.original) {
            (Some(Changed::Wire(bytes)), _) => Current::Wire(bytes),
            (Some(Changed::Json(text)), _) => Current::Json(text),
            (None, Original::Wire(bytes)) => Current::Wire(bytes),
            (None, Original::Json(text, _)) => Current::Json(text),
        }
    }
}

enum Current<'s> {
    Wire(&'s [u8]),
    Json(&'s str),
}
