//! `engine compress`; what it makes is in `fdc.rs`.

use crate::refuse;

/// What the command line has wrong is found before a minute of calibration: here, before the text is read.
#[test]
fn compress_checks_its_target_first() {
    for (flag, value) in
        [("ratio", "0"), ("ratio", "nan"), ("ratio", "1.5"), ("keep-accuracy", "1"), ("keep-accuracy", "-1")]
    {
        let arguments =
            ["compress", &format!("--{flag}"), value, "--text", "/nonexistent", "--out", "/nonexistent/plan"];
        refuse(value, &arguments, &[flag, "expected a number above 0"]);
    }
}
