//! How a method is asked for: `NAME[:FILE][,key=value…][+NAME]`.
//!
//! The name picks the method, the file is what it loads (a plan, a calibration), the options are its knobs and the second
//! name is a method composed with the first: `compress:plan.json,ratio=0.5+quant`. The second name starts after the last
//! `+` that only lower-case letters, digits and hyphens follow; every other `+` belongs to the file or value it stands in.

use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::Error;

/// A parsed mode. Which names, files and options make sense is for the seam to say: see [`Mode::accept`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mode {
    text: String,
    name: String,
    file: Option<PathBuf>,
    options: Vec<(String, String)>,
    with: Option<String>,
}

/// A method as a seam lists it.
#[derive(Debug, Clone, Copy)]
pub struct Method {
    /// The name that a mode starts with.
    pub name: &'static str,
    /// One line for the help text.
    pub summary: &'static str,
    /// Whether it loads a file.
    pub file: bool,
    /// The options it takes.
    pub options: &'static [&'static str],
    /// The methods it can be composed with.
    pub with: &'static [&'static str],
}

fn is_name(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

impl FromStr for Mode {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let refuse = |reason: String| Error::Mode { mode: text.to_string(), reason };
        let (rest, with) = match text.rsplit_once('+') {
            Some((rest, with)) if is_name(with) => (rest, Some(with.to_string())),
            _ => (text, None),
        };
        let mut parts = rest.split(',');
        let head = parts.next().unwrap_or_default();
        let (name, file) = match head.split_once(':') {
            Some((_, "")) => return Err(refuse("no file after the colon".into())),
            Some((name, file)) => (name, Some(PathBuf::from(file))),
            None => (head, None),
        };
        // A preset's name may hold a number: `fdc-0.5`.
        if !is_name(&name.replace('.', "0")) {
            return Err(refuse(format!("{name:?} is no name (expected NAME[:FILE][,key=value…][+NAME])")));
        }
        let mut options: Vec<(String, String)> = Vec::new();
        for part in parts {
            match part.split_once('=') {
                Some((key, value)) if is_name(key) && !value.is_empty() => {
                    if options.iter().any(|(known, _)| known == key) {
                        return Err(refuse(format!("option {key} is given twice")));
                    }
                    options.push((key.to_string(), value.to_string()));
                }
                _ => return Err(refuse(format!("{part:?} is no option (expected key=value)"))),
            }
        }
        Ok(Mode { text: text.to_string(), name: name.to_string(), file, options, with })
    }
}

impl Display for Mode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl Mode {
    /// The method's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that the method loads.
    pub fn file(&self) -> Option<&Path> {
        self.file.as_deref()
    }

    /// The method composed with the first.
    pub fn with(&self) -> Option<&str> {
        self.with.as_deref()
    }

    /// An option's value, or `default` when it is not given.
    ///
    /// # Errors
    /// [`Error::Mode`] when the value does not parse; `expected` says what would.
    pub fn option<T: FromStr>(&self, key: &str, default: T, expected: &str) -> Result<T, Error> {
        match self.options.iter().find(|(known, _)| known == key) {
            None => Ok(default),
            Some((_, value)) => {
                value.parse().map_err(|_| self.refuse(format!("{key}: expected {expected}, found {value:?}")))
            }
        }
    }

    /// Finds the mode's method in a seam's list and checks that it takes what the mode gives.
    ///
    /// # Errors
    /// [`Error::UnknownMode`], which lists the known names, or [`Error::Mode`] for a file, option or composition that the
    /// method does not take.
    pub fn accept(&self, seam: &'static str, methods: &'static [Method]) -> Result<&'static Method, Error> {
        let method = methods.iter().find(|method| method.name == self.name).ok_or_else(|| {
            let known: Vec<_> = methods.iter().map(|method| method.name).collect();
            Error::UnknownMode { seam, found: self.name.clone(), known: known.join(", ") }
        })?;
        if self.file.is_some() && !method.file {
            return Err(self.refuse(format!("{} takes no file", method.name)));
        }
        for (key, _) in &self.options {
            if !method.options.contains(&key.as_str()) {
                return Err(self.refuse(format!("unknown option {key} (known: {})", listed(method.options))));
            }
        }
        match &self.with {
            Some(with) if !method.with.contains(&with.as_str()) => Err(self.refuse(format!(
                "{} cannot be composed with {with} (can: {})",
                method.name,
                listed(method.with)
            ))),
            _ => Ok(method),
        }
    }

    /// An error about this mode.
    pub fn refuse(&self, reason: impl Into<String>) -> Error {
        Error::Mode { mode: self.text.clone(), reason: reason.into() }
    }
}

