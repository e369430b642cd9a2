//! A picture of a simulated update: one line for each rank, one bar for each of its buckets, as
//! an HTML page that needs nothing else.

use std::fmt::Write;

use crate::simulate::{Report, Traffic, Transfer};
use crate::topo::Peer;

use crate::cli::human;

/// Lines that each side gets at most.
const MOST_LINES: u64 = 64;
/// Bars of a page at most; a browser still scrolls that.
const MOST_BARS: usize = 20_000;
/// Colours that buckets take in turn.
const COLOURS: usize = 12;

/// Sizes in pixels: of names, of the plot, of a line, and of a bar, two of which share a line.
const NAME_WIDTH: f64 = 110.0;
const WIDTH: f64 = 1200.0;
const LINE: f64 = 18.0;
const BAR: f64 = 7.0;
/// Over the lines of a side: the axis, or the side's own name.
const HEAD: f64 = 34.0;

/// What a rank does with a group of adjacent buckets.
#[derive(Clone, Copy, Default)]
struct Bar {
    start_s: f64,
    end_s: f64,
    sent: u64,
    received: u64,
}

/// The ranks of one side that are shown.
struct Side {
    word: &'static str,
    count: u64,
    shown: Vec<u64>,
    /// For each rank shown, its bars.
    bars: Vec<Vec<Option<Bar>>>,
}

/// Collects the transfers of a simulation.
pub(super) struct Timeline {
    trainers: Side,
    ranks: Side,
    buckets: usize,
    /// Adjacent buckets that share a bar.
    merged: usize,
}

impl Side {
    /// Evenly spaced ranks, the first and the last among them.
    fn new(word: &'static str, count: u64) -> Self {
        let lines = count.min(MOST_LINES);
        let shown = (0..lines).map(|i| i * (count - 1) / (lines - 1).max(1)).collect();
        Side { word, count, shown, bars: Vec::new() }
    }

    fn add(&mut self, rank: u64, group: usize, transfer: &Transfer, sends: bool) {
        let Ok(line) = self.shown.binary_search(&rank) else { return };
        let fresh = Bar { start_s: f64::INFINITY, ..Bar::default() };
        let bar = self.bars[line][group].get_or_insert(fresh);
        bar.start_s = bar.start_s.min(transfer.start_s);
        bar.end_s = bar.end_s.max(transfer.arrival_s);
        *(if sends { &mut bar.sent } else { &mut bar.received }) += transfer.message.bytes;
    }

    fn height(&self) -> f64 {
        HEAD + self.shown.len() as f64 * LINE
    }
}

impl Timeline {
    pub fn new(traffic: &Traffic) -> Self {
        let mut sides = [("trainer", traffic.trainers), ("inference", traffic.ranks)]
            .map(|(word, count)| Side::new(word, count.into()));
        let lines = sides.iter().map(|s| s.shown.len()).sum::<usize>();
        let merged = (traffic.buckets * lines).div_ceil(MOST_BARS).max(1);
        for side in &mut sides {
            side.bars = vec![vec![None; traffic.buckets.div_ceil(merged)]; side.shown.len()];
        }
        let [trainers, ranks] = sides;
        Timeline { trainers, ranks, buckets: traffic.buckets, merged }
    }

    pub fn add(&mut self, transfer: &Transfer) {
        let group = transfer.bucket / self.merged;
        match transfer.message.from {
            Peer::Trainer(t) => self.trainers.add(t.into(), group, transfer, true),
            Peer::Rank(r) => self.ranks.add(r.0, group, transfer, true),
        }
        self.ranks.add(transfer.message.to.0, group, transfer, false);
    }

    /// The page, under a title that says what was simulated.
    pub fn html(&self, title: &str, report: &Report) -> String {
        let title = escape(title);
        let mut out = format!(
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
             <title>{title}</title>\n<style>\n{}</style>\n</head>\n<body>\n<h1>{title}</h1>\n",
            style()
        );
        let _ = writeln!(out, "<p>{}</p>", escape(&self.caption(report)));
        self.svg(&mut out, report);
        out.push_str("</body>\n</html>\n");
        out
    }

    fn caption(&self, report: &Report) -> String {
        let mut text = format!(
            "{} predicted; the dashed line is the roofline, {}. A bar is what a rank sends and \
             receives of a bucket, from its first byte to its last.",
            human::seconds(report.predicted_s),
            human::seconds(report.roofline_s)
        );
        if report.amax_s > 0.0 {
            text.push_str(" Before them, in grey, the amax exchange.");
        }
        for side in [&self.trainers, &self.ranks] {
            let shown = side.shown.len() as u64;
            if shown < side.count {
                let (word, all) = (side.word, human::count(side.count));
                let _ = write!(text, " Of {all} {word} ranks {shown} are shown.");
            }
        }
        if self.merged > 1 {
            let _ = write!(text, " {} adjacent buckets share a bar.", self.merged);
        }
        text
    }

