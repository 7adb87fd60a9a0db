//! A device that was measured: `ceilings.json` as `cargo xtask gpu-record` writes it, as a profile for predictions.

use std::path::{Path, PathBuf};

use hybrid_gemm::DeviceProfile;
use serde::Deserialize;

use crate::Error;
use crate::mode::Mode;

#[derive(Deserialize)]
struct Ceilings {
    run: Run,
    values: Vec<Ceiling>,
}

#[derive(Deserialize)]
struct Run {
    device: String,
    sm_count: Option<usize>,
}

#[derive(Deserialize)]
struct Ceiling {
    name: String,
    median: f64,
}

/// The device whose ceilings a mode names with `ceilings=FILE`, if it names any.
///
/// # Errors
/// [`Error::Mode`] for a file that cannot be read, or has not all that a profile needs.
pub(super) fn of(mode: &Mode) -> Result<Option<DeviceProfile>, Error> {
    let path = mode.option("ceilings", PathBuf::new(), "a file")?;
    if path.as_os_str().is_empty() {
        return Ok(None);
    }
    let refuse = |error| mode.refuse(format!("ceilings: {}: {error}", path.display()));
    read(&path).map(Some).map_err(refuse)
}

/// Reads the profile.
///
/// # Errors
/// A sentence that says what is wrong with the file.
fn read(path: &Path) -> Result<DeviceProfile, String> {
    let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
    let Ceilings { run, values } = serde_json::from_str(&text).map_err(|error| error.to_string())?;
    let sm_count = run.sm_count.ok_or("the run does not say how many SMs the device has")?;
    let ceilings = values.iter().map(|ceiling| (ceiling.name.as_str(), ceiling.median));
    DeviceProfile::of_ceilings(run.device, sm_count, ceilings).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_those_of_the_file() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("ceilings.json");
        let write = |text: &str| std::fs::write(&path, text).expect("writable");
        let value =
            |name: &str, median: f64| format!(r#"{{"name": "{name}", "unit": "", "median": {median}}}"#);
        let values = [
            value("host_read_by_loads", 12.0),
            value("host_read_by_loads", 33.0),
            value("host_to_device_copy", 47.5),
            value("read_bandwidth", 4100.0),
            value("bf16_mma_sync_rate", 610.0),
            value("one_launch", 4.5),
            value("event_pair", 1.0),
        ];
        let run = r#""run": {"device": "Made-up GPU", "sm_count": 99, "driver": "1"}"#;
        write(&format!(r#"{{{run}, "values": [{}]}}"#, values.join(", ")));
        let profile = read(&path).expect("whole");
        assert_eq!((profile.name.as_str(), profile.sm_count), ("Made-up GPU", 99));
        assert_eq!((profile.link_reads_per_s, profile.link_copies_per_s), (33e9, 47.5e9));
        assert_eq!((profile.hbm_bytes_per_s, profile.flops_per_s), (4.1e12, 610e12));
        assert!((profile.launch_s - 4.5e-6).abs() < 1e-12);

        for (text, expected) in [
            (format!(r#"{{{run}, "values": [{}]}}"#, values[..3].join(", ")), "read_bandwidth"),
            (r#"{"run": {"device": "x"}, "values": []}"#.to_string(), "how many SMs"),
            ("{".to_string(), "EOF"),
        ] {
            write(&text);
            let error = read(&path).expect_err(expected);
            assert!(error.contains(expected), "{error}");
        }
        let error = of(&"host:1,ceilings=none.json".parse().expect("a mode")).expect_err("no such file");
        assert!(error.to_string().contains("none.json"), "{error}");
        assert!(of(&"host:1".parse().expect("a mode")).expect("no file").is_none());
    }
}
