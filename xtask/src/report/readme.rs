//! What README.md says of measurements: the text between `<!-- KIND:NAME -->` and `<!-- /KIND -->`, wherever that stands.
//!
//! Of kind `gpu` are the states of a group's kernels, of kind `accuracy` the modes that begin with a name.

use crate::Result;

const OPENED: &str = " -->";

/// The text with every statement of this kind replaced by what `state` says of its name.
pub(super) fn fill(text: &str, kind: &str, state: impl Fn(&str) -> Option<String>) -> Result<String> {
    let (open, close) = (format!("<!-- {kind}:"), format!("<!-- /{kind} -->"));
    let mut filled = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(&open) {
        let (before, marked) = rest.split_at(at);
        let unclosed = || format!("README.md: {:?} is not closed", marked.lines().next().unwrap_or_default());
        let group_end = marked.find(OPENED).ok_or_else(unclosed)?;
        let group = &marked[open.len()..group_end];
        let end = marked.find(&close).ok_or_else(unclosed)?;
        let state = state(group).ok_or_else(|| format!("README.md: nothing is known of {kind}:{group}"))?;
        filled += before;
        filled += &format!("{open}{group}{OPENED}{state}{close}");
        rest = &marked[end + close.len()..];
    }
    Ok(filled + rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_stand_between_their_markers() {
        let state = |group: &str| (group != "nobody").then(|| format!("{group} is fine"));
        let text = "| a | <!-- gpu:a -->old<!-- /gpu --> |\n<!-- gpu:b --><!-- /gpu -->\n";
        let filled = fill(text, "gpu", state).expect("whole markers");
        let expected = "| a | <!-- gpu:a -->a is fine<!-- /gpu --> |\n<!-- gpu:b -->b is fine<!-- /gpu -->\n";
        assert_eq!(filled, expected);
        assert_eq!(fill(&filled, "gpu", state).as_deref(), Ok(expected), "once more changes nothing");
        for (text, words) in
            [("<!-- gpu:nobody -->x<!-- /gpu -->", "nobody"), ("<!-- gpu:a -->x", "not closed")]
        {
            assert!(fill(text, "gpu", state).expect_err(text).contains(words));
        }
        assert_eq!(fill(text, "accuracy", state).as_deref(), Ok(text), "other kinds stay");
    }
}
