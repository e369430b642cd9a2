//! The words in which messages name processes, steps and times.

use std::time::Duration;

/// `process 3`, `processes 1 and 3`, `processes 0, 2 and 5 to 9`. Takes them in order.
pub(super) fn processes(numbers: &[usize]) -> String {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for &number in numbers {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == number => *last = number,
            _ => runs.push((number, number)),
        }
    }
    let words: Vec<String> = runs
        .into_iter()
        .flat_map(|(first, last)| match last - first {
            0 => vec![first.to_string()],
            1 => vec![first.to_string(), last.to_string()],
            _ => vec![format!("{first} to {last}")],
        })
        .collect();
    match words.as_slice() {
        [] => "no process".into(),
        [one] if numbers.len() == 1 => format!("process {one}"),
        [one] => format!("processes {one}"),
        [most @ .., last] => format!("processes {} and {last}", most.join(", ")),
    }
}

/// `0.5 s`, `30 s`.
pub(super) fn seconds(time: Duration) -> String {
    format!("{} s", (time.as_secs_f64() * 1000.0).round() / 1000.0)
}

/// Where this process runs: `node17, process id 4711`.
pub(super) fn place() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let host = match host.trim() {
        "" => "an unknown host",
        name => name,
    };
    format!("{host}, process id {}", std::process::id())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_drawn_together() {
        assert_eq!(processes(&[]), "no process");
        assert_eq!(processes(&[3]), "process 3");
        assert_eq!(processes(&[3, 4]), "processes 3 and 4");
        assert_eq!(processes(&[3, 4, 5]), "processes 3 to 5");
        assert_eq!(processes(&[0, 2, 5, 6, 7, 9]), "processes 0, 2, 5 to 7 and 9");
        assert_eq!(seconds(Duration::from_millis(1500)), "1.5 s");
    }
}
