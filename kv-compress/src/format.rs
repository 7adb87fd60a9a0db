//! Our files: `.safetensors` whose metadata has one entry, `kv-compress`, that says what the file is.

use std::collections::HashMap;

use safetensors::SafeTensors;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::Error;

/// The one key of the metadata: a map of several would be written in random order.
const KEY: &str = "kv-compress";

/// A kind of file and its version.
pub(crate) struct Format {
    pub(crate) what: &'static str,
    pub(crate) version: u32,
}

#[derive(Serialize, Deserialize)]
struct Envelope<C> {
    file: String,
    version: u32,
    content: C,
}

impl Format {
    /// The metadata of a file with this content.
    pub(crate) fn metadata(&self, content: &impl Serialize) -> Result<HashMap<String, String>, Error> {
        let envelope = Envelope { file: self.what.to_string(), version: self.version, content };
        let text = serde_json::to_string(&envelope).map_err(|error| Error::malformed(self.what, error))?;
        Ok(HashMap::from([(KEY.to_string(), text)]))
    }

    /// The content of a file of this kind and version.
    pub(crate) fn read<C: DeserializeOwned>(&self, bytes: &[u8]) -> Result<C, Error> {
        let fail = |reason: String| Error::Malformed { what: self.what, reason };
        let (_, header) = SafeTensors::read_metadata(bytes)
            .map_err(|error| fail(format!("truncated or damaged: {error}")))?;
        let text = header.metadata().as_ref().and_then(|metadata| metadata.get(KEY));
        let text = text.ok_or_else(|| fail(format!("expected metadata {KEY:?}, found none")))?;
        let envelope: Envelope<serde_json::Value> =
            serde_json::from_str(text).map_err(|error| fail(format!("metadata: {error}")))?;
        if envelope.file != self.what {
            return Err(fail(format!("expected a {}, found a {}", self.what, envelope.file)));
        }
        if envelope.version != self.version {
            return Err(fail(format!("expected version {}, found {}", self.version, envelope.version)));
        }
        serde_json::from_value(envelope.content).map_err(|error| fail(format!("metadata: {error}")))
    }
}
