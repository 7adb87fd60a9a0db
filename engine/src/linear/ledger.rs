//! What each step's matrices moved.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use hybrid_gemm::{DeviceProfile, Receipt, Traffic};

/// Receipts of a model's products, step by step. Steps of one number of tokens move the same, so they are kept together.
#[derive(Debug)]
pub struct Ledger {
    devices: Vec<DeviceProfile>,
    entries: Mutex<Entries>,
}

#[derive(Debug, Default)]
struct Entries {
    /// Tokens of the step in progress.
    tokens: usize,
    /// By tokens.
    steps: BTreeMap<usize, StepTraffic>,
}

/// What the steps of a number of tokens moved, all together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepTraffic {
    /// Tokens of each step.
    pub tokens: usize,
    /// How many steps.
    pub steps: u64,
    /// Counted in all of them.
    pub traffic: Traffic,
    /// Whether every product moved exactly what its plan had predicted.
    pub as_predicted: bool,
}

impl Default for Ledger {
    /// For the devices that predictions are given for: H200 over PCIe, GH200 and its slices.
    fn default() -> Self {
        Ledger { devices: DeviceProfile::all(), entries: Mutex::default() }
    }
}

impl Ledger {
    /// For those devices and one more, which was measured.
    pub fn with(device: DeviceProfile) -> Self {
        let devices = [vec![device], DeviceProfile::all()].concat();
        Ledger { devices, entries: Mutex::default() }
    }

    /// The devices that predictions are given for.
    pub fn devices(&self) -> &[DeviceProfile] {
        &self.devices
    }

    /// A step of `tokens` tokens begins; products belong to it until the next.
    pub fn begin(&self, tokens: usize) {
        let mut entries = self.lock();
        entries.tokens = tokens;
        entries.entry().steps += 1;
    }

    /// Adds a product to the step.
    pub fn record(&self, receipt: &Receipt) {
        let mut entries = self.lock();
        let entry = entries.entry();
        entry.traffic += receipt.counted;
        entry.as_predicted &= receipt.counted == receipt.predicted.traffic;
    }

    /// The steps so far, by rising number of tokens.
    pub fn steps(&self) -> Vec<StepTraffic> {
        self.lock().steps.values().copied().collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Entries> {
        // Counters are whole after every call, whoever panicked meanwhile.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entries {
    fn entry(&mut self) -> &mut StepTraffic {
        let tokens = self.tokens;
        let new = StepTraffic { tokens, steps: 0, traffic: Traffic::default(), as_predicted: true };
        self.steps.entry(tokens).or_insert(new)
    }
}
