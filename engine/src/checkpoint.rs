//! Weights of a Hugging Face checkpoint: `*.safetensors`, with or without an index, in f32, f16 or bf16.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use attention::DType;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use crate::Error;

/// One tensor, widened to f32 (which is exact).
#[derive(Debug, Clone)]
pub struct Tensor {
    /// Extents, slowest first.
    pub shape: Vec<usize>,
    /// Elements, row-major.
    pub data: Vec<f32>,
    /// The type it had in the file.
    pub stored: DType,
}

/// The tensors of a checkpoint by name.
#[derive(Debug)]
pub struct Checkpoint {
    folder: PathBuf,
    tensors: HashMap<String, Result<Tensor, Error>>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

impl Checkpoint {
    /// Reads all tensors of a folder: the files that `model.safetensors.index.json` lists, or every `*.safetensors`.
    ///
    /// # Errors
    /// No or unreadable files, and files that are truncated or damaged. A tensor of a type other than f32, f16 and bf16
    /// is an error only when it is asked for.
    pub fn read(folder: &Path) -> Result<Self, Error> {
        let mut tensors = HashMap::new();
        for path in weight_files(folder)? {
            let bytes = std::fs::read(&path).map_err(Error::reading(&path))?;
            let file = SafeTensors::deserialize(&bytes)
                .map_err(|error| Error::malformed(&path, format_args!("truncated or damaged: {error}")))?;
            for (name, view) in file.iter() {
                let tensor = widen(view.dtype(), view.data()).map(|(stored, data)| Tensor {
                    shape: view.shape().to_vec(),
                    data,
                    stored,
                });
                let tensor = tensor.ok_or_else(|| Error::TensorType {
                    name: name.to_string(),
                    found: format!("{:?}", view.dtype()),
                });
                tensors.insert(name.to_string(), tensor);
            }
        }
        Ok(Checkpoint { folder: folder.to_path_buf(), tensors })
    }

    /// Takes out a tensor of a given shape.
    ///
    /// # Errors
    /// The tensor is missing (or already taken), has another shape, an unknown type, or an element that is not finite.
    pub fn take(&mut self, name: &str, shape: &[usize]) -> Result<Tensor, Error> {
        let tensor = self.tensors.remove(name).ok_or_else(|| Error::MissingTensor {
            name: name.to_string(),
            checkpoint: self.folder.clone(),
        })??;
        if tensor.shape != shape {
            return Err(Error::TensorShape {
                name: name.to_string(),
                expected: shape.to_vec(),
                found: tensor.shape,
            });
        }
        match tensor.data.iter().position(|x| !x.is_finite()) {
            Some(index) => {
                Err(Error::TensorValue { name: name.to_string(), index, value: tensor.data[index] })
            }
            None => Ok(tensor),
        }
    }
}

impl Checkpoint {
    /// Checks that nothing is left of decoder layers past the first `layers`, which the configuration would leave out.
    ///
    /// # Errors
    /// [`Error::Config`] with the number of layers that there are weights of.
    pub fn check_layers(&self, layers: usize) -> Result<(), Error> {
        let layer = |name: &String| -> Option<usize> {
            name.strip_prefix("model.layers.")?.split('.').next()?.parse().ok()
        };
        match self.tensors.keys().filter_map(layer).max() {
            Some(last) if last >= layers => {
                let expected = format!("{}, the layers of the weights", last.saturating_add(1));
                Err(Error::config("num_hidden_layers", expected, layers))
            }
            _ => Ok(()),
        }
    }
}

fn weight_files(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let index = folder.join("model.safetensors.index.json");
    if index.exists() {
        let text = std::fs::read_to_string(&index).map_err(Error::reading(&index))?;
        let parsed: Index = serde_json::from_str(&text).map_err(|error| Error::malformed(&index, error))?;
        let names: BTreeSet<String> = parsed.weight_map.into_values().collect();
        // A checkpoint names files beside its index, nothing elsewhere.
        if let Some(name) = names.iter().find(|name| Path::new(name).file_name() != Some(name.as_ref())) {
            return Err(Error::malformed(&index, format_args!("{name:?} is no file of this folder")));
        }
        return Ok(names.iter().map(|name| folder.join(name)).collect());
    }
    let entries = std::fs::read_dir(folder).map_err(Error::reading(folder))?;
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(Error::reading(folder))?.path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            files.push(path);
        }
    }
    if files.is_empty() {
        return Err(Error::malformed(folder, "no *.safetensors file"));
    }
    files.sort();
    Ok(files)
}

/// Little-endian bytes as f32, and the type they had.
fn widen(dtype: Dtype, bytes: &[u8]) -> Option<(DType, Vec<f32>)> {
    // File offsets need not be aligned, so values are put together byte by byte.
    let halves = || bytes.as_chunks().0.iter().copied().map(u16::from_le_bytes);
    Some(match dtype {
        Dtype::F32 => (DType::F32, bytes.as_chunks().0.iter().copied().map(f32::from_le_bytes).collect()),
        Dtype::F16 => (DType::F16, halves().map(f16::from_bits).collect::<Vec<_>>().to_f32_vec()),
        Dtype::BF16 => (DType::BF16, halves().map(bf16::from_bits).collect::<Vec<_>>().to_f32_vec()),
        _ => return None,
    })
}
