//! The little of SQL's lexical structure that the proxy looks at (PostgreSQL 15, 4.1.5): blanks and comments.

/// What follows the blanks and comments at the front; `None` if a comment does not end.
pub fn skip_blanks(mut text: &[u8]) -> Option<&[u8]> {
    loop {
        text = text.trim_ascii_start();
        if let Some(comment) = text.strip_prefix(b"--") {
            let end = comment.iter().position(|&b| matches!(b, b'\n' | b'\r')).unwrap_or(comment.len());
            text = &comment[end..];
        } else if text.starts_with(b"/*") {
            text = skip_block_comment(text)?;
        } else {
            return Some(text);
        }
    }
}

/// Block comments nest.
fn skip_block_comment(text: &[u8]) -> Option<&[u8]> {
    let (mut at, mut depth) = (0, 0_usize);
    loop {
        match text.get(at..at + 2)? {
            b"/*" => (at, depth) = (at + 2, depth + 1),
            b"*/" => (at, depth) = (at + 2, depth - 1),
            _ => at += 1,
        }
        if depth == 0 {
            return text.get(at..);
        }
    }
}

/// Whether a text's first word, after blanks and comments, is this keyword, in whatever case.
pub fn begins_with(text: &[u8], keyword: &[u8]) -> bool {
    let Some((word, rest)) = skip_blanks(text).and_then(|text| text.split_at_checked(keyword.len())) else {
        return false;
    };
    word.eq_ignore_ascii_case(keyword) && !rest.first().is_some_and(|&b| b.is_ascii_alphanumeric() || b == b'_')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_keyword_is_found_behind_blanks_and_comments() {
        for good in ["PREPARE a AS SELECT 1", " \n prepare a as select 1", "-- x\n/* a /* b */ */PREPARE x", "prepare"]
        {
            assert!(begins_with(good.as_bytes(), b"prepare"), "{good:?}");
        }
        for bad in ["", "prepared", "select 1; prepare a as select 1", "/* prepare", "-- prepare", "DO $$ $$", "/*/"] {
            assert!(!begins_with(bad.as_bytes(), b"prepare"), "{bad:?}");
        }
    }
}