    fn svg(&self, out: &mut String, report: &Report) {
        let end_s = report.predicted_s.max(report.roofline_s).max(1e-9);
        let scale = WIDTH / end_s;
        let (width, height) = (NAME_WIDTH + WIDTH + 50.0, self.height() + 10.0);
        let _ = writeln!(out, "<svg width=\"{width}\" height=\"{height}\" role=\"img\">");
        self.axis(out, end_s);
        if report.amax_s > 0.0 {
            let (width, height) = (report.amax_s * scale, self.trainers.height() - HEAD);
            let _ = writeln!(
                out,
                "<rect class=\"amax\" x=\"{NAME_WIDTH}\" y=\"{HEAD}\" width=\"{width:.2}\" \
                 height=\"{height}\"><title>amax exchange: {}</title></rect>",
                human::seconds(report.amax_s)
            );
        }
        self.side(out, &self.trainers, 0.0, scale);
        self.side(out, &self.ranks, self.trainers.height(), scale);
        let (x, height) = (NAME_WIDTH + report.roofline_s * scale, self.height());
        let _ = writeln!(
            out,
            "<line class=\"roofline\" x1=\"{x:.2}\" x2=\"{x:.2}\" y1=\"{HEAD}\" \
             y2=\"{height}\"><title>roofline: {}</title></line>\n</svg>",
            human::seconds(report.roofline_s)
        );
    }

    fn height(&self) -> f64 {
        self.trainers.height() + self.ranks.height()
    }

    /// Ticks in milliseconds, with a line down the page each.
    fn axis(&self, out: &mut String, end_s: f64) {
        let end_ms = end_s * 1e3;
        let step = tick(end_ms);
        let decimals = (-step.log10().floor()).max(0.0) as usize;
        for i in 0..=(end_ms / step) as u32 {
            let ms = f64::from(i) * step;
            let (x, height) = (NAME_WIDTH + ms / end_ms * WIDTH, self.height());
            let _ = writeln!(
                out,
                "<line class=\"tick\" x1=\"{x:.2}\" x2=\"{x:.2}\" y1=\"18\" y2=\"{height}\"/>\
                 <text class=\"middle\" x=\"{x:.2}\" y=\"13\">{ms:.decimals$} ms</text>"
            );
        }
    }

    fn side(&self, out: &mut String, side: &Side, top: f64, scale: f64) {
        for (line, (rank, bars)) in side.shown.iter().zip(&side.bars).enumerate() {
            let y = top + HEAD + line as f64 * LINE;
            let name = format!("{} {rank}", side.word);
            let (end, base) = (NAME_WIDTH - 8.0, y + LINE - 5.0);
            let _ = writeln!(out, "<text class=\"end\" x=\"{end}\" y=\"{base}\">{name}</text>");
            for (group, bar) in bars.iter().enumerate() {
                let Some(bar) = bar else { continue };
                // Buckets in flight overlap in time: neighbours do not share a half of the line.
                let y = y + 1.0 + (group % 2) as f64 * (BAR + 1.0);
                let x = NAME_WIDTH + bar.start_s * scale;
                // Thinner than half a pixel it could not be seen.
                let width = ((bar.end_s - bar.start_s) * scale).max(0.5);
                let colour = group % COLOURS;
                let _ = writeln!(
                    out,
                    "<rect class=\"c{colour}\" x=\"{x:.2}\" y=\"{y}\" width=\"{width:.2}\" \
                     height=\"{BAR}\"><title>{name}, {}</title></rect>",
                    self.tooltip(group, bar)
                );
            }
        }
    }

    fn tooltip(&self, group: usize, bar: &Bar) -> String {
        let first = group * self.merged;
        let last = (first + self.merged).min(self.buckets) - 1;
        let mut text = match first == last {
            true => format!("bucket {first}"),
            false => format!("buckets {first} to {last}"),
        };
        let (start, end) = (bar.start_s * 1e3, bar.end_s * 1e3);
        let _ = write!(text, ": {start:.3} to {end:.3} ms");
        for (word, n) in [("sent", bar.sent), ("received", bar.received)] {
            if n > 0 {
                let _ = write!(text, ", {} {word}", human::bytes(n));
            }
        }
        text
    }
}

/// A round number of milliseconds, so that there are at most twelve ticks.
fn tick(end_ms: f64) -> f64 {
    let least = end_ms / 12.0;
    let power = 10f64.powf(least.log10().floor());
    let round = [1.0, 2.0, 5.0, 10.0].map(|n| n * power);
    round.into_iter().find(|step| *step >= least).unwrap_or(10.0 * power)
}

