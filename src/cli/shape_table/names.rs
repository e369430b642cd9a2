//! Names that differ only in numbers, folded: `experts.{0..15}.{gate,up}_proj.weight`.

use std::collections::{BTreeSet, HashMap};

/// Stands for a whole-number segment in a template; no plan can write it.
pub(super) const NUMBER: &str = "\u{0}";

/// More patterns than this are not compared pair by pair.
const MERGED: usize = 64;

/// More patterns than this are counted, not shown.
const SHOWN: usize = 6;

/// The layer that a name is seen from.
#[derive(Clone, Copy)]
pub(super) struct Layer<'a> {
    /// `model.layers.`, or empty for a parameter outside of layers.
    pub prefix: &'a str,
    pub number: Option<u64>,
}

/// Cuts `model.layers.3.mlp.w` into `model.layers.`, 3 and `mlp.w`, at the first number.
pub(super) fn split_layer(name: &str) -> Option<(&str, u64, &str)> {
    let mut at = 0;
    for segment in name.split('.') {
        let end = at + segment.len();
        if let Some(number) = whole(segment) {
            let rest = name.get(end + 1..).filter(|r| !r.is_empty())?;
            return Some((&name[..at], number, rest));
        }
        at = end + 1;
    }
    None
}

/// A segment as a number, if it is written as numbers are.
fn whole(segment: &str) -> Option<u64> {
    let digits = segment.bytes().all(|b| b.is_ascii_digit());
    let plain = digits && (segment == "0" || !segment.starts_with('0'));
    if plain { segment.parse().ok() } else { None }
}

/// A name with its numbers taken out, and the numbers.
pub(super) fn template(name: &str) -> (String, Vec<u64>) {
    let (mut text, mut numbers) = (String::with_capacity(name.len()), Vec::new());
    for (i, segment) in name.split('.').enumerate() {
        if i > 0 {
            text.push('.');
        }
        match whole(segment) {
            Some(number) => {
                numbers.push(number);
                text.push_str(NUMBER);
            }
            None => text.push_str(segment),
        }
    }
    (text, numbers)
}

/// The numbers found at one place of a template, over several lists of names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Numbers {
    all: BTreeSet<u64>,
    /// Fewest and most that one list has.
    fewest: usize,
    most: usize,
}

impl Numbers {
    pub fn one(number: u64) -> Self {
        Numbers { all: BTreeSet::from([number]), fewest: 1, most: 1 }
    }

    /// Takes numbers of the same list in.
    pub fn add(&mut self, other: &Numbers) {
        self.all.extend(&other.all);
        self.fewest = self.all.len();
        self.most = self.all.len();
    }

    /// Takes the numbers of another list in.
    fn union(&mut self, other: &Numbers) {
        self.all.extend(&other.all);
        self.fewest = self.fewest.min(other.fewest);
        self.most = self.most.max(other.most);
    }

    /// `{0..31}`, or `{32 of 0..255}` where lists differ.
    pub fn show(&self) -> String {
        let all: Vec<u64> = self.all.iter().copied().collect();
        let span = ranges(&all);
        match (self.fewest, self.most) {
            (fewest, _) if fewest == all.len() => braced(&all),
            (fewest, most) if fewest == most => format!("{{{fewest} of {span}}}"),
            (fewest, most) => format!("{{{fewest}..{most} of {span}}}"),
        }
    }
}

/// Names of one template.
#[derive(Clone, Debug)]
struct Family {
    template: String,
    numbers: Vec<Numbers>,
    /// True if every combination of the numbers occurs.
    whole: bool,
}

/// A list of names, folded by template in order of first appearance.
#[derive(Clone, Debug, Default)]
pub(super) struct Names {
    families: Vec<Family>,
}

