//! Weights that stay in their safetensors file: mapped, never copied.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};

use super::HostMemory;
use crate::pack::RowMajor;
use crate::{DType, Error};

/// Bytes of the header's length.
const LENGTH_BYTES: usize = 8;

/// A safetensors file in memory, read-only. Cloning shares the mapping.
///
/// The file must not be shortened or rewritten while it is mapped: the pages change under whoever reads them, and a page past
/// the end stops the process. Replacing the file by a rename is fine.
#[derive(Debug, Clone)]
pub struct MappedFile {
    path: PathBuf,
    memory: HostMemory,
    tensors: Arc<safetensors::tensor::Metadata>,
    /// Where the tensors' bytes start.
    data: usize,
}

/// A tensor of a [`MappedFile`], which it keeps mapped.
#[derive(Debug, Clone)]
pub struct FileTensor {
    file: MappedFile,
    name: String,
    dtype: DType,
    shape: [usize; 2],
    start: usize,
    bytes: usize,
}

struct Mapping(Mmap);

impl AsRef<[u8]> for Mapping {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl MappedFile {
    /// Maps a file; write permission is not needed. Only its header is read.
    ///
    /// # Errors
    /// [`Error::Read`], [`Error::Truncated`] for a file that ends before its header says, [`Error::Malformed`].
    pub fn open(path: &Path) -> Result<Self, Error> {
        let read = |source| Error::Read { path: path.to_path_buf(), source };
        let file = std::fs::File::open(path).map_err(read)?;
        // SAFETY: the mapping is private and read-only. That nobody shortens or rewrites the file meanwhile is asked of the
        // caller in the documentation of the type, as everywhere where weights are mapped.
        let mapping = unsafe { Mmap::map(&file) }.map_err(read)?;
        let (header, tensors) = SafeTensors::read_metadata(&mapping)
            .map_err(|error| truncated(path, &mapping).unwrap_or_else(|| Error::malformed(path, error)))?;
        Ok(MappedFile {
            path: path.to_path_buf(),
            memory: HostMemory::new(Mapping(mapping)),
            tensors: Arc::new(tensors),
            data: LENGTH_BYTES + header,
        })
    }

    /// The matrix `name`, `[out_features, in_features]`.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], or [`Error::Malformed`] for a tensor that is no matrix of f32, f16 or bf16.
    pub fn tensor(&self, name: &str) -> Result<FileTensor, Error> {
        let info = self
            .tensors
            .info(name)
            .ok_or_else(|| Error::MissingTensor { name: name.to_string(), path: self.path.clone() })?;
        let dtype = match info.dtype {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            other => {
                let reason = format!("tensor {name}: expected f32, f16 or bf16, found {other:?}");
                return Err(Error::malformed(&self.path, reason));
            }
        };
        let &[n, k] = info.shape.as_slice() else {
            let reason = format!("tensor {name}: expected a matrix, found shape {:?}", info.shape);
            return Err(Error::malformed(&self.path, reason));
        };
        let (start, end) = info.data_offsets;
        let (start, bytes) = (self.data + start, end - start);
        Ok(FileTensor { file: self.clone(), name: name.to_string(), dtype, shape: [n, k], start, bytes })
    }

    /// The mapped bytes of the whole file.
    pub fn memory(&self) -> &HostMemory {
        &self.memory
    }

    /// The same file through memory that a device reaches too.
    #[cfg(feature = "cuda")]
    pub(super) fn with_memory(&self, memory: HostMemory) -> Self {
        MappedFile { memory, ..self.clone() }
    }
}

impl FileTensor {
    /// The tensor's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// `[out_features, in_features]`
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// Type of the values.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The values, where they lie.
    ///
    /// # Errors
    /// None for a file that [`MappedFile::open`] has accepted, whose sizes are checked.
    pub fn matrix(&self) -> Result<RowMajor<'_>, Error> {
        let bytes = &self.file.memory.bytes()[self.start..self.start + self.bytes];
        RowMajor::new(bytes, self.dtype, self.shape)
    }

    pub(super) fn memory(&self) -> &HostMemory {
        &self.file.memory
    }

    pub(super) fn start(&self) -> usize {
        self.start
    }
}

/// How much of a file is missing, if that is what is wrong with it.
fn truncated(path: &Path, bytes: &[u8]) -> Option<Error> {
    let missing = |expected: u64| {
        let found = bytes.len() as u64;
        (found < expected).then(|| Error::Truncated { path: path.to_path_buf(), expected, found })
    };
    let Some(length) = bytes.first_chunk::<LENGTH_BYTES>() else { return missing(LENGTH_BYTES as u64) };
    let data = u64::from_le_bytes(*length).checked_add(LENGTH_BYTES as u64)?;
    let Some(header) = bytes.get(LENGTH_BYTES..usize::try_from(data).ok()?) else { return missing(data) };
    let header: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(header).ok()?;
    let ends = header.values().filter_map(|tensor| tensor.get("data_offsets")?.get(1)?.as_u64());
    missing(data.checked_add(ends.max()?)?)
}
