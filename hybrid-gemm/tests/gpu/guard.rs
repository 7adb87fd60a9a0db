//! Weights that end where their mapping ends: behind it lies a page that nobody may touch.

use std::ffi::c_void;

use cuda::driver::Registered;
use cuda::memory::View;
use emulator::Order;
use emulator::rig::{EmulatorRig, Rig, gpu_or_skip};
use half::f16;
use hybrid_gemm::gpu::Plan;
use hybrid_gemm::{
    DType, EpilogueSpec, Format, GemmConfig, MappedFile, Path, PathChoice, Residency, Tiling, Weights,
};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use crate::common::{device, random};
use crate::product::{Operands, call_each_on, fit, verify, weights};

/// Bytes right before a page without access.
struct Guarded {
    base: *mut c_void,
    mapped: usize,
    start: usize,
    len: usize,
}

// SAFETY: the mapping belongs to nobody else, and is only read after it was filled.
unsafe impl Send for Guarded {}
// SAFETY: as above.
unsafe impl Sync for Guarded {}

impl Guarded {
    fn new(bytes: &[u8]) -> Self {
        // SAFETY: asks for a number.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
        let room = bytes.len().next_multiple_of(page);
        let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping at a place of the system's choice.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), room + page, access, kind, -1, 0) };
        assert_ne!(base, libc::MAP_FAILED, "no memory");
        let guarded = Guarded { base, mapped: room + page, start: room - bytes.len(), len: bytes.len() };
        // SAFETY: within the mapping.
        let last = unsafe { base.byte_add(room) };
        // SAFETY: the last page of the mapping, which nobody uses.
        let closed = unsafe { libc::mprotect(last, page, libc::PROT_NONE) };
        assert_eq!(closed, 0, "the guard");
        // SAFETY: the bytes end where the guard begins.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), guarded.first(), bytes.len()) };
        guarded
    }

    fn first(&self) -> *mut u8 {
        // SAFETY: within the mapping.
        unsafe { self.base.cast::<u8>().add(self.start) }
    }
}

impl AsRef<[u8]> for Guarded {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: the mapping holds this many bytes from there on, and nobody writes them any more.
        unsafe { std::slice::from_raw_parts(self.first(), self.len) }
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`, unmapped once.
        unsafe { libc::munmap(self.base, self.mapped) };
    }
}

/// Packed columns and the rows of a checkpoint, in place and by slabs, for both kernels.
fn cases() -> Vec<(&'static str, Weights, usize, Path)> {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("model.safetensors");
    let (n, k) = (100, 200);
    let values: Vec<f16> = random(55, n * k);
    let view = TensorView::new(Dtype::F16, vec![n, k], bytemuck::cast_slice(&values)).expect("a tensor");
    safetensors::serialize_to_file([("w", view)], None, &path).expect("a file");
    let tensor = MappedFile::open(&path).and_then(|file| file.tensor("w")).expect("the tensor");
    let rows = Weights::in_place(&tensor, Residency::Host).expect("weights");
    let tiling = Tiling::new(n, k, Format::Float(DType::F16)).expect("a tiling");
    let packed = weights::<f16>(56, tiling, Residency::Host);
    let direct = |alpha| Path::Direct { alpha };
    vec![
        ("rows, few tokens", rows.clone(), 16, direct(1.0)),
        ("rows, weight-stationary", rows.clone(), 300, direct(0.0)),
        ("rows, staged", rows, 16, Path::Staged { slab_columns: 1 }),
        ("packed, few tokens", packed.clone(), 16, direct(1.0)),
        ("packed, both dataflows", packed, 300, direct(0.5)),
    ]
}

fn check<R: Rig>(rig: &R, (case, weights, tokens, path): (&str, Weights, usize, Path), host: &View<'_, u8>) {
    let case = format!("{case}, on {}", rig.name());
    let operands = Operands::<f16, f32>::new(57, tokens, weights, EpilogueSpec::plain(DType::F32));
    let config = fit(
        rig,
        GemmConfig {
            epilogue: EpilogueSpec::plain(DType::F32),
            path: PathChoice::Only(path),
            ..GemmConfig::new(tokens, DType::F16, device(3))
        },
    );
    let plan = Plan::new(*operands.weights.placement(), config).expect("a plan");
    let calls = [plan.schedules(tokens).expect("schedules")];
    let outcomes = call_each_on(rig, &plan, &operands, host, &calls, false).expect("a launch");
    verify(&case, &plan, &operands, tokens, &outcomes[0]);
}

#[test]
fn emulator() {
    emulator::emulator_or_skip!();
    for order in [Order::Forward, Order::Reverse] {
        let rig = EmulatorRig::new(order);
        for case in cases() {
            let guarded = Guarded::new(case.1.host_bytes());
            check(&rig, case, &View::host(guarded.as_ref()));
        }
    }
}

#[test]
fn gpu() {
    let Some(rig) = gpu_or_skip("guard") else { return };
    for case in cases() {
        let guarded = Guarded::new(case.1.host_bytes());
        let registered = Registered::<u8, _>::read_only(rig.device(), guarded).expect("pinned pages");
        check(&rig, case, &registered.view());
    }
}
