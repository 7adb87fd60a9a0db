//! The kernel table: every kernel with its constants, architectures, budgets and shipped rows.
//!
//! There is no second list. The table drives NVRTC's options, the compile gate, prebuilt cubins, the emulator's translation
//! units, the typed launch and the ledger of GPU results.

mod attention;
mod ceilings;
mod code;
mod conformance;
mod homomorphic_quant;
mod hybrid_gemm;
mod kv_compress;
mod seq_parallel;
mod sparse_attn;

use std::fmt;

use crate::Error;

pub use code::LOCAL_MEMORY;

/// All kernels, in the order of their folders.
pub const KERNELS: &[&[Kernel]] = &[
    attention::KERNELS,
    ceilings::KERNELS,
    conformance::KERNELS,
    homomorphic_quant::KERNELS,
    hybrid_gemm::KERNELS,
    kv_compress::KERNELS,
    seq_parallel::KERNELS,
    sparse_attn::KERNELS,
];

/// All kernels, one after another.
pub fn kernels() -> impl Iterator<Item = &'static Kernel> {
    KERNELS.iter().flat_map(|group| group.iter())
}

/// The kernel of this name.
pub fn kernel(name: &str) -> Option<&'static Kernel> {
    kernels().find(|kernel| kernel.name == name)
}

/// Every shipped row as an instance with its budget.
pub fn shipped() -> impl Iterator<Item = (Instance, &'static Row)> {
    kernels().flat_map(|kernel| {
        kernel.rows.iter().map(move |row| (Instance { kernel, values: row.values.to_vec() }, row))
    })
}

/// One kernel: a `.cu` file that defines one `KERNEL` function of the same name.
#[derive(Debug)]
pub struct Kernel {
    /// Name of the function and of its file without `.cu`.
    pub name: &'static str,
    /// Folder of `cuda/kernels`, which is the crate that the kernel belongs to.
    pub group: &'static str,
    /// Text of the `.cu` file.
    pub source: &'static str,
    /// Compile-time constants, passed as `-DNAME=value`.
    pub constants: &'static [Constant],
    /// Architectures that the kernel runs on.
    pub arch: ArchClass,
    /// Threads per block, as in its launch bounds.
    pub threads: u32,
    /// The rows that the compile gate, the emulator, prebuilt cubins and the ledger cover.
    pub rows: &'static [Row],
}

/// A compile-time constant of a kernel.
#[derive(Debug)]
pub struct Constant {
    /// Macro name.
    pub name: &'static str,
    /// Every value the source is written for.
    pub allowed: &'static [i64],
}

/// One shipped specialisation with its budget.
#[derive(Debug)]
pub struct Row {
    /// Values of the kernel's constants, in order.
    pub values: &'static [i64],
    /// Registers per thread that no architecture may exceed.
    pub registers: u32,
    /// Static plus dynamic shared memory per block of the largest launch, in bytes.
    pub shared: u32,
    /// Whether the emulator compiles this row.
    pub emulated: bool,
}

/// The storage types of [`Constant`]s such as `OUT_DTYPE`; `types.cuh` has the same numbers.
pub mod dtype {
    /// IEEE single precision.
    pub const F32: i64 = 0;
    /// IEEE half precision.
    pub const F16: i64 = 1;
    /// bfloat16.
    pub const BF16: i64 = 2;
}

/// The architectures a kernel is written for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ArchClass {
    /// sm_80 and everything later: mma.sync and cp.async, within 99 KB of shared memory.
    Portable,
    /// sm_90a alone: wgmma, TMA, bulk copies with mbarriers.
    Hopper,
}

impl ArchClass {
    /// Shared memory that one block may use, in bytes.
    pub fn shared_limit(self) -> u32 {
        match self {
            ArchClass::Portable => 99 * 1024,
            ArchClass::Hopper => 227 * 1024,
        }
    }

    /// The architectures that the compile gate compiles for.
    pub fn gate(self) -> &'static [Arch] {
        const PORTABLE: &[Arch] = &[Arch::new(8, 0), Arch::new(8, 9), Arch::new(9, 0), Arch::new(12, 0)];
        const HOPPER: &[Arch] = &[Arch::new(9, 0)];
        match self {
            ArchClass::Portable => PORTABLE,
            ArchClass::Hopper => HOPPER,
        }
    }

    /// Whether a device of this architecture can run the kernel.
    pub fn runs_on(self, arch: Arch) -> bool {
        match self {
            ArchClass::Portable => arch >= Arch::new(8, 0),
            ArchClass::Hopper => arch == Arch::new(9, 0),
        }
    }
}

impl fmt::Display for ArchClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ArchClass::Portable => "sm_80 or later",
            ArchClass::Hopper => "sm_90a",
        })
    }
}

/// A real GPU architecture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Arch {
    /// Compute capability, major.
    pub major: u32,
    /// Compute capability, minor.
    pub minor: u32,
}

