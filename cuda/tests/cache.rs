//! The disk cache and prebuilt folders, over a stand-in for NVRTC that counts its compiles.

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use longkv_cuda::Error;
use longkv_cuda::cache::{Cache, Cubins, Origin, key, set_notice};
use longkv_cuda::compile::{Cubin, source_digest};
use longkv_cuda::nvrtc::Nvrtc;
use longkv_cuda::prebuilt::{MANIFEST, Prebuilt, PrebuiltWriter, file_name};
use longkv_cuda::probe::Version;
use longkv_cuda::table::{Arch, ArchClass, Constant, Instance, Kernel};

const SM_80: Arch = Arch::new(8, 0);

static KERNEL: Kernel = Kernel {
    name: "cached",
    group: "test",
    source: "#include \"core.cuh\"",
    constants: &[Constant { name: "WIDTH", allowed: &[1, 2, 3, 4] }],
    arch: ArchClass::Portable,
    threads: 128,
    rows: &[],
};
static REJECTED: Kernel = Kernel { name: "rejected", source: "#error", constants: &[], ..KERNEL };

fn instance(width: i64) -> Instance {
    Instance { kernel: &KERNEL, values: vec![width] }
}

/// The stand-in. Tests that count share it, so they take turns.
fn fake() -> Option<(std::sync::MutexGuard<'static, ()>, support::FakeNvrtc)> {
    static TURN: Mutex<()> = Mutex::new(());
    let turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    support::FakeNvrtc::open().map(|fake| (turn, fake))
}

/// Cubins as a new process would have them.
fn process(folder: &Path, nvrtc: &'static Nvrtc) -> Cubins {
    Cubins::new(None, Cache::at(folder), Some(nvrtc))
}

fn only_file(folder: &Path) -> PathBuf {
    let files: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(files.len(), 1, "{files:?}");
    files[0].clone()
}

#[test]
fn a_second_process_finds_what_the_first_compiled() {
    let Some((_turn, fake)) = fake() else { return };
    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("made/when/needed");
    let before = fake.compiles();
    let version = Version::new(13, 0);
    let first = process(&folder, fake.nvrtc).get(&instance(1), SM_80).unwrap();
    assert_eq!(first.origin, Origin::Compiled { nvrtc: version });
    assert!(first.cubin.starts_with(b"test/cached.cu --std=c++17 -DWIDTH=1 --gpu-architecture=sm_80"));
    let second = process(&folder, fake.nvrtc).get(&instance(1), SM_80).unwrap();
    assert_eq!(second.origin, Origin::Cache { nvrtc: version });
    assert_eq!(second.cubin, first.cubin);
    assert_eq!(fake.compiles() - before, 1);
    let name = only_file(&folder).file_name().unwrap().to_str().unwrap().to_string();
    assert!(name.starts_with("cached-") && name.ends_with(".cubin"), "{name}");
}

#[test]
fn keys_tell_apart_all_that_decides_a_cubin() {
    let (a, b) = (Version::new(13, 0), Version::new(12, 8));
    static OTHER: Kernel = Kernel { source: "#include \"core.cuh\"\n", ..KERNEL };
    let other = Instance { kernel: &OTHER, values: vec![1] };
    let keys = [
        key(&instance(1), SM_80, a),
        key(&instance(2), SM_80, a),
        key(&instance(1), Arch::new(8, 9), a),
        key(&instance(1), SM_80, b),
        key(&other, SM_80, a),
    ];
    let distinct: std::collections::HashSet<_> = keys.iter().collect();
    assert_eq!(distinct.len(), keys.len());
    assert_eq!(keys[0], key(&instance(1), SM_80, a));
}

#[test]
fn a_damaged_file_is_compiled_anew_and_replaced() {
    let Some((_turn, fake)) = fake() else { return };
    let folder = tempfile::tempdir().unwrap();
    let good = process(folder.path(), fake.nvrtc).get(&instance(1), SM_80).unwrap().cubin.clone();
    let file = only_file(folder.path());
    let whole = fs::read(&file).unwrap();
    let cache = Cache::at(folder.path());
    let key = key(&instance(1), SM_80, Version::new(13, 0));
    assert_eq!(cache.load("cached", key).as_ref(), Some(&good));
    for cut in 0..whole.len() {
        fs::write(&file, &whole[..cut]).unwrap();
        assert_eq!(cache.load("cached", key), None, "cut to {cut} of {} bytes", whole.len());
    }
    for position in 0..whole.len() {
        let mut flipped = whole.clone();
        flipped[position] ^= 0x10;
        fs::write(&file, &flipped).unwrap();
        assert_eq!(cache.load("cached", key), None, "byte {position} flipped");
    }
    let longer = [whole.as_slice(), b"x"].concat();
    fs::write(&file, &longer).unwrap();
    assert_eq!(cache.load("cached", key), None, "one byte more");

    let before = fake.compiles();
    let again = process(folder.path(), fake.nvrtc).get(&instance(1), SM_80).unwrap();
    assert_eq!((again.cubin.as_slice(), fake.compiles() - before), (good.as_slice(), 1));
    assert_eq!(fs::read(only_file(folder.path())).unwrap(), whole, "the damaged file is replaced");
}

