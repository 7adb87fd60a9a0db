//! Compiles the runtime and, for every emulated row of the kernel table and every planted kernel of the tests, one
//! translation unit; writes the registry that maps a row's label to its entry.
//!
//! Features: `sanitize` builds for AddressSanitizer and UndefinedBehaviorSanitizer instead of the checkers, `off` leaves the
//! emulator out. Environment: `EMULATOR_ONLY=GROUP[,GROUP…]` compiles only the kernels of these folders, for whoever works on one crate.

use std::collections::hash_map::DefaultHasher;
use std::env;
use std::fmt::Write as _;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

use cuda::table::{self, Instance};

mod planted {
    include!("tests/planted/list.rs");
}

fn main() {
    println!("cargo:rustc-check-cfg=cfg(no_emulator)");
    println!("cargo:rustc-check-cfg=cfg(emulator_sanitize)");
    println!("cargo:rerun-if-env-changed=EMULATOR_ONLY");
    for folder in ["build.rs", "runtime", "tests/planted", "../kernels", "../include"] {
        println!("cargo:rerun-if-changed={folder}");
    }
    if let Err(reason) = build() {
        println!("cargo:rustc-cfg=no_emulator");
        let reason = reason.replace('\n', " ");
        println!("cargo:rustc-env=EMULATOR_UNAVAILABLE={reason}");
        println!("cargo:warning=the emulator is left out: {reason}");
    }
}

