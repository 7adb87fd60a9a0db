//! Modules of the executable of benches: a list of them, and which of them run.

/// The argument that lists the modules, one to a line.
pub const LIST: &str = "--modules";
/// Environment variable that names the modules to run, with commas between them; all if it is empty or missing.
pub const VARIABLE: &str = "LONGKV_BENCH";

/// The modules that `value` asks for.
///
/// # Errors
/// A sentence that names a module that is not there.
pub fn wanted<'a>(value: Option<&str>, names: &[&'a str]) -> Result<Vec<&'a str>, String> {
    let Some(value) = value.filter(|value| !value.is_empty()) else { return Ok(names.to_vec()) };
    let find = |wanted: &str| {
        let found = names.iter().find(|name| **name == wanted).copied();
        found.ok_or_else(|| format!("{VARIABLE}: expected some of {}, found {wanted}", names.join(", ")))
    };
    value.split(',').map(find).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_modules_run_unless_some_are_named() {
        let names = ["a", "b", "c"];
        assert_eq!(wanted(None, &names).expect("all"), names);
        assert_eq!(wanted(Some(""), &names).expect("all"), names);
        assert_eq!(wanted(Some("c,a"), &names).expect("two"), ["c", "a"]);
        let error = wanted(Some("a,d"), &names).expect_err("no such module");
        assert!(error.contains("expected some of a, b, c, found d"), "{error}");
    }
}
