//! Machine code of cubins: its text, and how many instructions the loops around tensor cores have.

use std::collections::BTreeSet;
use std::process::Command;

use cuda::compile::Cubin;
use cuda::table::LOCAL_MEMORY;

use crate::{Result, toolkit};

/// The machine code as text.
pub(crate) fn disassemble(cubin: &Cubin) -> Result<String> {
    let tools = toolkit::DISASSEMBLER.install()?;
    let file = tempfile::Builder::new().suffix(".cubin").tempfile().map_err(|error| error.to_string())?;
    std::fs::write(file.path(), &cubin.bytes).map_err(|error| error.to_string())?;
    // cuobjdump runs nvdisasm by name.
    let path = std::env::join_paths(
        std::iter::once(tools.clone())
            .chain(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())),
    )
    .map_err(|error| error.to_string())?;
    let output = Command::new(tools.join("cuobjdump"))
        .arg("--dump-sass")
        .arg(file.path())
        .env("PATH", path)
        .output()
        .map_err(|error| format!("cuobjdump does not start: {error}"))?;
    if !output.status.success() {
        return Err(format!("cuobjdump failed:\n{}", String::from_utf8_lossy(&output.stderr)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// What is wrong with the instructions of a kernel that must have these.
pub(crate) fn wrong_instructions(sass: &str, demanded: &[&str]) -> Vec<String> {
    let found: BTreeSet<&str> =
        sass.lines().filter_map(instruction).filter_map(|(_, words)| words[0].split('.').next()).collect();
    let missing = demanded.iter().filter(|code| !found.contains(*code));
    let mut faults: Vec<String> =
        missing.map(|code| format!("no {code} in the machine code, which it must have")).collect();
    let local = LOCAL_MEMORY.iter().filter(|code| found.contains(*code));
    faults.extend(local.map(|code| format!("{code} in the machine code: local memory")));
    faults
}

/// A loop around tensor cores. What it counts is static.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Loop {
    /// From the target of the branch back to that branch.
    pub(crate) instructions: usize,
    /// Of them, those of tensor cores.
    pub(crate) tensor: usize,
    /// Of them, those that some branch within the loop skips, such as a mask that few tiles need.
    pub(crate) skippable: usize,
}

/// Matrix instructions of tensor cores.
const TENSOR: &[&str] = &["HMMA", "IMMA", "DMMA", "QMMA", "HGMMA", "IGMMA", "QGMMA"];

/// The innermost loops with tensor-core work, in the order of their ends.
pub(crate) fn tensor_loops(sass: &str) -> Vec<Loop> {
    // (address, words without a predicate)
    let code: Vec<(u64, Vec<&str>)> = sass.lines().filter_map(instruction).collect();
    // Where a branch leads to; nowhere if that is no instruction of this listing.
    let target = |words: &[&str]| {
        let address = words.iter().filter_map(|word| hex(word.strip_prefix("0x")?)).next_back()?;
        code.iter().position(|(at, _)| *at == address).filter(|_| words[0].starts_with("BRA"))
    };
    let mut loops: Vec<(usize, usize, Loop)> = Vec::new();
    for (end, (_, words)) in code.iter().enumerate() {
        let Some(begin) = target(words).filter(|begin| *begin <= end) else { continue };
        let is_tensor = |words: &[&str]| TENSOR.contains(&words[0].split('.').next().unwrap_or_default());
        let tensor = code[begin..=end].iter().filter(|(_, words)| is_tensor(words)).count();
        let inner = loops.iter().any(|&(inner, _, _)| inner >= begin);
        if tensor > 0 && !inner {
            let mut skipped = vec![false; end - begin];
            for at in begin..end {
                if let Some(to) = target(&code[at].1).filter(|to| (at + 1..=end).contains(to)) {
                    skipped[at + 1 - begin..to - begin].fill(true);
                }
            }
            let skippable = skipped.iter().filter(|skipped| **skipped).count();
            loops.push((begin, end, Loop { instructions: end + 1 - begin, tensor, skippable }));
        }
    }
    // Code that the compiler put out of a loop's way branches back into the loop: that is no loop of its own.
    let returns = |begin: usize, end: usize| {
        loops.iter().any(|&(other, other_end, _)| (other + 1..=other_end).contains(&begin) && end > other_end)
    };
    loops.iter().filter(|(begin, end, _)| !returns(*begin, *end)).map(|(_, _, found)| *found).collect()
}

/// Address and words of a line `/*0a30*/ @!P0 BRA 0x120 ;`.
fn instruction(line: &str) -> Option<(u64, Vec<&str>)> {
    let (address, rest) = line.trim_start().strip_prefix("/*")?.split_once("*/")?;
    let (text, _) = rest.split_once(';')?;
    let words: Vec<&str> = text.split_whitespace().skip_while(|word| word.starts_with('@')).collect();
    Some((hex(address)?, words)).filter(|(_, words)| !words.is_empty())
}

fn hex(digits: &str) -> Option<u64> {
    u64::from_str_radix(digits, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_and_what_must_not_be_is_named() {
        let sass = "
        /*0000*/                   LDGSTS.E.BYPASS.128 [R4], desc[UR4][R2.64] ; /* 0x0 */
        /*0010*/              @!P0 HMMA.16816.F32.BF16 R4, R4, R8, R4 ; /* 0x0 */
        /*0020*/                   MOV R1, c[0x0][0x28] ;         /* HGMMA in a comment */
        ";
        assert_eq!(wrong_instructions(sass, &["HMMA", "LDGSTS"]), [""; 0]);
        let faults = wrong_instructions(sass, &["HGMMA", "LDGSTS", "LDG"]);
        assert!(
            faults.len() == 2 && faults[0].contains("HGMMA") && faults[1].contains("LDG in"),
            "{faults:?}"
        );
        let local = format!("{sass}/*0030*/ @P0 STL.64 [R1], R2 ;");
        let faults = wrong_instructions(&local, &["HMMA"]);
        assert!(faults.len() == 1 && faults[0].contains("STL"), "{faults:?}");
    }

    #[test]
    fn innermost_loops_are_counted() {
        // An outer loop around one with tensor cores, one without, a branch ahead, and code out of the way that returns.
        let sass = "
            .headerflags    @\"EF_CUDA_SM90\"
        /*0000*/                   MOV R1, c[0x0][0x28] ;         /* 0x00000a0000017a02 */
                                                                  /* 0x000fe40000000f00 */
        /*0010*/                   S2R R0, SR_TID.X ;             /* 0x0 */
        /*0020*/                   IADD3 R2, R2, 0x1, RZ ;        /* 0x0 */
        /*0030*/                   @P0 BRA 0x20 ;                 /* 0x0 */
        /*0040*/                   LDS R4, [R5] ;                 /* 0x0 */
        /*0050*/               @P1 BRA 0x70 ;                     /* 0x0 */
        /*0060*/                   IMMA.16832.U8.U8 R4, R4, R8, R4 ; /* 0x0 */
        /*0070*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ; /* 0x0 */
        /*0080*/              @!P0 BRA.U UP0, 0x40 ;              /* 0x0 */
        /*0090*/                   @P2 BRA 0x10 ;                 /* 0x0 */
        /*00a0*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ; /* 0x0 */
        /*00b0*/                   BRA 0x60 ;                     /* 0x0 */
        /*00c0*/                   BRA 0xc0 ;                     /* 0x0 */
        ";
        assert_eq!(tensor_loops(sass), [Loop { instructions: 5, tensor: 2, skippable: 1 }]);
        assert_eq!(tensor_loops("no code"), []);
    }
}
