//! Kernels through the real NVRTC.

mod support;

use longkv_cuda::Error;
use longkv_cuda::compile::{self, compile, resources};
use longkv_cuda::nvrtc::{Failure, Input, Nvrtc};
use longkv_cuda::probe::Unavailable;
use longkv_cuda::table::{self, Arch, ArchClass, Constant, Instance, Kernel};

const SM_80: Arch = Arch::new(8, 0);
const SM_90: Arch = Arch::new(9, 0);

/// A kernel that is not in the table.
const fn kernel(name: &'static str, source: &'static str, arch: ArchClass) -> Kernel {
    Kernel { name, group: "test", source, constants: &[], arch, threads: 128, rows: &[] }
}

fn instance(kernel: &'static Kernel) -> Instance {
    Instance { kernel, values: Vec::new() }
}

#[test]
fn a_shipped_row_compiles_the_same_twice() {
    let Some(nvrtc) = support::nvrtc() else { return };
    let (instance, row) = table::shipped().next().expect("the table has rows");
    let cubin = compile(nvrtc, &instance, SM_80).unwrap();
    assert_eq!(&cubin.bytes[..4], b"\x7fELF");
    assert_eq!(cubin.log, "", "the kernel compiles without warnings");
    assert_eq!(compile(nvrtc, &instance, SM_80).unwrap(), cubin);
    assert_ne!(compile(nvrtc, &instance, SM_90).unwrap(), cubin);
    let used = resources(nvrtc, &instance, SM_80).unwrap();
    assert!((1..=row.registers).contains(&used.registers), "{used:?}");
    assert_eq!((used.spill_stores, used.spill_loads), (0, 0));
}

#[test]
fn constants_and_architecture_reach_the_source() {
    static KERNEL: Kernel = Kernel {
        constants: &[Constant { name: "WIDTH", allowed: &[3] }],
        ..kernel(
            "constants",
            "#include \"core.cuh\"\n\
             static_assert(WIDTH == 3, \"WIDTH\");\n\
             static_assert(__cplusplus == 201703L, \"C++17\");\n\
             #ifdef __CUDA_ARCH__\n\
             static_assert(__CUDA_ARCH__ == 900, \"arch\");\n\
             #ifndef __CUDA_ARCH_FEAT_SM90_ALL\n#error \"compute capability 9.0 is compiled as sm_90a\"\n#endif\n\
             #endif\n\
             KERNEL(128, 1) constants(uint32_t* out) { out[threadIdx.x] = WIDTH; }",
            ArchClass::Hopper,
        )
    };
    let Some(nvrtc) = support::nvrtc() else { return };
    let instance = Instance { kernel: &KERNEL, values: vec![3] };
    compile(nvrtc, &instance, SM_90).unwrap();
    assert_eq!(compile::options(&instance), ["--std=c++17", "-DWIDTH=3"]);
    let error = compile(nvrtc, &Instance { kernel: &KERNEL, values: vec![4] }, SM_90).unwrap_err();
    assert!(error.to_string().contains("constants.width=4 does not compile for sm_90a"), "{error}");
}

#[test]
fn a_rejected_source_gives_the_whole_log() {
    static KERNEL: Kernel =
        kernel("broken", "KERNEL\n\nint first = \"one\";\nint second = nowhere;\n", ArchClass::Portable);
    let Some(nvrtc) = support::nvrtc() else { return };
    let Err(Error::Compile { kernel, arch, log }) = compile(nvrtc, &instance(&KERNEL), SM_80) else {
        panic!("it compiles")
    };
    assert_eq!((kernel.as_str(), arch.as_str()), ("broken", "sm_80"));
    for words in ["test/broken.cu(", "\"one\"", "\"nowhere\" is undefined"] {
        assert!(log.contains(words), "{words:?} is not in\n{log}");
    }
    let option = ["--no-such-option".to_string()];
    let input = Input { name: "x.cu", source: "", headers: &[], options: &option };
    let Err(Failure::Rejected(log)) = nvrtc.cubin(&input) else { panic!("the option is known") };
    assert!(log.contains("no-such-option"), "{log}");
}

