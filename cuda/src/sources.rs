//! The text of every header in `cuda/include`, embedded so that kernels compile without files.

macro_rules! headers {
    ($($name:literal)*) => {
        &[
            // NVRTC has no C library; parameter headers include <stdint.h> because bindgen and C read them too.
            ("stdint.h", include_str!("../include/nvrtc/stdint.h")),
            $(($name, include_str!(concat!("../include/", $name))),)*
        ]
    };
}

/// Headers as `(name in #include "…", text)`.
///
/// Names are relative to `cuda/include`, and headers include each other by these names too; only `stdint.h` lies
/// elsewhere (in `nvrtc/`), so that no other compiler takes it for its own.
pub const HEADERS: &[(&str, &str)] = headers! {
    "core.cuh"
    "types.cuh"
    "append_params.h"
    "decode_params.h"
    "fdc_params.h"
    "hack_append_params.h"
    "hack_decode_params.h"
    "hack_prefill_params.h"
    "hybrid_gemm_params.h"
    "merge_states_params.h"
    "pack_params.h"
    "prefill_params.h"
    "sparse_attend_params.h"
    "sparse_gather_params.h"
    "sparse_pages_params.h"
    "sparse_resolve_params.h"
    "sparse_select_params.h"
    "status_params.h"
    "ptx/bulk_copy.cuh"
    "ptx/clock.cuh"
    "ptx/convert.cuh"
    "ptx/cp_async.cuh"
    "ptx/half2.cuh"
    "ptx/ldmatrix.cuh"
    "ptx/math.cuh"
    "ptx/mbarrier.cuh"
    "ptx/memory.cuh"
    "ptx/mma.cuh"
    "ptx/shuffle.cuh"
    "ptx/sync.cuh"
    "ptx/tma.cuh"
    "ptx/wgmma.cuh"
    "tile/block_scan.cuh"
    "tile/cache_check.cuh"
    "tile/codes.cuh"
    "tile/copy_ring.cuh"
    "tile/decode_warps.cuh"
    "tile/fragment.cuh"
    "tile/gemm_epilogue.cuh"
    "tile/gemm_products.cuh"
    "tile/gemm_traffic.cuh"
    "tile/group_softmax.cuh"
    "tile/hack_attention.cuh"
    "tile/hack_codes.cuh"
    "tile/hack_columns.cuh"
    "tile/hack_page.cuh"
    "tile/hack_rows.cuh"
    "tile/hack_stream.cuh"
    "tile/hack_tokens.cuh"
    "tile/last_arriver.cuh"
    "tile/low_rank.cuh"
    "tile/partial_states.cuh"
    "tile/prefill_list.cuh"
    "tile/prefill_rows.cuh"
    "tile/prefill_tiles.cuh"
    "tile/quantizer.cuh"
    "tile/rotary.cuh"
    "tile/run_copy.cuh"
    "tile/softmax_state.cuh"
    "tile/split_plan.cuh"
    "tile/status.cuh"
    "tile/swizzle.cuh"
    "tile/tile_schedule.cuh"
    "tile/weight_slab.cuh"
    "tile/weighted_split.cuh"
};

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::*;

    fn files_below(folder: &Path, prefix: &str, found: &mut BTreeSet<String>) {
        for entry in std::fs::read_dir(folder).expect("cuda/include is readable") {
            let entry = entry.expect("an entry of cuda/include");
            let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
            if entry.path().is_dir() {
                files_below(&entry.path(), &format!("{name}/"), found);
            } else {
                found.insert(name);
            }
        }
    }

    #[test]
    fn every_header_is_embedded() {
        let mut files = BTreeSet::new();
        files_below(&Path::new(env!("CARGO_MANIFEST_DIR")).join("include"), "", &mut files);
        assert!(files.remove("nvrtc/stdint.h"));
        files.insert("stdint.h".to_string());
        let embedded: BTreeSet<_> = HEADERS.iter().map(|(name, _)| name.to_string()).collect();
        assert_eq!(embedded, files);
        assert_eq!(embedded.len(), HEADERS.len(), "a header is listed twice");
    }

    #[test]
    fn headers_include_only_embedded_headers() {
        let mut included = 0;
        for (name, text) in HEADERS {
            for line in text.lines().filter(|line| line.starts_with("#include ")) {
                let target = line["#include ".len()..].trim_matches(['"', '<', '>']);
                assert!(HEADERS.iter().any(|(known, _)| *known == target), "{name}: {line}");
                included += 1;
            }
        }
        assert!(included > 0, "no header includes another: the search is broken");
    }

    #[test]
    fn dtypes_have_the_same_numbers_on_both_sides() {
        use crate::table::dtype;
        let (_, types) =
            HEADERS.iter().find(|(name, _)| *name == "types.cuh").expect("types.cuh is embedded");
        for (name, number) in [("F32", dtype::F32), ("F16", dtype::F16), ("BF16", dtype::BF16)] {
            let line = format!("constexpr int DTYPE_{name} = {number};");
            assert!(types.lines().any(|found| found == line), "types.cuh has no line `{line}`");
        }
    }
}
