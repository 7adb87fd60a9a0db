//! The driver's tensor maps.

use std::ffi::c_void;

use cudarc::driver::sys;

use super::call::check;
use crate::Error;
use crate::table::dtype;
use crate::tensor_map::Tensor;

/// The driver's `CUtensorMap`: 128 opaque bytes, at a 64-byte boundary before CUDA 13, since then at one of 128.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(128))]
pub(super) struct TensorMap([u64; 16]);

const _: () = assert!(
    size_of::<TensorMap>() == size_of::<sys::CUtensorMap>()
        && align_of::<TensorMap>() >= align_of::<sys::CUtensorMap>()
);

impl TensorMap {
    /// The map of a tensor without elements.
    pub(super) const EMPTY: Self = TensorMap([0; 16]);

    /// Encodes the map of a tensor at an address; `tensor` was checked against its memory.
    pub(super) fn encode(address: u64, tensor: &Tensor) -> Result<Self, Error> {
        use sys::{CUtensorMapDataType as Type, CUtensorMapSwizzle as Swizzle};
        let mut map = Self::EMPTY;
        let shape = &tensor.shape;
        if shape.is_empty() {
            return Ok(map);
        }
        let data_type = match tensor.dtype {
            dtype::F32 => Type::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
            dtype::F16 => Type::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            _ => Type::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        };
        let swizzle = if shape.swizzle_128 {
            Swizzle::CU_TENSOR_MAP_SWIZZLE_128B
        } else {
            Swizzle::CU_TENSOR_MAP_SWIZZLE_NONE
        };
        let planes = shape.planes.map_or((0, 0), |planes| (planes.count, planes.bytes));
        let (extents, strides) = ([shape.columns, shape.rows, planes.0], [shape.row_bytes, planes.1]);
        let (tile, steps) = ([shape.box_columns, shape.box_rows, 1], [1, 1, 1]);
        // SAFETY: the map is as large and as aligned as the driver's; the arrays live through the call and have as many elements
        // as three dimensions need. The address is only written into the map; who launches with it vouches for the memory.
        let result = unsafe {
            sys::cuTensorMapEncodeTiled(
                (&raw mut map).cast(),
                data_type,
                if shape.planes.is_some() { 3 } else { 2 },
                address as *mut c_void,
                extents.as_ptr(),
                strides.as_ptr(),
                tile.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        check("cuTensorMapEncodeTiled", result)?;
        Ok(map)
    }
}
