//! Fingerprint of the code that launches a kernel: the files of `cuda/src/kernels` that name it and every other there that they
//! use, directly or through others.
//!
//! Comments, blank lines and indentation are not in it, since they change nothing that a GPU could show.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use cuda::digest::Digest;

use crate::{Result, workspace};

/// Digests by kernel name.
pub(crate) fn digests(kernels: &[&str]) -> Result<BTreeMap<String, Digest>> {
    let mut files = BTreeMap::new();
    read(&workspace().join("cuda/src/kernels"), &mut files)?;
    kernels
        .iter()
        .map(|name| match digest(&files, name) {
            Some(digest) => Ok((name.to_string(), digest)),
            None => Err(format!("no file of cuda/src/kernels names the kernel {name:?}")),
        })
        .collect()
}

fn read(folder: &Path, files: &mut BTreeMap<PathBuf, String>) -> Result {
    let entries = std::fs::read_dir(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.is_dir() {
            read(&path, files)?;
        } else {
            let text =
                std::fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
            files.insert(path, text);
        }
    }
    Ok(())
}

/// None if no file names the kernel.
fn digest(files: &BTreeMap<PathBuf, String>, kernel: &str) -> Option<Digest> {
    let literal = format!("\"{kernel}\"");
    let named: BTreeSet<&PathBuf> =
        files.iter().filter(|(_, text)| text.contains(&literal)).map(|(path, _)| path).collect();
    if named.is_empty() {
        return None;
    }
    let mut all = named.clone();
    let mut new: Vec<&PathBuf> = named.into_iter().collect();
    while let Some(path) = new.pop() {
        for used in files.keys().filter(|other| uses(&files[path], path, other)) {
            if all.insert(used) {
                new.push(used);
            }
        }
    }
    let code: Vec<String> = all.into_iter().map(|path| code(&files[path])).collect();
    Some(Digest::of_parts(code.iter().map(|text| text.as_bytes())))
}

/// Whether the file `text` at `path` imports from the module of the file `other`: a module beside it or above it by name, the
/// module that holds it, or one by its path from the crate. Too many rather than too few: then a row is stale too often.
fn uses(text: &str, path: &Path, other: &Path) -> bool {
    let module = |path: &Path| -> Vec<String> {
        let mut names: Vec<String> =
            path.with_extension("").iter().map(|name| name.to_string_lossy().into_owned()).collect();
        names.pop_if(|last| last == "mod");
        names
    };
    let (path, other) = (module(path), module(other));
    let Some((name, folder)) = other.split_last() else { return false };
    let mut imports =
        text.lines().map(str::trim).filter(|line| line.starts_with("use ") || line.starts_with("pub use "));
    let holds_it = path.split_last().is_some_and(|(_, above)| above == other);
    let beside_it = path.starts_with(folder);
    imports.any(|line| {
        let words = || line.split(|c: char| !c.is_alphanumeric() && c != '_');
        let named = words().any(|word| word == name);
        (holds_it && line.contains("super::")) || ((beside_it || line.contains("crate::kernels")) && named)
    })
}

/// A file without comment lines, blank lines, indentation and its unit tests.
fn code(text: &str) -> String {
    let text = text.split("\n#[cfg(test)]\nmod tests").next().unwrap_or(text);
    let mut code = String::new();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with("//")) {
        code.push_str(line);
        code.push('\n');
    }
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(list: &[(&str, &str)]) -> BTreeMap<PathBuf, String> {
        list.iter().map(|(path, text)| (PathBuf::from(path), text.to_string())).collect()
    }

    #[test]
    fn code_counts_and_comments_do_not() {
        let sources = |kernel: &'static str, shared: &'static str| {
            files(&[("a/k.rs", kernel), ("a/shared.rs", shared), ("a/other.rs", "x")])
        };
        let kernel = "use super::shared::f;\nload(\"k\");\n";
        let base = digest(&sources(kernel, "fn f() {}"), "k");
        assert!(base.is_some());
        let same = [
            ("a comment", "// Why.\nuse super::shared::f;\n\n    load(\"k\");\n", "/// What.\nfn f() {}\n"),
            ("a unit test", "use super::shared::f;\nload(\"k\");\n#[cfg(test)]\nmod tests { }", "fn f() {}"),
        ];
        for (name, kernel, shared) in same {
            assert_eq!(digest(&sources(kernel, shared), "k"), base, "{name}");
        }
        let other = [
            ("the kernel's file", "use super::shared::f;\nload(\"k\", 1);\n", "fn f() {}"),
            ("a module it uses", kernel, "fn f() { 1 }"),
        ];
        for (name, kernel, shared) in other {
            assert_ne!(digest(&sources(kernel, shared), "k"), base, "{name}");
        }
        assert_eq!(digest(&sources(kernel, ""), "no_such_kernel"), None);
    }

    #[test]
    fn imports_are_followed_wherever_they_lead() {
        let with = |changed: &str| {
            let body = |path: &str| if path == changed { "fn f() { 1 }" } else { "fn f() {}" };
            let list = [
                (
                    "k/a/kernel.rs",
                    "use super::{Shared, page::Page};\nuse crate::kernels::b::cache::Cache;\nload(\"k\");",
                ),
                ("k/a/mod.rs", "use deep::g;"),
                ("k/a/page.rs", "use super::deep::g;"),
                ("k/a/deep.rs", ""),
                ("k/b/cache.rs", "use super::extent::h;"),
                ("k/b/extent.rs", ""),
                ("k/c/other.rs", ""),
            ];
            let text = |(path, uses): &(&str, &str)| (PathBuf::from(path), format!("{uses}\n{}", body(path)));
            digest(&list.iter().map(text).collect(), "k")
        };
        let base = with("");
        for path in
            ["k/a/kernel.rs", "k/a/mod.rs", "k/a/page.rs", "k/a/deep.rs", "k/b/cache.rs", "k/b/extent.rs"]
        {
            assert_ne!(with(path), base, "{path}");
        }
        assert_eq!(with("k/c/other.rs"), base);
    }

    #[test]
    fn every_kernel_of_the_table_is_launched_somewhere() {
        let names: Vec<&str> = cuda::table::kernels().map(|kernel| kernel.name).collect();
        let digests = digests(&names).expect("every kernel has a typed launch");
        assert_eq!(digests.len(), names.len());
    }
}
