//! Which operations of a log come before which.

use std::collections::{BTreeMap, BTreeSet};

/// One operation on a stream.
#[derive(Debug, Clone)]
pub(crate) struct Operation {
    /// Words of its line.
    words: Vec<String>,
    /// Operations that are done before it starts, by their index.
    pub(crate) before: BTreeSet<usize>,
}

impl Operation {
    /// The value of `name=value`, as a number.
    pub(crate) fn number(&self, name: &str) -> u64 {
        let value = self.words.iter().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
        value.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("no {name} in {:?}", self.words))
    }

    pub(crate) fn is_copy(&self) -> bool {
        self.words[0] == "cuMemcpyAsync"
    }

    pub(crate) fn is_launch(&self) -> bool {
        self.words[0] == "cuLaunchKernelEx"
    }

    /// The kernel's parameter of this index, of eight bytes.
    pub(crate) fn parameter(&self, index: usize) -> u64 {
        let line = self.words.join(" ");
        let parameters = line.split("parameters=[").nth(1).and_then(|rest| rest.split(']').next());
        let parameter = parameters.and_then(|all| all.split(' ').nth(index)).expect("a parameter");
        let bytes = u64::from_str_radix(parameter, 16).expect("eight bytes in hex");
        bytes.swap_bytes()
    }
}

/// The operations of a log, with everything that streams and events put before each.
pub(crate) fn operations(log: &[String]) -> Vec<Operation> {
    let mut operations: Vec<Operation> = Vec::new();
    // What the next operation of a stream comes after, and what an event stands for.
    let mut streams: BTreeMap<u64, BTreeSet<usize>> = BTreeMap::new();
    let mut events: BTreeMap<u64, BTreeSet<usize>> = BTreeMap::new();
    for line in log {
        let words: Vec<String> = line.split(' ').map(str::to_string).collect();
        let operation = Operation { words, before: BTreeSet::new() };
        match operation.words[0].as_str() {
            "cuEventRecord" => {
                let done = streams.entry(operation.number("stream")).or_default().clone();
                events.insert(operation.number("event"), done);
            }
            "cuStreamWaitEvent" => {
                let done = events.get(&operation.number("event")).expect("an event that was recorded");
                streams.entry(operation.number("stream")).or_default().extend(done);
            }
            "cuMemcpyAsync" | "cuLaunchKernelEx" => {
                let stream = streams.entry(operation.number("stream")).or_default();
                let before = stream.clone();
                stream.insert(operations.len());
                operations.push(Operation { before, ..operation });
            }
            _ => {}
        }
    }
    operations
}