#[test]
fn architectures_that_cannot_be_are_refused() {
    static PORTABLE: Kernel = kernel("portable", "", ArchClass::Portable);
    static HOPPER: Kernel = kernel("hopper", "", ArchClass::Hopper);
    let Some(nvrtc) = support::nvrtc() else { return };
    let old = compile(nvrtc, &instance(&PORTABLE), Arch::new(7, 5)).unwrap_err();
    assert_eq!(old.to_string(), "portable needs sm_80 or later, the device is sm_75");
    let wrong = compile(nvrtc, &instance(&HOPPER), SM_80).unwrap_err();
    assert_eq!(wrong.to_string(), "hopper needs sm_90a, the device is sm_80");
    let future = Arch::new(99, 0);
    match compile(nvrtc, &instance(&PORTABLE), future).unwrap_err() {
        Error::NvrtcArch { arch, version, known } => {
            assert_eq!((arch, version), (future, nvrtc.version()));
            assert!(known.contains(&80), "{known:?}");
        }
        other => panic!("{other}"),
    }
}

#[test]
fn spills_stack_and_static_shared_memory_are_seen() {
    // 64 values live at once in 32 registers, an array indexed at run time, and 512 bytes of static shared memory.
    static KERNEL: Kernel = kernel(
        "greedy",
        "extern \"C\" __global__ void __launch_bounds__(1024, 2) greedy(float* out, const float* in, int at) {\n\
           __shared__ float shared[128];\n\
           float a[64];\n\
           for (int i = 0; i < 64; ++i) a[i] = in[i * 1024 + threadIdx.x];\n\
           shared[threadIdx.x % 128] = a[at % 64];\n\
           __syncthreads();\n\
           for (int r = 0; r < 9; ++r) {\n\
             #pragma unroll\n\
             for (int i = 0; i < 63; ++i) a[i] = a[i] * a[i + 1] + shared[(threadIdx.x + r + i) % 128];\n\
           }\n\
           float b[40];\n\
           #pragma unroll\n\
           for (int i = 0; i < 40; ++i) b[i] = in[i * 7777 + threadIdx.x];\n\
           __syncthreads();\n\
           #pragma unroll\n\
           for (int i = 0; i < 40; ++i) out[i * 999 + threadIdx.x] = b[i] * b[39 - i] + a[i];\n\
         }",
        ArchClass::Portable,
    );
    let Some(nvrtc) = support::nvrtc() else { return };
    let used = resources(nvrtc, &instance(&KERNEL), SM_80).unwrap();
    assert_eq!((used.registers, used.shared), (32, 512), "{used:?}");
    assert!(used.stack >= 256 && used.spill_stores > 0 && used.spill_loads > 0, "{used:?}");
}

#[test]
fn ptx_can_be_looked_at() {
    let Some(nvrtc) = support::nvrtc() else { return };
    let options = ["--gpu-architecture=compute_80".to_string()];
    let source = "extern \"C\" __global__ void k() {}";
    let ptx = nvrtc.ptx(&Input { name: "k.cu", source, headers: &[], options: &options }).unwrap();
    assert!(ptx.contains(".visible .entry k()"), "{ptx}");
}

#[test]
fn places_without_a_compiler_say_so() {
    let folder = tempfile::tempdir().unwrap();
    let empty = Nvrtc::open(folder.path()).unwrap_err().to_string();
    assert!(empty.contains("no libnvrtc.so in this folder") && empty.contains("LONGKV_NVRTC"), "{empty}");
    let missing = folder.path().join("libnvrtc.so.13");
    let both = Nvrtc::first(&[missing.clone(), folder.path().to_path_buf()]).unwrap_err();
    let Unavailable::NvrtcNotFound { tried } = &both else { panic!("{both:?}") };
    assert_eq!(tried.len(), 2, "{tried:?}");
    assert!(tried[0].starts_with(missing.to_str().unwrap()), "{tried:?}");
    let Some(other) = support::library("stub.cpp", "libstub.so", &[]) else { return };
    let unusable = Nvrtc::first(std::slice::from_ref(&other)).unwrap_err().to_string();
    assert!(unusable.contains("is not a usable NVRTC: it has no symbol nvrtcVersion"), "{unusable}");
}

#[test]
fn failures_that_are_not_the_sources_keep_call_and_code() {
    static KERNEL: Kernel = kernel("odd", "INTERNAL", ArchClass::Portable);
    let Some(fake) = support::FakeNvrtc::open() else { return };
    let error = compile(fake.nvrtc, &instance(&KERNEL), SM_80).unwrap_err();
    let expected = Error::Nvrtc { call: "nvrtcCompileProgram", code: 11, log: "out of sorts".to_string() };
    assert_eq!(error, expected);
    assert_eq!(error.to_string(), "nvrtcCompileProgram failed with NVRTC error 11:\nout of sorts");
    let silent = resources(fake.nvrtc, &table::shipped().next().unwrap().0, SM_80).unwrap_err();
    assert!(silent.to_string().contains("has no register count"), "{silent}");
}
