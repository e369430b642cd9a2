//! The simulation's report for people: a summary, links, and ranks with equal figures as one line.

use std::fmt::Write;

use crate::simulate::{LinkClass, RankBytes, Report, Side};

use crate::cli::human::{bytes, grid, seconds};
use crate::cli::shape_table::ranges;

/// A side with more distinct lines than this becomes one line, from the least to the most.
const MOST_LINES: usize = 16;

/// The report as text, closed by a line feed.
pub(super) fn render(title: &str, report: &Report) -> String {
    let mut out = format!("{title}\n\n");
    for (name, text) in summary(report) {
        let _ = writeln!(out, "{name:<14}{text}");
    }
    if !report.links.is_empty() {
        let titles = ["link", "bytes", "least", "busiest", "time", "least time"];
        out.push_str(&grid(&titles, report.links.iter().map(link)));
    }
    let titles = ["rank", "sent", "received", "relayed"];
    let sides = [(Side::Trainer, "trainer"), (Side::Inference, "inference")];
    let lines = sides.iter().flat_map(|(side, word)| side_lines(report, *side, word));
    out.push_str(&grid(&titles, lines));
    out
}

fn summary(report: &Report) -> Vec<(&'static str, String)> {
    let roofline = match report.roofline_s {
        0.0 => "nothing must move".to_owned(),
        s => format!("{}, {:.2} times that", seconds(s), report.predicted_s / s),
    };
    let amax = match report.bytes.amax {
        0 => "none".to_owned(),
        all => format!("{} in {}", bytes(all), seconds(report.amax_s)),
    };
    vec![
        ("predicted", seconds(report.predicted_s)),
        ("roofline", roofline),
        ("imbalance", format!("{:.3} (most over mean that a trainer sends)", report.imbalance)),
        ("wire", bytes(report.bytes.wire)),
        ("relayed", bytes(report.bytes.relayed)),
        ("amax exchange", amax),
        ("staging", format!("{} at most on a rank", bytes(report.staging_peak_bytes))),
    ]
}

fn link(link: &LinkClass) -> Vec<String> {
    vec![
        link.class.to_owned(),
        bytes(link.bytes),
        link.least_bytes.map_or_else(String::new, bytes),
        bytes(link.busiest_bytes),
        seconds(link.busiest_s),
        link.least_s.map_or_else(String::new, seconds),
    ]
}

/// The ranks of a side, those whose figures read the same as one line.
fn side_lines(report: &Report, side: Side, word: &str) -> Vec<Vec<String>> {
    let ranks: Vec<&RankBytes> = report.ranks.iter().filter(|r| r.side == side).collect();
    let figures = |r: &RankBytes| [r.sent, r.received, r.relayed];
    let mut classes: Vec<([String; 3], Vec<u64>)> = Vec::new();
    for rank in &ranks {
        let shown = figures(rank).map(dash);
        match classes.iter_mut().find(|(other, _)| *other == shown) {
            Some((_, members)) => members.push(rank.rank),
            None => classes.push((shown, vec![rank.rank])),
        }
        if classes.len() > MOST_LINES {
            let all: Vec<u64> = ranks.iter().map(|r| r.rank).collect();
            let spans = [0, 1, 2].map(|i| span(ranks.iter().map(|r| figures(r)[i])));
            classes = vec![(spans, all)];
            break;
        }
    }
    let line = |(shown, members): ([String; 3], Vec<u64>)| {
        [format!("{word} {}", ranges(&members))].into_iter().chain(shown).collect()
    };
    classes.into_iter().map(line).collect()
}

/// The least and the most.
fn span(values: impl Iterator<Item = u64> + Clone) -> String {
    let least = dash(values.clone().min().unwrap_or(0));
    let most = dash(values.max().unwrap_or(0));
    if least == most { least } else { format!("{least} to {most}") }
}

fn dash(n: u64) -> String {
    if n == 0 { "–".to_owned() } else { bytes(n) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simulate::{SCHEMA, Totals};

    fn rank(side: Side, rank: u64, sent: u64, received: u64) -> RankBytes {
        RankBytes { side, rank, sent, received, relayed: 0 }
    }

    fn report(trainers: impl Iterator<Item = u64>) -> Report {
        let trainers = (0..).zip(trainers).map(|(t, sent)| rank(Side::Trainer, t, sent, 0));
        let ranks = (0..2).map(|r| rank(Side::Inference, r, 0, 4096));
        Report {
            schema: SCHEMA,
            predicted_s: 0.003,
            roofline_s: 0.002,
            imbalance: 1.5,
            staging_peak_bytes: 1 << 20,
            bytes: Totals { wire: 8192, relayed: 0, amax: 0 },
            amax_s: 0.0,
            links: vec![LinkClass {
                class: "nic in",
                bytes: 8192,
                least_bytes: Some(8000),
                busiest_bytes: 4096,
                busiest_s: 0.002,
                least_s: Some(0.001),
            }],
            ranks: trainers.chain(ranks).collect(),
        }
    }

    #[test]
    fn ranks_whose_figures_read_the_same_are_one_line() {
        // A byte more does not show.
        let text = render("p.rhai", &report([2 << 20, (2 << 20) + 1, 1 << 20].into_iter()));
        let wanted = "\
p.rhai

predicted     3.00 ms
roofline      2.00 ms, 1.50 times that
imbalance     1.500 (most over mean that a trainer sends)
wire          8.00 KiB
relayed       0 B
amax exchange none
staging       1.00 MiB at most on a rank

link        bytes      least    busiest      time   least time
nic in   8.00 KiB   7.81 KiB   4.00 KiB   2.00 ms      1.00 ms

rank                 sent   received   relayed
trainer 0..1     2.00 MiB          –         –
trainer 2        1.00 MiB          –         –
inference 0..1          –   4.00 KiB         –
";
        assert_eq!(text, wanted);
    }

    #[test]
    fn many_different_ranks_are_a_span() {
        let text = render("p.rhai", &report((1..=40).map(|n| n << 20)));
        assert!(text.contains("trainer 0..39    1.00 MiB to 40.0 MiB"), "{text}");
    }
}
