//! The probe against libraries that are broken in every way it tells apart.

mod support;

use longkv_cuda::probe::{self, Unavailable, Version};
use longkv_cuda::table::Arch;

/// The probe's answer to `tests/fake/stub.cpp`, built with these options.
fn probe(options: &[&str]) -> Option<Result<probe::Driver, Unavailable>> {
    let library = support::library("stub.cpp", "libstub.so", options)?;
    Some(probe::open(&[library.to_str().expect("paths here are text")]))
}

#[test]
fn every_way_to_be_unavailable_has_its_error() {
    let cases: &[(&str, &[&str], &str)] = &[
        ("no symbols", &["-DNO_SYMBOLS"], "is not a CUDA driver: it has no symbol cuInit"),
        ("one symbol missing", &["-DNO_ATTRIBUTES"], "it has no symbol cuDeviceGetAttribute"),
        ("NVIDIA's stub", &["-DINIT=34"], "is not a CUDA driver: cuInit returned 34"),
        ("no device", &["-DINIT=100"], "does not start: cuInit returned 100 (no device)"),
        (
            "mismatch",
            &["-DINIT=803"],
            "cuInit returned 803 (the driver library and the kernel module differ)",
        ),
        ("unknown failure", &["-DINIT=999"], "does not start: cuInit returned 999"),
        ("empty", &["-DCOUNT=0"], "the CUDA driver has no device"),
        ("count fails with no device", &["-DCOUNT_RESULT=100"], "the CUDA driver has no device"),
        (
            "too old",
            &["-DVERSION=11080"],
            "the driver supports CUDA 11.8, this crate needs CUDA 12.0 or later",
        ),
    ];
    for (name, options, expected) in cases {
        let Some(answer) = probe(options) else { return };
        let text = answer.expect_err(name).to_string();
        assert!(text.contains(expected), "{name}: {text:?} does not contain {expected:?}");
    }
}

#[test]
fn a_missing_library_lists_what_was_tried() {
    let names = ["libno-such-driver.so", "/no/such/folder/libcuda.so.1"];
    let Err(Unavailable::NoDriverLibrary { tried }) = probe::open(&names) else { panic!("it exists") };
    assert_eq!(tried.len(), 2);
    for (name, words) in names.iter().zip(&tried) {
        assert!(words.starts_with(name) && words.len() > name.len() + 10, "{words:?}");
    }
}

#[test]
fn the_first_library_that_exists_is_judged() {
    let Some(broken) = support::library("stub.cpp", "libstub.so", &["-DNO_SYMBOLS"]) else { return };
    let Some(good) = support::library("stub.cpp", "libstub.so", &[]) else { return };
    let (broken, good) = (broken.to_str().unwrap(), good.to_str().unwrap());
    assert!(probe::open(&["libno-such-driver.so", good]).is_ok());
    // cudarc would open the broken one too, so the good one behind it is no help.
    assert!(matches!(probe::open(&[broken, good]), Err(Unavailable::StubDriver { .. })));
}

#[test]
fn devices_are_described_and_old_ones_refused() {
    let Some(driver) = probe(&["-DVERSION=12080"]) else { return };
    let driver = driver.expect("nothing is wrong with it");
    assert_eq!(driver.version(), Version::new(12, 8));
    let first = driver.device(0).expect("sm_90 is supported");
    assert_eq!((first.name.as_str(), first.arch, first.sm_count), ("First", Arch::new(9, 0), 132));
    assert_eq!(first.shared_limit, 232448);
    assert_eq!(driver.devices().len(), 2);
    let error = driver.device(1).unwrap_err();
    assert_eq!(error.to_string(), "device 1 is sm_75, the kernels need sm_80 or later");
    assert_eq!(driver.device(2), Err(Unavailable::NoSuchDevice { ordinal: 2, devices: 2 }));
}

#[test]
fn the_machine_is_probed_without_panic() {
    // Whatever the machine has: twice the same answer, and a sentence where there is none.
    match (probe::driver(), probe::driver()) {
        (Ok(first), Ok(second)) => assert!(std::ptr::eq(first, second)),
        (Err(first), Err(second)) => {
            assert_eq!(first, second);
            assert!(first.to_string().len() > 20, "{first}");
        }
        (first, second) => panic!("two answers: {first:?}, then {second:?}"),
    }
}