/// Ends with a reason where there is no compiler for the emulator; panics where the compiler rejects a source.
fn build() -> Result<(), String> {
    if env::var_os("CARGO_FEATURE_OFF").is_some() {
        return Err("it was built with the feature `off`".to_string());
    }
    let target = env::var("TARGET").unwrap_or_default();
    if !(target.starts_with("x86_64") && target.contains("linux")) {
        return Err(format!("it needs x86-64 Linux, the target is {target}"));
    }
    let compiler = cc::Build::new().cpp(true).try_get_compiler().map_err(|error| error.to_string())?;
    let version = compiler
        .to_command()
        .arg("--version")
        .output()
        .map_err(|error| format!("no C++ compiler: {error}"))?;
    if !compiler.is_like_gnu() {
        return Err("it needs g++, whose instrumentation it builds on".to_string());
    }

    let sanitize = env::var_os("CARGO_FEATURE_SANITIZE").is_some();
    if sanitize {
        println!("cargo:rustc-cfg=emulator_sanitize");
        link_sanitizers(&compiler);
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let units = units();
    fs::write(out.join("registry.rs"), registry(&units)).expect("cannot write the registry");

    let mut objects = compile_kernels(&out, &units, sanitize, &version.stdout);
    objects.extend(compile_runtime(sanitize));
    let mut archive = cc::Build::new();
    archive.cpp(true).cargo_metadata(true);
    for object in &objects {
        archive.object(object);
    }
    archive.compile("longkv_emulator");
    Ok(())
}

/// One emulated variant.
struct Unit {
    label: String,
    /// Namespace, and the name of the entry.
    space: String,
    text: String,
}

fn units() -> Vec<Unit> {
    let shipped = table::shipped().filter(|(_, row)| row.emulated).map(|(instance, _)| instance);
    let planted = planted::KERNELS.iter().flat_map(|kernel| {
        kernel.rows.iter().map(move |row| Instance { kernel, values: row.values.to_vec() })
    });
    let only = env::var("EMULATOR_ONLY").unwrap_or_default();
    // Tests must know what was left out.
    println!("cargo:rustc-env=EMULATOR_GROUPS={only}");
    let wanted = |group: &str| only.is_empty() || only.split(',').any(|name| name == group);
    shipped
        .chain(planted)
        .filter(|instance| wanted(instance.kernel.group))
        .map(|instance| unit(&instance))
        .collect()
}

fn unit(instance: &Instance) -> Unit {
    let label = instance.label();
    let space: String = label.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
    let (group, name) = (instance.kernel.group, instance.kernel.name);
    let mut text = format!("#include \"emulator.h\"\nnamespace {space} {{\n");
    for (constant, value) in instance.constants() {
        writeln!(text, "#define {constant} {value}").expect("a String takes everything");
    }
    writeln!(text, "#include \"{group}/{name}.cu\"\n}}\nEMULATOR_ENTRY({space}, {name})").expect("as above");
    Unit { label, space, text }
}

fn registry(units: &[Unit]) -> String {
    let mut text = String::from("unsafe extern \"C\" {\n");
    for unit in units {
        text += &format!("    static emulator_entry_{}: Entry;\n", unit.space);
    }
    text += "}\n\npub(crate) fn entry(label: &str) -> Option<*const Entry> {\n    Some(match label {\n";
    for unit in units {
        text += &format!("        {:?} => &raw const emulator_entry_{},\n", unit.label, unit.space);
    }
    text + "        _ => return None,\n    })\n}\n"
}

/// What both the kernels and the runtime are compiled with.
fn base(sanitize: bool) -> cc::Build {
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").include("runtime").warnings(false).cargo_metadata(false);
    // Without contraction `a * b + c` rounds twice, as the `_rn` intrinsics of bit-exact kernels do.
    build
        .flag("-ffp-contract=off")
        .flag("-fno-omit-frame-pointer")
        .flag("-ftls-model=initial-exec")
        .flag("-mpopcnt");
    if sanitize {
        build.define("EMULATOR_SANITIZE", None);
        build.flag("-fsanitize=address,undefined").flag("-fno-sanitize-recover=all");
    }
    build
}

fn compile_runtime(sanitize: bool) -> Vec<PathBuf> {
    let mut sources: Vec<PathBuf> = files_below(Path::new("runtime"));
    sources.retain(|path| path.extension().is_some_and(|e| e == "cpp"));
    base(sanitize)
        .opt_level(2)
        .debug(true)
        .flag("-Wall")
        .flag("-Wextra")
        .files(sources)
        .compile_intermediates()
}

/// Compiles each unit whose text, headers or flags have changed since the last build.
fn compile_kernels(out: &Path, units: &[Unit], sanitize: bool, version: &[u8]) -> Vec<PathBuf> {
    let mut build = base(sanitize);
    build.include("../kernels").include("../include").include("tests");
    build
        .flag("-Wall")
        .flag("-Wextra")
        .flag("-Wno-unknown-pragmas")
        .flag("-Wno-unused-function")
        .flag("-Wno-psabi");
    if sanitize {
        // Half the time to compile: nobody asks for inlined calls here, as the checkers' reports do.
        build.opt_level(1).debug(false).flag("-g1");
    } else {
        build.opt_level(2).debug(true);
        build.flag("-fsanitize=thread").flag("--param=tsan-instrument-func-entry-exit=0");
    }
    let mut common = DefaultHasher::new();
    (sanitize, version, include_str!("build.rs")).hash(&mut common);

    let folder = out.join("units");
    fs::create_dir_all(&folder).expect("cannot create a folder for the translation units");
    let mut objects = Vec::new();
    let mut stale = Vec::new();
    for unit in units {
        let source = folder.join(format!("{}.cpp", unit.space));
        let mut hash = common.clone();
        unit.text.hash(&mut hash);
        for path in included(&unit.text) {
            (&path, fs::read(&path).unwrap_or_default()).hash(&mut hash);
        }
        let stamp = format!("{:x}", hash.finish());
        let kept = fs::read_to_string(source.with_extension("stamp")).unwrap_or_default();
        match kept.split_once('\n') {
            Some((old, object)) if old == stamp && Path::new(object).exists() => {
                objects.push(PathBuf::from(object))
            }
            _ => {
                fs::write(&source, &unit.text).expect("cannot write a translation unit");
                stale.push((source, stamp));
            }
        }
    }
    build.files(stale.iter().map(|(source, _)| source));
    let compiled = build.compile_intermediates();
    for ((source, stamp), object) in stale.iter().zip(&compiled) {
        let text = format!("{stamp}\n{}", object.display());
        fs::write(source.with_extension("stamp"), text)
            .expect("cannot write the stamp of a translation unit");
    }
    objects.extend(compiled);
    objects
}

/// The files that a unit's text includes, and those that they include, from the include path of kernels: the runtime's other headers
/// are no business of theirs.
fn included(text: &str) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = Vec::new();
    let mut texts = vec![text.to_string()];
    while let Some(text) = texts.pop() {
        let names =
            text.lines().filter_map(|line| line.trim().strip_prefix("#include \"")?.strip_suffix('"'));
        for name in names {
            let paths =
                ["runtime", "../kernels", "../include", "tests"].map(|folder| Path::new(folder).join(name));
            let Some(path) = paths.into_iter().find(|path| path.exists()) else { continue };
            if !found.contains(&path) {
                texts.push(fs::read_to_string(&path).unwrap_or_default());
                found.push(path);
            }
        }
    }
    found
}

fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            files.extend(files_below(&path));
        } else {
            files.push(path);
        }
    }
    files.sort();
    files
}

/// rustc links with `-nodefaultlibs`, so the sanitizers' libraries are named here; AddressSanitizer must come first.
fn link_sanitizers(compiler: &cc::Tool) {
    let found =
        Command::new(compiler.path()).arg("-print-file-name=libasan.so").output().expect("the compiler runs");
    let path = String::from_utf8_lossy(&found.stdout).trim().to_string();
    if let Some(folder) = Path::new(&path).parent() {
        println!("cargo:rustc-link-search=native={}", folder.display());
    }
    println!("cargo:rustc-link-lib=dylib=asan");
    println!("cargo:rustc-link-lib=dylib=ubsan");
}
