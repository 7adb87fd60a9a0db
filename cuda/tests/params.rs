//! The generated parameters against the headers they were generated from, without libclang.

use std::collections::BTreeMap;
use std::path::Path;

use longkv_cuda::digest::Digest;
use longkv_cuda::params::HEADER_DIGESTS;

#[test]
fn params_are_fresh() {
    let include = Path::new(env!("CARGO_MANIFEST_DIR")).join("include");
    let names = std::fs::read_dir(&include)
        .expect("cuda/include is readable")
        .map(|entry| entry.expect("an entry of cuda/include").file_name().into_string().expect("text"));
    let headers: BTreeMap<String, String> = names
        .filter(|name| name.ends_with("_params.h"))
        .map(|name| {
            let digest = Digest::of(&std::fs::read(include.join(&name)).expect("a header"));
            (name, digest.to_string())
        })
        .collect();
    let generated: BTreeMap<String, String> =
        HEADER_DIGESTS.iter().map(|(name, digest)| (name.to_string(), digest.to_string())).collect();
    assert_eq!(generated, headers, "cuda/src/params.rs is stale: run `cargo xtask bindings`");
}
