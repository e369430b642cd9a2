//! JSON from outside: where a syntax error is, and objects whose keys must differ.
//! Knows nothing of what the JSON means.

use std::collections::BTreeSet;
use std::fmt;
use std::marker::PhantomData;
use std::path::Path;

use serde::de::{Deserialize, DeserializeOwned, Deserializer, MapAccess, Visitor};

use super::fault;
use crate::diag::Diagnostic;

/// The largest JSON file that is read: an index of a million tensors has a tenth of it.
pub(super) const MOST_JSON: u64 = 1 << 30;

/// An object in file order that also remembers which keys came twice.
#[derive(Debug)]
pub(super) struct Pairs<T> {
    pub pairs: Vec<(String, T)>,
    pub repeated: BTreeSet<String>,
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Pairs<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PairsVisitor<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for PairsVisitor<T> {
            type Value = Pairs<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs<T>, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry::<String, T>()? {
                    pairs.push(pair);
                }
                let repeated = repeated(pairs.iter().map(|(key, _)| key.as_str()));
                Ok(Pairs { pairs, repeated })
            }
        }
        deserializer.deserialize_map(PairsVisitor(PhantomData))
    }
}

/// The names that occur more than once.
pub(super) fn repeated<'a>(names: impl Iterator<Item = &'a str>) -> BTreeSet<String> {
    let mut sorted: Vec<&str> = names.collect();
    sorted.sort_unstable();
    let twice = sorted.windows(2).filter(|w| w[0] == w[1]);
    twice.map(|w| w[0].to_owned()).collect()
}

/// Reads a JSON file; problems of its content get `code`, of the disk `E0601`.
pub(super) fn read<T: DeserializeOwned>(
    path: &Path,
    what: &str,
    code: &'static str,
) -> Result<T, Diagnostic> {
    let bytes = fault::read_whole(path, MOST_JSON)
        .map_err(|e| fault::os(&format!("read the {what}"), path, &e))?;
    serde_json::from_slice(&bytes).map_err(|e| {
        let diagnostic = Diagnostic::error(code, format!("{what} {}", at(path, &e)));
        match python_number(&bytes, &e) {
            Some(word) => diagnostic.hint(format!(
                "Python writes {word}, JSON has no such number: write null or a finite number"
            )),
            None => diagnostic,
        }
    })
}

/// `PATH, line 3, column 7: REASON`; serde_json repeats the place inside the reason.
fn at(path: &Path, error: &serde_json::Error) -> String {
    let (line, column) = (error.line(), error.column());
    let text = error.to_string();
    let reason = text.strip_suffix(&format!(" at line {line} column {column}"));
    let reason = reason.unwrap_or(&text);
    format!("{}, line {line}, column {column}: {reason}", path.display())
}

/// The Python spelling of a non-finite number at the place of a syntax error, if there is one.
fn python_number(bytes: &[u8], error: &serde_json::Error) -> Option<&'static str> {
    let line = bytes.split(|&b| b == b'\n').nth(error.line().checked_sub(1)?)?;
    // The column is that of the first wrong byte, which for -Infinity is inside the word.
    let from = error.column().saturating_sub(2);
    let near = String::from_utf8_lossy(line.get(from..)?);
    ["Infinity", "NaN"].into_iter().find(|word| {
        near.get(..word.len() + 2).unwrap_or(&near).contains(word)
            || near.starts_with(&word[1..])
    })
}
