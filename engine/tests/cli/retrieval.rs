//! `engine retrieval`.

use crate::{path, read_json, succeed};

#[test]
fn retrieval_reports_its_share() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("retrieval.json");
    let stdout = succeed(&["retrieval", "--context", "90", "--documents", "2", "--json", path(&file)]);
    let report = read_json(&file);
    let (right, asked) = (report["right"].as_u64().unwrap(), report["questions"].as_u64().unwrap());
    assert_eq!(asked, 4);
    assert!(stdout.contains(&format!("{right} of 4")), "{stdout}");
}