#[test]
fn a_file_under_the_wrong_name_is_not_taken() {
    let Some((_turn, fake)) = fake() else { return };
    let folder = tempfile::tempdir().unwrap();
    process(folder.path(), fake.nvrtc).get(&instance(1), SM_80).unwrap();
    let wrong = key(&instance(2), SM_80, Version::new(13, 0));
    fs::rename(only_file(folder.path()), folder.path().join(format!("cached-{wrong}.cubin"))).unwrap();
    assert_eq!(Cache::at(folder.path()).load("cached", wrong), None);
}

#[test]
fn a_cache_that_cannot_be_written_is_told_once() {
    static TOLD: Mutex<Vec<String>> = Mutex::new(Vec::new());
    set_notice(|sentence| TOLD.lock().unwrap().push(sentence.to_string()));
    let Some((_turn, fake)) = fake() else { return };
    let parent = tempfile::tempdir().unwrap();
    // A file where the folder should be: refused even to root, unlike a folder without permissions.
    let folder = parent.path().join("file");
    fs::write(&folder, "").unwrap();
    let cubins = process(&folder, fake.nvrtc);
    let before = fake.compiles();
    for width in [1, 2, 3] {
        assert!(matches!(cubins.get(&instance(width), SM_80).unwrap().origin, Origin::Compiled { .. }));
    }
    assert_eq!(fake.compiles() - before, 3);
    let told: Vec<_> = TOLD.lock().unwrap().iter().filter(|line| line.contains("/file (")).cloned().collect();
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].starts_with("kernels are not cached in "), "{told:?}");
    assert_eq!(fs::read(&folder).unwrap(), b"");
}

#[test]
fn no_cache_is_a_choice() {
    let Some((_turn, fake)) = fake() else { return };
    let before = fake.compiles();
    for _ in 0..2 {
        let cubins = Cubins::new(None, Cache::none(), Some(fake.nvrtc));
        cubins.get(&instance(1), SM_80).unwrap();
        cubins.get(&instance(1), SM_80).unwrap();
    }
    assert_eq!(fake.compiles() - before, 2, "once per process");
}

#[test]
fn racing_threads_compile_once() {
    let Some((_turn, fake)) = fake() else { return };
    let folder = tempfile::tempdir().unwrap();
    let cubins = process(folder.path(), fake.nvrtc);
    let before = fake.compiles();
    std::thread::scope(|scope| {
        for thread in 0..12 {
            let cubins = &cubins;
            scope.spawn(move || cubins.get(&instance(1 + thread % 2), SM_80).unwrap());
        }
    });
    assert_eq!(fake.compiles() - before, 2, "two instances");
    let files = fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(files, 2, "no drafts are left");
}

#[test]
fn a_failed_compile_is_not_remembered() {
    let Some((_turn, fake)) = fake() else { return };
    let folder = tempfile::tempdir().unwrap();
    let cubins = process(folder.path(), fake.nvrtc);
    let rejected = Instance { kernel: &REJECTED, values: Vec::new() };
    let before = fake.compiles();
    for _ in 0..2 {
        let error = cubins.get(&rejected, SM_80).unwrap_err();
        assert!(matches!(&error, Error::Compile { log, .. } if log.contains("#error directive")), "{error}");
    }
    assert_eq!(fake.compiles() - before, 2);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

/// A folder with the cubins of widths 1 and 2.
fn prebuilt_folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = PrebuiltWriter::create(folder.path()).unwrap();
    for width in [1, 2] {
        let bytes = format!("prebuilt {width}").into_bytes();
        writer.add(&instance(width), SM_80, &Cubin { bytes, log: String::new() }).unwrap();
    }
    assert_eq!(writer.finish(Version::new(12, 8)).unwrap(), folder.path().join(MANIFEST));
    folder
}