fn listed(names: &[&str]) -> String {
    if names.is_empty() { "none".to_string() } else { names.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    const METHODS: &[Method] = &[
        Method { name: "dense", summary: "", file: false, options: &["dtype"], with: &[] },
        Method { name: "low-rank", summary: "", file: true, options: &["ratio"], with: &["quant"] },
    ];

    #[test]
    fn grammar() {
        type Parts<'a> = (&'a str, Option<&'a str>, &'a [(&'a str, &'a str)], Option<&'a str>);
        let cases: &[(&str, Parts<'_>)] = &[
            ("dense", ("dense", None, &[], None)),
            ("dense,dtype=bf16", ("dense", None, &[("dtype", "bf16")], None)),
            ("low-rank:a/plan.json", ("low-rank", Some("a/plan.json"), &[], None)),
            (
                "low-rank:C:/p,ratio=0.5,x=y=z",
                ("low-rank", Some("C:/p"), &[("ratio", "0.5"), ("x", "y=z")], None),
            ),
            ("low-rank:a,ratio=0.5+quant", ("low-rank", Some("a"), &[("ratio", "0.5")], Some("quant"))),
            ("a+b", ("a", None, &[], Some("b"))),
            ("a:x+1.json", ("a", Some("x+1.json"), &[], None)),
            ("a,v=1e+5.0+q8", ("a", None, &[("v", "1e+5.0")], Some("q8"))),
        ];
        for (text, (name, file, options, with)) in cases {
            let mode: Mode = text.parse().unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!(mode.name(), *name, "{text}");
            assert_eq!(mode.file(), file.map(Path::new), "{text}");
            let found: Vec<_> = mode.options.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
            assert_eq!(found, *options, "{text}");
            assert_eq!(mode.with(), *with, "{text}");
            assert_eq!(mode.to_string(), *text);
        }
    }

    #[test]
    fn what_does_not_parse() {
        for (text, named) in [
            ("", "no name"),
            (":file", "no name"),
            ("Dense", "no name"),
            ("dense:", "no file"),
            ("dense,", "no option"),
            ("dense,dtype", "no option"),
            ("dense,=f16", "no option"),
            ("dense,dtype=", "no option"),
            ("dense,a=1,a=2", "twice"),
            ("+dense", "no name"),
            ("a+b+c", "no name"),
        ] {
            let error = text.parse::<Mode>().expect_err(text).to_string();
            assert!(error.contains(named), "{text}: {error}");
        }
    }

    #[test]
    fn what_a_method_does_not_take() {
        for (text, named) in [
            ("quantum", "unknown KV mode \"quantum\" (known: dense, low-rank)"),
            ("dense:plan", "dense takes no file"),
            ("dense,bits=2", "unknown option bits (known: dtype)"),
            ("dense+quant", "cannot be composed with quant (can: none)"),
            ("low-rank+dense", "cannot be composed with dense (can: quant)"),
        ] {
            let error = text.parse::<Mode>().unwrap().accept("KV", METHODS).expect_err(text).to_string();
            assert!(error.contains(named), "{text}: {error}");
        }
        let mode: Mode = "low-rank:p,ratio=0.5+quant".parse().unwrap();
        assert_eq!(mode.accept("KV", METHODS).unwrap().name, "low-rank");
        assert_eq!(mode.option("ratio", 1.0, "a number").unwrap(), 0.5);
        assert_eq!(mode.option("other", 7, "a number").unwrap(), 7);
        assert!(mode.option::<u32>("ratio", 1, "a whole number").unwrap_err().to_string().contains("0.5"));
    }
}
