//! What the cost model knows of a device.
//!
//! The built-in profiles hold rates that others have published for such devices. They rank paths and draw curves; whoever
//! wants times should measure the ceilings of the machine at hand and put them in ([`DeviceProfile::of_ceilings`], [`DeviceProfile::custom`]).

use crate::Error;

/// Rates of a device, or of a slice of one.
#[derive(Debug, Clone, PartialEq)]
pub struct DeviceProfile {
    /// Its name.
    pub name: String,
    /// SMs.
    pub sm_count: usize,
    /// Host link as blocks read over it, in place, in bytes per second: what direct paths get.
    pub link_reads_per_s: f64,
    /// Host link as a copy engine uses it, in bytes per second: what staged paths get.
    pub link_copies_per_s: f64,
    /// HBM reads, in bytes per second.
    pub hbm_bytes_per_s: f64,
    /// Dense products in bf16 or f16, in additions and multiplications per second.
    pub flops_per_s: f64,
    /// L2 cache, in bytes.
    pub l2_bytes: f64,
    /// Time from asking host memory to its first byte, in seconds.
    pub link_latency_s: f64,
    /// Start of a kernel, in seconds.
    pub launch_s: f64,
    /// Largest thread-block cluster: 1 before sm_90.
    pub max_cluster: usize,
}

/// A slice of a device that is split into instances (MIG): SMs, L2 and HBM are divided, the host link is shared whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum MigSlice {
    OneG,
    TwoG,
    ThreeG,
}

impl MigSlice {
    const fn parts(self) -> (&'static str, usize, f64) {
        match self {
            MigSlice::OneG => ("1g", 16, 1.0 / 8.0),
            MigSlice::TwoG => ("2g", 32, 2.0 / 8.0),
            MigSlice::ThreeG => ("3g", 60, 4.0 / 8.0),
        }
    }
}

impl DeviceProfile {
    /// H200 SXM behind PCIe 5.0 x16: reads of blocks 35 GB/s (published: H100 35.2, H800 37 to 38; the one
    /// figure of an H200, 24, is of a whole product), copies 48 GB/s, HBM 4.2 TB/s,
    /// 700 TFLOP/s of bf16.
    pub fn h200() -> Self {
        DeviceProfile {
            name: "H200 (PCIe)".into(),
            sm_count: 132,
            link_reads_per_s: 35e9,
            link_copies_per_s: 48e9,
            hbm_bytes_per_s: 4.2e12,
            flops_per_s: 700e12,
            l2_bytes: 50e6,
            link_latency_s: 1.4e-6,
            launch_s: 5e-6,
            max_cluster: 8,
        }
    }

    /// GH200 with 96 GB of HBM3, over NVLink-C2C: link 375 GB/s, HBM 3.4 TB/s, 700 TFLOP/s of bf16. Reads of blocks and copies are
    /// within a few percent of each other there.
    pub fn gh200() -> Self {
        DeviceProfile {
            name: "GH200".into(),
            hbm_bytes_per_s: 3.4e12,
            link_latency_s: 0.7e-6,
            ..DeviceProfile::h200().with_link(375e9)
        }
    }

    /// One GPU of a GB200, over NVLink-C2C: link 200 GB/s with the other GPU of the board at rest, HBM 8 TB/s (nominal),
    /// 1.6 PFLOP/s of bf16.
    pub fn gb200() -> Self {
        DeviceProfile {
            name: "GB200".into(),
            sm_count: 148,
            hbm_bytes_per_s: 8e12,
            flops_per_s: 1.6e15,
            l2_bytes: 126e6,
            link_latency_s: 0.6e-6,
            ..DeviceProfile::h200().with_link(200e9)
        }
    }

    /// A slice of this device that has the whole host link to itself.
    pub fn slice(&self, slice: MigSlice) -> Self {
        let (name, sm_count, memory) = slice.parts();
        DeviceProfile {
            name: format!("{} {name}", self.name),
            sm_count,
            hbm_bytes_per_s: self.hbm_bytes_per_s * memory,
            flops_per_s: self.flops_per_s * sm_count as f64 / self.sm_count as f64,
            l2_bytes: self.l2_bytes * memory,
            ..self.clone()
        }
    }

    /// The profiles that predictions are given for: H200 over PCIe, GH200 and its slices.
    pub fn all() -> Vec<Self> {
        let gh200 = DeviceProfile::gh200();
        let slices = [MigSlice::ThreeG, MigSlice::TwoG, MigSlice::OneG].map(|slice| gh200.slice(slice));
        [DeviceProfile::h200(), gh200].into_iter().chain(slices).collect()
    }

