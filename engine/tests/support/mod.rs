//! What the integration tests share. Each test binary uses some of it.
#![allow(dead_code)]

use std::path::{Path, PathBuf};

use longkv_engine::mode::Mode;
use longkv_engine::{Error, Model, Session, ranks};

/// The model that comes with the engine.
pub(crate) fn bundled() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("model")
}

/// A golden checkpoint, a file of it, or its logits.
pub(crate) fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

pub(crate) fn mode(text: &str) -> Mode {
    text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
}

pub(crate) fn load(path: &Path) -> Result<Model, Error> {
    Model::load(path, &mode("dense"))
}

pub(crate) fn session<'m>(model: &'m Model, kv: &str, capacity: usize) -> Session<'m> {
    Session::new(model, &mode(kv), Box::new(ranks::Single), capacity).unwrap()
}

/// A copy of a checkpoint's files that a test may change.
pub(crate) fn copy(checkpoint: &Path) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(checkpoint).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            continue;
        }
        std::fs::copy(&path, copy.path().join(path.file_name().unwrap())).unwrap();
    }
    copy
}

/// Sets keys of a checkpoint's `config.json`; null takes a key out.
pub(crate) fn set_config(checkpoint: &Path, changes: serde_json::Value) {
    let path = checkpoint.join("config.json");
    let mut config: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    for (key, value) in changes.as_object().unwrap() {
        match value {
            serde_json::Value::Null => config.remove(key),
            value => config.insert(key.clone(), value.clone()),
        };
    }
    std::fs::write(&path, serde_json::to_vec(&config).unwrap()).unwrap();
}
