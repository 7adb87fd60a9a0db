//! The GPU states in README.md: the text between `<!-- gpu:GROUP -->` and `<!-- /gpu -->`, wherever that stands.

use crate::Result;

const OPEN: &str = "<!-- gpu:";
const OPENED: &str = " -->";
const CLOSE: &str = "<!-- /gpu -->";

/// The text with every state replaced by what `state` says of its group.
pub(super) fn fill(text: &str, state: impl Fn(&str) -> Option<String>) -> Result<String> {
    let mut filled = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(OPEN) {
        let (before, marked) = rest.split_at(at);
        let unclosed = || format!("README.md: {:?} is not closed", marked.lines().next().unwrap_or_default());
        let group_end = marked.find(OPENED).ok_or_else(unclosed)?;
        let group = &marked[OPEN.len()..group_end];
        let close = marked.find(CLOSE).ok_or_else(unclosed)?;
        let state = state(group).ok_or_else(|| format!("README.md: no kernels belong to {group}"))?;
        filled += before;
        filled += &format!("{OPEN}{group}{OPENED}{state}{CLOSE}");
        rest = &marked[close + CLOSE.len()..];
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
        let filled = fill(text, state).expect("whole markers");
        let expected = "| a | <!-- gpu:a -->a is fine<!-- /gpu --> |\n<!-- gpu:b -->b is fine<!-- /gpu -->\n";
        assert_eq!(filled, expected);
        assert_eq!(fill(&filled, state).as_deref(), Ok(expected), "once more changes nothing");
        for (text, words) in
            [("<!-- gpu:nobody -->x<!-- /gpu -->", "nobody"), ("<!-- gpu:a -->x", "not closed")]
        {
            assert!(fill(text, state).expect_err(text).contains(words));
        }
    }
}