    /// Rates from measured ceilings, those of the link for reads of blocks and for copies; what is not given is as in
    /// [`h200`](Self::h200).
    ///
    /// # Errors
    /// [`Error::Argument`] for a rate that is not a positive number, or no SMs.
    pub fn custom(
        name: impl Into<String>,
        sm_count: usize,
        [link_reads_per_s, link_copies_per_s]: [f64; 2],
        hbm_bytes_per_s: f64,
        flops_per_s: f64,
    ) -> Result<Self, Error> {
        let base = DeviceProfile::h200();
        let profile = DeviceProfile {
            name: name.into(),
            sm_count,
            link_reads_per_s,
            link_copies_per_s,
            hbm_bytes_per_s,
            flops_per_s,
            ..base
        };
        profile.check()?;
        Ok(profile)
    }

    /// Rates from what the program `ceilings` of the benches measured, as `(name, median)` in its units. Of a name that comes
    /// more than once the best counts: host memory read by loads of as many blocks as it takes. L2 and the latency of the link are
    /// those of [`h200`](Self::h200).
    ///
    /// | ceiling | unit | rate |
    /// |---|---|---|
    /// | `host_read_by_loads` | GB/s | `link_reads_per_s` |
    /// | `host_to_device_copy` | GB/s | `link_copies_per_s` |
    /// | `read_bandwidth` | GB/s | `hbm_bytes_per_s` |
    /// | `bf16_mma_sync_rate` | TFLOP/s | `flops_per_s`: the kernels multiply with `mma.sync` |
    /// | `one_launch` | µs | `launch_s` |
    ///
    /// # Errors
    /// [`Error::Argument`] for a ceiling that is not there, or is not a positive number, or no SMs.
    pub fn of_ceilings<'a>(
        name: impl Into<String>,
        sm_count: usize,
        ceilings: impl IntoIterator<Item = (&'a str, f64)>,
    ) -> Result<Self, Error> {
        let ceilings: Vec<(&str, f64)> = ceilings.into_iter().collect();
        let all = |name: &'static str| ceilings.iter().filter(move |(found, _)| *found == name).map(|c| c.1);
        let missing = |name| Error::argument("ceilings", format!("{name} among them"), "none of that name");
        let best = |name: &'static str| all(name).reduce(f64::max).ok_or_else(|| missing(name));
        let least = |name: &'static str| all(name).reduce(f64::min).ok_or_else(|| missing(name));
        let link = [1e9 * best("host_read_by_loads")?, 1e9 * best("host_to_device_copy")?];
        let (hbm, flops) = (1e9 * best("read_bandwidth")?, 1e12 * best("bf16_mma_sync_rate")?);
        let profile = DeviceProfile::custom(name, sm_count, link, hbm, flops)?;
        let profile = DeviceProfile { launch_s: 1e-6 * least("one_launch")?, ..profile };
        profile.check()?;
        Ok(profile)
    }

    /// The same device with another rate of the host link, whoever uses it.
    pub fn with_link(&self, bytes_per_s: f64) -> Self {
        DeviceProfile { link_reads_per_s: bytes_per_s, link_copies_per_s: bytes_per_s, ..self.clone() }
    }

    /// The same device with a share of its host link.
    pub fn with_link_share(&self, share: f64) -> Self {
        DeviceProfile {
            link_reads_per_s: share * self.link_reads_per_s,
            link_copies_per_s: share * self.link_copies_per_s,
            ..self.clone()
        }
    }

    /// The faster of the two ways over the host link, in bytes per second.
    pub fn fastest_link(&self) -> f64 {
        self.link_reads_per_s.max(self.link_copies_per_s)
    }

    /// Checks that every rate is a positive number.
    ///
    /// # Errors
    /// [`Error::Argument`] names the one that is not.
    pub fn check(&self) -> Result<(), Error> {
        for (argument, rate) in [
            ("link_reads_per_s", self.link_reads_per_s),
            ("link_copies_per_s", self.link_copies_per_s),
            ("hbm_bytes_per_s", self.hbm_bytes_per_s),
            ("flops_per_s", self.flops_per_s),
        ] {
            if !(rate.is_finite() && rate > 0.0) {
                return Err(Error::argument(argument, "a finite number above 0", rate));
            }
        }
        for (argument, time) in [
            ("link_latency_s", self.link_latency_s),
            ("launch_s", self.launch_s),
            ("l2_bytes", self.l2_bytes),
        ] {
            if !(time.is_finite() && time >= 0.0) {
                return Err(Error::argument(argument, "a finite number of at least 0", time));
            }
        }
        match (self.sm_count, self.max_cluster) {
            (0, _) => Err(Error::argument("sm_count", "at least 1", 0)),
            (_, 0) => Err(Error::argument("max_cluster", "at least 1", 0)),
            _ => Ok(()),
        }
    }

    /// Bytes that blocks keep in flight so that their reads never idle: twice the link's rate times its latency (Little's law, with
    /// room for tiles that wait for a slot).
    pub fn link_bytes_in_flight(&self) -> f64 {
        2.0 * self.link_reads_per_s * self.link_latency_s
    }
}
