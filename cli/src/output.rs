//! What commands print: plain aligned text for people, the API's JSON for programs.

use std::io::{self, Write};

use serde::Serialize;

/// How this command prints.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    /// Whether JSON was asked for.
    pub json: bool,
}

impl Output {
    /// Prints `value` as JSON if that was asked for, or the text that `human` makes of it.
    pub fn show<T: Serialize>(self, value: &T, human: impl FnOnce() -> String) {
        let text = match self.json {
            true => serde_json::to_string_pretty(value).expect("an answer that was JSON is JSON") + "\n",
            false => human(),
        };
        // A reader that went away (`ebb … | head`) is not a failure.
        let _ = io::stdout().lock().write_all(text.as_bytes());
    }
}

/// Rows of cells in aligned columns, two spaces apart, under a header line.
pub fn table<const N: usize>(header: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> String {
    let mut lines = vec![header.map(str::to_owned)];
    lines.extend(rows);
    aligned(&lines)
}

/// `name  value` lines, aligned; empty values are left out.
pub fn facts<const N: usize>(rows: [(&str, String); N]) -> String {
    let shown = rows.into_iter().filter(|(_, value)| !value.is_empty());
    aligned(&shown.map(|(name, value)| [name.to_owned(), value]).collect::<Vec<_>>())
}

fn aligned<const N: usize>(lines: &[[String; N]]) -> String {
    let widths: [usize; N] =
        std::array::from_fn(|i| lines.iter().map(|cells| cells[i].chars().count()).max().unwrap_or(0));
    let mut text = String::new();
    for cells in lines {
        let mut line = String::new();
        for (cell, width) in cells.iter().zip(widths) {
            line.push_str(cell);
            line.extend(std::iter::repeat_n(' ', width + 2 - cell.chars().count()));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// `1.5 MiB` for people.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if n < 1024 {
        return format!("{n} B");
    }
    let mut value = n as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// `45s`, `3m`, `5h`, `12d` for people: the largest unit that fits.
pub fn age(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..86_400 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages() {
        let shown: Vec<_> = [0, 59, 60, 3599, 3600, 86_399, 86_400, 10 * 86_400].into_iter().map(age).collect();
        assert_eq!(shown, ["0s", "59s", "1m", "59m", "1h", "23h", "1d", "10d"]);
    }

    #[test]
    fn columns_are_aligned() {
        let rows = [["prod".to_owned(), "active".to_owned()], ["pr-42".to_owned(), String::new()]];
        assert_eq!(table(["NAME", "STATE"], rows), "NAME   STATE\nprod   active\npr-42\n");
    }

    #[test]
    fn facts_leave_out_what_is_not_there() {
        assert_eq!(
            facts([("a", "1".to_owned()), ("b", String::new()), ("long", "2".to_owned())]),
            "a     1\nlong  2\n"
        );
    }

    #[test]
    fn sizes() {
        let shown: Vec<_> = [0, 1023, 1024, 1536, 7 << 30].into_iter().map(bytes).collect();
        assert_eq!(shown, ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "7.0 GiB"]);
    }
}