#[test]
fn prebuilt_cubins_need_no_compiler() {
    let Some((_turn, fake)) = fake() else { return };
    let folder = prebuilt_folder();
    let before = fake.compiles();
    let prebuilt = Prebuilt::open(folder.path()).unwrap();
    let cubins = Cubins::new(Some(prebuilt), Cache::none(), Some(fake.nvrtc));
    let found = cubins.get(&instance(2), SM_80).unwrap();
    assert_eq!(found.cubin, b"prebuilt 2");
    let origin = Origin::Prebuilt { folder: folder.path().to_path_buf(), nvrtc: "12.8".to_string() };
    assert_eq!(found.origin, origin);
    assert_eq!(fake.compiles() - before, 0);
    // What the folder does not list is compiled: another constant, another architecture.
    for (width, arch) in [(3, SM_80), (1, Arch::new(8, 9))] {
        assert!(matches!(cubins.get(&instance(width), arch).unwrap().origin, Origin::Compiled { .. }));
    }
    assert_eq!(fake.compiles() - before, 2);
}

#[test]
fn a_prebuilt_cubin_of_other_sources_is_an_error() {
    let folder = prebuilt_folder();
    let manifest = folder.path().join(MANIFEST);
    let text = fs::read_to_string(&manifest).unwrap();
    let ours = source_digest(&instance(1)).to_string();
    assert!(text.contains(&ours));
    let theirs = format!("{:0>64}", "abc");
    fs::write(&manifest, text.replace(&ours, &theirs)).unwrap();
    let prebuilt = Prebuilt::open(folder.path()).unwrap();
    match prebuilt.get(&instance(1), SM_80).unwrap_err() {
        Error::Stale { kernel, arch, expected, found, .. } => {
            assert_eq!((kernel.as_str(), arch.as_str()), ("cached.width=1", "sm_80"));
            assert!(ours.starts_with(&expected) && theirs.starts_with(&found));
        }
        other => panic!("{other}"),
    }
    assert_eq!(prebuilt.get(&instance(2), SM_80).unwrap().as_deref(), Some(&b"prebuilt 2"[..]));
}

#[test]
fn a_damaged_prebuilt_folder_is_an_error() {
    let first = file_name(&instance(1), SM_80);
    let edit_manifest = |from: &'static str, to: &'static str| {
        move |folder: &Path| {
            let path = folder.join(MANIFEST);
            let text = fs::read_to_string(&path).unwrap();
            assert!(text.contains(from), "{text}");
            fs::write(&path, text.replacen(from, to, 1)).unwrap();
        }
    };
    type Damage = Box<dyn Fn(&Path)>;
    let cases: Vec<(&str, Damage, &str)> = vec![
        (
            "no manifest",
            Box::new(|f| fs::remove_file(f.join(MANIFEST)).unwrap()),
            "manifest.txt: No such file",
        ),
        ("empty", Box::new(|f| fs::write(f.join(MANIFEST), "").unwrap()), "starts with \"\""),
        (
            "later format",
            Box::new(edit_manifest("cubins 1", "cubins 2")),
            "starts with \"longkv-cubins 2\", not \"longkv-cubins 1\"",
        ),
        ("no NVRTC", Box::new(edit_manifest("nvrtc ", "nv ")), "does not say which NVRTC"),
        ("cut line", Box::new(edit_manifest("cached.width=1.sm_80.cubin ", "")), "has the damaged line"),
        (
            "changed cubin",
            Box::new({
                let first = first.clone();
                move |f| fs::write(f.join(&first), "prebuilt X").unwrap()
            }),
            "is not the file of manifest.txt",
        ),
        (
            "missing cubin",
            Box::new(move |f| fs::remove_file(f.join(&first)).unwrap()),
            "cached.width=1.sm_80.cubin: No such file",
        ),
    ];
    for (name, damage, expected) in cases {
        let folder = prebuilt_folder();
        damage(folder.path());
        let answer = Prebuilt::open(folder.path()).and_then(|prebuilt| prebuilt.get(&instance(1), SM_80));
        let error = answer.expect_err(name);
        assert!(matches!(error, Error::Prebuilt { .. }), "{name}: {error:?}");
        assert!(error.to_string().contains(expected), "{name}: {error}");
    }
}

#[test]
fn an_interrupted_rebuild_leaves_no_manifest() {
    let folder = prebuilt_folder();
    drop(PrebuiltWriter::create(folder.path()).unwrap());
    assert!(matches!(Prebuilt::open(folder.path()), Err(Error::Prebuilt { .. })));
}