impl Names {
    /// Folds names as seen from a layer: its prefix is left out, and its number elsewhere is `*`.
    pub fn of<'a>(names: impl IntoIterator<Item = &'a str>, layer: Layer<'_>) -> Self {
        let home = layer.number.map(|n| format!("{}{n}.", layer.prefix));
        let mut places: HashMap<String, usize> = HashMap::new();
        let mut counts: Vec<usize> = Vec::new();
        let mut families: Vec<Family> = Vec::new();
        for name in names {
            let (text, numbers) = match home.as_deref().and_then(|h| name.strip_prefix(h)) {
                Some(rest) => template(rest),
                None => starred(name, layer.number),
            };
            let lists = numbers.into_iter().map(Numbers::one);
            if let Some(&at) = places.get(&text) {
                counts[at] += 1;
                families[at].numbers.iter_mut().zip(lists).for_each(|(a, b)| a.add(&b));
                continue;
            }
            places.insert(text.clone(), families.len());
            counts.push(1);
            families.push(Family { template: text, numbers: lists.collect(), whole: true });
        }
        for (family, count) in families.iter_mut().zip(counts) {
            let all = family.numbers.iter().try_fold(1usize, |a, n| a.checked_mul(n.all.len()));
            family.whole = all == Some(count);
        }
        Names { families }
    }

    /// Takes another layer's or rank's list in.
    pub fn union(&mut self, other: &Names) {
        for theirs in &other.families {
            match self.families.iter_mut().find(|f| f.template == theirs.template) {
                Some(ours) => {
                    ours.whole &= theirs.whole;
                    ours.numbers.iter_mut().zip(&theirs.numbers).for_each(|(a, b)| a.union(b));
                }
                None => self.families.push(theirs.clone()),
            }
        }
    }

    /// True if both lists have the same templates in the same order.
    pub fn alike(&self, other: &Names) -> bool {
        self.families.len() == other.families.len()
            && self.families.iter().zip(&other.families).all(|(a, b)| a.template == b.template)
    }

    pub fn is_empty(&self) -> bool {
        self.families.is_empty()
    }

    /// The list as text; `only` is the layer's number where there is but one.
    pub fn show(&self, only: Option<u64>) -> String {
        let mut patterns: Vec<Pattern> =
            self.families.iter().map(|f| Pattern::of(f, only)).collect();
        if patterns.len() <= MERGED {
            merge(&mut patterns);
        }
        let more = patterns.len().saturating_sub(SHOWN);
        let shown = patterns.iter().take(SHOWN).map(Pattern::show);
        let mut text = shown.collect::<Vec<_>>().join(", ");
        if more > 0 {
            text.push_str(&format!(" and {more} more"));
        }
        text
    }
}

/// The template of a name from outside of the layer.
fn starred(name: &str, layer: Option<u64>) -> (String, Vec<u64>) {
    match (split_layer(name), layer) {
        (Some((before, number, rest)), Some(layer)) if number == layer => {
            let (text, numbers) = template(rest);
            (format!("{before}*.{text}"), numbers)
        }
        _ => template(name),
    }
}

/// One segment of a pattern: words to choose from, or numbers.
#[derive(PartialEq)]
enum Segment {
    Words(Vec<String>),
    Numbers(String),
}

#[derive(PartialEq)]
struct Pattern {
    segments: Vec<Segment>,
    whole: bool,
}

impl Pattern {
    fn of(family: &Family, only: Option<u64>) -> Self {
        let mut numbers = family.numbers.iter();
        let star = only.map_or_else(|| "*".to_owned(), |n| n.to_string());
        let segments = family.template.split('.').map(|s| match s {
            NUMBER => Segment::Numbers(numbers.next().map_or_else(String::new, Numbers::show)),
            "*" => Segment::Words(vec![star.clone()]),
            word => Segment::Words(vec![word.to_owned()]),
        });
        Pattern { segments: segments.collect(), whole: family.whole }
    }

    /// Takes a pattern in that differs in the words of one segment only.
    fn take(&mut self, other: &Pattern) -> bool {
        if self.segments.len() != other.segments.len() || self.whole != other.whole {
            return false;
        }
        let mut differing =
            (0..self.segments.len()).filter(|i| self.segments[*i] != other.segments[*i]);
        let (Some(at), None) = (differing.next(), differing.next()) else { return false };
        let (Segment::Words(ours), Segment::Words(theirs)) =
            (&mut self.segments[at], &other.segments[at])
        else {
            return false;
        };
        for word in theirs {
            if !ours.contains(word) {
                ours.push(word.clone());
            }
        }
        true
    }

    fn show(&self) -> String {
        let segments = self.segments.iter().map(|s| match s {
            Segment::Words(words) => choice(words),
            Segment::Numbers(text) => text.clone(),
        });
        let text = segments.collect::<Vec<_>>().join(".");
        if self.whole { text } else { format!("some of {text}") }
    }
}

/// Merges patterns pairwise until no two can be.
fn merge(patterns: &mut Vec<Pattern>) {
    let mut at = 0;
    while at < patterns.len() {
        let (head, tail) = patterns.split_at_mut(at + 1);
        match tail.iter().position(|p| head[at].take(p)) {
            Some(taken) => {
                patterns.remove(at + 1 + taken);
                // What grew may now fit a pattern before it.
                at = 0;
            }
            None => at += 1,
        }
    }
}

/// `{q,k,v}_proj`: words with the parts between underscores that they share outside.
fn choice(words: &[String]) -> String {
    let [first, rest @ ..] = words else { return String::new() };
    if rest.is_empty() {
        return first.clone();
    }
    let shortest = words.iter().map(String::len).min().unwrap_or(0);
    let edge = |w: &str, at: usize| {
        let bytes = w.as_bytes();
        at == 0 || at == bytes.len() || bytes[at] == b'_' || bytes[at - 1] == b'_'
    };
    let head = (0..=shortest)
        .rev()
        .find(|n| {
            let shared = first.as_bytes().get(..*n);
            words.iter().all(|w| w.as_bytes().get(..*n) == shared && edge(w, *n))
        })
        .unwrap_or(0);
    let tail = (0..=shortest - head)
        .rev()
        .find(|n| {
            let end = |w: &str| w.len() - *n;
            let shared = &first.as_bytes()[end(first)..];
            words.iter().all(|w| &w.as_bytes()[end(w)..] == shared && edge(w, end(w)))
        })
        .unwrap_or(0);
    // Edges lie beside an ASCII character or at an end, so every cut is a character boundary.
    let middle = |w: &String| w.get(head..w.len() - tail).unwrap_or(w).to_owned();
    let middles: Vec<String> = words.iter().map(middle).collect();
    let before = first.get(..head).unwrap_or("");
    let after = first.get(first.len() - tail..).unwrap_or("");
    format!("{before}{{{}}}{after}", middles.join(","))
}