fn style() -> String {
    let mut css = "\
:root { color-scheme: light dark; --text: #222; --back: #fff; --tick: #ddd; --light: 48%; }
@media (prefers-color-scheme: dark) {
  :root { --text: #ddd; --back: #181818; --tick: #3a3a3a; --light: 62%; }
}
body { background: var(--back); color: var(--text); font: 14px system-ui, sans-serif; margin: 24px; }
h1 { font-size: 16px; }
text { fill: var(--text); font-size: 11px; }
.middle { text-anchor: middle; }
.end { text-anchor: end; }
.tick { stroke: var(--tick); }
.roofline { stroke: var(--text); stroke-width: 1.5; stroke-dasharray: 5 4; }
.amax { fill: var(--text); fill-opacity: 0.25; }
rect:hover { fill-opacity: 0.6; }
"
    .to_owned();
    for colour in 0..COLOURS {
        // Steps of five twelfths of the circle keep neighbours apart.
        let hue = colour * 5 % COLOURS * 360 / COLOURS;
        let _ = writeln!(css, ".c{colour} {{ fill: hsl({hue} 60% var(--light)); }}");
    }
    css
}

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '&' => out.push_str("&amp;"),
            '"' => out.push_str("&quot;"),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::Message;
    use crate::simulate::{Values, simulate};
    use crate::topo::{Cluster, RankId};

    /// Every trainer sends each bucket to some ranks, and each rank passes it on.
    fn traffic(trainers: u32, ranks: u32, buckets: usize) -> Traffic {
        let messages = move |bucket: usize| {
            let to = |t: u32| RankId(u64::from(t) % u64::from(ranks));
            let size = |t: u32| 1_000_000 * (1 + (u64::from(t) * 7 + bucket as u64 * 5) % 9);
            let sends = (0..trainers).map(|t| Message {
                hop: 0,
                from: Peer::Trainer(t),
                to: to(t),
                flows: vec![t],
                bytes: size(t),
            });
            let relays = (0..trainers.min(ranks)).map(|t| Message {
                hop: 1,
                from: Peer::Rank(to(t)),
                to: to(t + 1),
                flows: vec![t],
                bytes: size(t),
            });
            sends.chain(relays).collect()
        };
        let mut values = Values::default();
        let all: Vec<RankId> = (0..u64::from(ranks)).map(RankId).collect();
        values.add(5_000_000 * buckets as u64 * 2, &[0], &all);
        Traffic {
            trainers,
            ranks,
            in_flight: 2,
            staging_bytes: 1 << 20,
            buckets,
            messages: Box::new(messages),
            amax: vec![(20_000_000, 20_000_000)],
            values,
        }
    }

    fn page(traffic: &Traffic) -> String {
        let mut timeline = Timeline::new(traffic);
        let report = simulate(traffic, &Cluster::default(), &mut |t| timeline.add(&t));
        timeline.html("a <b> & \"c\"", &report)
    }

    fn bars(page: &str) -> usize {
        page.matches("<rect class=\"c").count()
    }

    /// Tags that are open after the text; panics where one closes another.
    fn open_tags(page: &str) -> Vec<&str> {
        let mut open = Vec::new();
        for tag in page.split('<').skip(1) {
            let (tag, text) = tag.split_once('>').expect("a tag that ends");
            assert!(!text.contains('>'), "{text}");
            let name = tag.split([' ', '/']).find(|n| !n.is_empty()).unwrap_or_default();
            match (tag.starts_with('/'), tag.starts_with('!') || tag.ends_with('/')) {
                (true, _) => assert_eq!(open.pop(), Some(name)),
                (_, true) => (),
                _ => open.push(name),
            }
        }
        open
    }

    #[test]
    fn a_page_is_whole_and_shows_every_rank() {
        let page = page(&traffic(16, 8, 40));
        assert!(open_tags(&page).is_empty());
        assert!(page.contains("<h1>a &lt;b&gt; &amp; &quot;c&quot;</h1>"));
        assert_eq!(bars(&page), (16 + 8) * 40);
        assert_eq!(page.matches("class=\"end\"").count(), 24);
        assert!(page.contains("trainer 3, bucket 39: "));
        assert!(!page.contains("are shown") && !page.contains("share a bar"));
    }

    #[test]
    fn a_large_update_is_thinned_out() {
        let page = page(&traffic(300, 100, 200));
        assert!(page.contains("Of 300 trainer ranks 64 are shown."));
        assert!(page.contains("Of 100 inference ranks 64 are shown."));
        assert!(page.contains("2 adjacent buckets share a bar."));
        for name in ["trainer 0", "trainer 299", "inference 0", "inference 99"] {
            assert!(page.contains(&format!(">{name}<")), "{name}");
        }
        assert!(bars(&page) <= MOST_BARS);
        assert!(page.contains("buckets 198 to 199: "));
    }

    #[test]
    fn nothing_to_draw_is_drawn() {
        assert!(open_tags(&page(&Traffic { amax: vec![], ..traffic(1, 1, 0) })).is_empty());
    }

    #[test]
    fn ticks_are_round() {
        assert_eq!([12.0, 13.0, 100.0, 0.6].map(tick), [1.0, 2.0, 10.0, 0.05]);
    }
}