impl Arch {
    /// The architecture of compute capability `major.minor`.
    pub const fn new(major: u32, minor: u32) -> Self {
        Arch { major, minor }
    }
}

/// `sm_80`; compute capability 9.0 is always `sm_90a`, whose extra instructions cost nothing where they are not used.
impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let suffix = if *self == Arch::new(9, 0) { "a" } else { "" };
        write!(f, "sm_{}{}{suffix}", self.major, self.minor)
    }
}

/// A kernel with a value for each of its constants.
#[derive(Debug, Clone)]
pub struct Instance {
    /// The kernel.
    pub kernel: &'static Kernel,
    /// Values of its constants, in the kernel's order.
    pub values: Vec<i64>,
}

impl Instance {
    /// Looks the kernel up and checks each constant against the table; constants may come in any order.
    pub fn new(kernel: &'static str, constants: &[(&str, i64)]) -> Result<Self, Error> {
        let Some(found) = self::kernel(kernel) else {
            return Err(Error::NotPrepared {
                kernel: kernel.to_string(),
                reason: "the kernel table has no such kernel".to_string(),
            });
        };
        let wrong = |constant: &str, expected: String, found: String| Error::Constant {
            kernel,
            constant: constant.to_string(),
            expected,
            found,
        };
        if let Some((name, value)) =
            constants.iter().find(|(name, _)| found.constants.iter().all(|c| c.name != *name))
        {
            let names: Vec<_> = found.constants.iter().map(|c| c.name).collect();
            return Err(wrong(name, format!("names {names:?}"), value.to_string()));
        }
        let value_of = |constant: &Constant| {
            let value = constants.iter().find(|(name, _)| *name == constant.name).map(|(_, value)| *value);
            match value {
                Some(value) if constant.allowed.contains(&value) => Ok(value),
                Some(value) => {
                    Err(wrong(constant.name, format!("{:?}", constant.allowed), value.to_string()))
                }
                None => Err(wrong(constant.name, format!("{:?}", constant.allowed), "nothing".to_string())),
            }
        };
        Ok(Self { kernel: found, values: found.constants.iter().map(value_of).collect::<Result<_, _>>()? })
    }

    /// Constants as `(name, value)`.
    pub fn constants(&self) -> impl Iterator<Item = (&'static str, i64)> {
        self.kernel.constants.iter().map(|c| c.name).zip(self.values.iter().copied())
    }

    /// The shipped row of these constants, if there is one.
    pub fn row(&self) -> Option<&'static Row> {
        self.kernel.rows.iter().find(|row| row.values == self.values)
    }

    /// A unique, readable name: `merge_states` or `merge_states.v_dim=128.out_dtype=2`. Fit for file names.
    pub fn label(&self) -> String {
        let mut label = self.kernel.name.to_string();
        for (name, value) in self.constants() {
            label += &format!(".{}={value}", name.to_lowercase());
        }
        label
    }
}

impl PartialEq for Instance {
    fn eq(&self, other: &Self) -> bool {
        self.kernel.name == other.kernel.name && self.values == other.values
    }
}

impl Eq for Instance {}

impl std::hash::Hash for Instance {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.kernel.name.hash(state);
        self.values.hash(state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shipped_rows_are_few_distinct_and_allowed() {
        let mut labels = std::collections::BTreeSet::new();
        for (instance, row) in shipped() {
            assert_eq!(row.values.len(), instance.kernel.constants.len(), "{}", instance.label());
            let constants: Vec<_> = instance.constants().collect();
            assert_eq!(Instance::new(instance.kernel.name, &constants).as_ref(), Ok(&instance));
            assert!(row.shared <= instance.kernel.arch.shared_limit(), "{}", instance.label());
            assert!(labels.insert(instance.label()), "{} is listed twice", instance.label());
        }
        assert!(labels.len() <= 160, "{} shipped rows", labels.len());
    }

    #[test]
    fn wrong_constants_are_named() {
        let Some(kernel) = kernels().find(|k| !k.constants.is_empty()) else {
            panic!("no kernel has constants")
        };
        let good: Vec<_> = kernel.constants.iter().map(|c| (c.name, c.allowed[0])).collect();
        let error = Instance::new(kernel.name, &good[1..]).unwrap_err().to_string();
        assert!(error.contains(good[0].0) && error.contains("nothing"), "{error}");
        let mut bad = good.clone();
        bad[0].1 = -12345;
        let error = Instance::new(kernel.name, &bad).unwrap_err().to_string();
        assert!(error.contains(good[0].0) && error.contains("-12345"), "{error}");
        bad = good.clone();
        bad.push(("NO_SUCH_CONSTANT", 1));
        assert!(Instance::new(kernel.name, &bad).unwrap_err().to_string().contains("NO_SUCH_CONSTANT"));
        assert!(Instance::new("no_such_kernel", &[]).unwrap_err().to_string().contains("no_such_kernel"));
    }
}