/// Numbers in order as a path segment: `7`, or `{0..3,8}`.
pub(super) fn braced(numbers: &[u64]) -> String {
    match numbers {
        [one] => one.to_string(),
        _ => format!("{{{}}}", ranges(numbers)),
    }
}

/// Numbers in order as runs: `0..2,6..74 by 4`, or what a run leaves out if that is shorter.
pub(in crate::cli) fn ranges(numbers: &[u64]) -> String {
    let plain = runs(numbers);
    let (Some(first), Some(last)) = (numbers.first(), numbers.last()) else { return plain };
    let gaps = (last - first).saturating_sub(numbers.len() as u64 - 1);
    if !plain.contains(',') || gaps == 0 || gaps > numbers.len() as u64 {
        return plain;
    }
    let held: BTreeSet<u64> = numbers.iter().copied().collect();
    let left: Vec<u64> = (*first..*last).filter(|n| !held.contains(n)).collect();
    let other = format!("{first}..{last} but {}", runs(&left));
    if other.len() < plain.len() { other } else { plain }
}

fn runs(numbers: &[u64]) -> String {
    let mut parts: Vec<String> = Vec::new();
    let mut rest = numbers;
    while let [first, tail @ ..] = rest {
        let step = tail.first().map_or(0, |second| second - first);
        let steps = rest.windows(2).take_while(|w| w[1] - w[0] == step).count();
        if steps >= 2 || (steps == 1 && step == 1) {
            let last = rest[steps];
            let by = if step == 1 { String::new() } else { format!(" by {step}") };
            parts.push(format!("{first}..{last}{by}"));
            rest = &rest[steps + 1..];
        } else {
            parts.push(first.to_string());
            rest = tail;
        }
    }
    parts.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folded(names: &[&str]) -> String {
        let layer = Layer { prefix: "model.layers.", number: Some(3) };
        Names::of(names.iter().copied(), layer).show(None)
    }

    #[test]
    fn numbers_fold_to_runs() {
        let of = |n: &[u64]| ranges(n);
        assert_eq!(of(&[7]), "7");
        assert_eq!(of(&[3, 4]), "3..4");
        assert_eq!(of(&[3, 5]), "3,5");
        assert_eq!(of(&[0, 1, 2, 6, 10, 14]), "0..2,6..14 by 4");
        assert_eq!(of(&[0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14]), "0..14 but 3..11 by 4");
        assert_eq!(of(&[]), "");
        assert_eq!(of(&[0, u64::MAX]), "0,18446744073709551615");
    }

    #[test]
    fn names_fold_to_braces() {
        let at = |n: &str| format!("model.layers.3.{n}");
        let qkv = ["q_proj.weight", "k_proj.weight", "v_proj.weight"].map(at);
        assert_eq!(folded(&qkv.each_ref().map(String::as_str)), "{q,k,v}_proj.weight");
        let mut experts = Vec::new();
        for e in 0..3 {
            for part in ["gate_proj", "up_proj"] {
                for leaf in ["weight", "weight_scale_inv"] {
                    experts.push(at(&format!("experts.{e}.{part}.{leaf}")));
                }
            }
        }
        let names: Vec<&str> = experts.iter().map(String::as_str).collect();
        assert_eq!(folded(&names), "experts.{0..2}.{gate,up}_proj.weight{,_scale_inv}");
        assert_eq!(folded(&["a.weight", "b.x.weight"]), "a.weight, b.x.weight");
        assert_eq!(folded(&["gate_proj", "update_proj"]), "{gate,update}_proj");
        assert_eq!(
            folded(&["m.layers.3.w", "model.layers.2.w"]),
            "m.layers.*.w, model.layers.2.w"
        );
        assert_eq!(folded(&["a.0.b.0", "a.1.b.1"]), "some of a.{0..1}.b.{0..1}");
        assert_eq!(folded(&["é_a", "è_a"]), "{é,è}_a");
    }

    #[test]
    fn lists_that_differ_say_how_many() {
        let list = |experts: std::ops::Range<u64>| {
            let names: Vec<String> = experts.map(|e| format!("experts.{e}.w")).collect();
            Names::of(names.iter().map(String::as_str), Layer { prefix: "", number: None })
        };
        let mut names = list(0..4);
        names.union(&list(4..8));
        assert_eq!(names.show(None), "experts.{4 of 0..7}.w");
        names.union(&list(8..11));
        assert_eq!(names.show(None), "experts.{3..4 of 0..10}.w");
    }
}
