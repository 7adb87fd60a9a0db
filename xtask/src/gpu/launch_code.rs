//! Fingerprint of the code that launches a kernel: the typed kernel in `cuda/src/kernels` and the modules beside it that it
//! uses.
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
    let used = named.iter().flat_map(|path| {
        modules_used(&files[*path]).filter_map(|module| {
            files.get_key_value(&path.with_file_name(format!("{module}.rs"))).map(|(path, _)| path)
        })
    });
    let all: BTreeSet<&PathBuf> = named.iter().copied().chain(used).collect();
    let code: Vec<String> = all.into_iter().map(|path| code(&files[path])).collect();
    Some(Digest::of_parts(code.iter().map(|text| text.as_bytes())))
}

/// Names of sibling modules in `use super::name…`.
fn modules_used(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter_map(|line| {
        let rest = line.trim().strip_prefix("use super::")?;
        Some(&rest[..rest.find(|c: char| !c.is_alphanumeric() && c != '_')?])
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
    fn every_kernel_of_the_table_is_launched_somewhere() {
        let names: Vec<&str> = cuda::table::kernels().map(|kernel| kernel.name).collect();
        let digests = digests(&names).expect("every kernel has a typed launch");
        assert_eq!(digests.len(), names.len());
    }
}
