//! Numbers as a person reads them.

use comfy_table::{CellAlignment, Table, TableStyle as Borders};

/// Bytes with three digits and a binary unit: `1.62 GiB`.
pub(super) fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut units = UNITS.iter();
    let mut unit = units.next();
    // From here on the value would be printed as 1024.
    while value >= 1023.5
        && let Some(next) = units.next()
    {
        value /= 1024.0;
        unit = Some(next);
    }
    let decimals = match value {
        v if v < 9.995 => 2,
        v if v < 99.95 => 1,
        _ => 0,
    };
    format!("{value:.decimals$} {}", unit.unwrap_or(&"B"))
}

/// Seconds with three digits and a unit: `1.62 ms`.
pub(super) fn seconds(seconds: f64) -> String {
    // A value just below the next unit would be printed as 1000.
    let (value, unit) = match seconds {
        s if s >= 0.9995 => (s, "s"),
        s if s >= 0.9995e-3 => (s * 1e3, "ms"),
        s if s > 0.0 => (s * 1e6, "µs"),
        _ => return "0 s".to_owned(),
    };
    let decimals = match value {
        v if v < 9.995 => 2,
        v if v < 99.95 => 1,
        _ => 0,
    };
    format!("{value:.decimals$} {unit}")
}

/// A count with a comma at each thousand: `60,123`.
pub(super) fn count(n: u64) -> String {
    indicatif::HumanCount(n).to_string()
}

/// `1 rank`, `8 ranks`.
pub(super) fn counted(n: u64, word: &str) -> String {
    format!("{} {word}{}", count(n), if n == 1 { "" } else { "s" })
}

/// Columns without borders, all but the first aligned to the right.
pub(super) fn grid(titles: &[&str], lines: impl Iterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(Borders::new()).force_no_tty().set_header(titles).add_rows(lines);
    let last = titles.len() - 1;
    for (at, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, if at == last { 0 } else { 3 }));
        if at > 0 {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    format!("\n{}\n", table.trim_fmt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_digits() {
        let shown = [0, 1023, 1024, 10_235, 10_240, 1_048_063, 1_048_064, u64::MAX].map(bytes);
        assert_eq!(
            shown,
            [
                "0 B", "1023 B", "1.00 KiB", "10.0 KiB", "10.0 KiB", "1023 KiB", "1.00 MiB",
                "16.0 EiB"
            ]
        );
    }

    #[test]
    fn times() {
        let shown =
            [0.0, 4e-9, 20e-6, 0.9994e-3, 0.9996e-3, 0.7444, 0.9996, 75.25].map(seconds);
        assert_eq!(
            shown,
            ["0 s", "0.00 µs", "20.0 µs", "999 µs", "1.00 ms", "744 ms", "1.00 s", "75.2 s"]
        );
    }

    #[test]
    fn thousands() {
        assert_eq!([0, 999, 1000, 1234567].map(count), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!([1, 1000].map(|n| counted(n, "rank")), ["1 rank", "1,000 ranks"]);
    }
}
