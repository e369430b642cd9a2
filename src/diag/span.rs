//! Places in plan files. Rhai gives a point; a span widens it to the token that starts there.

use std::collections::BTreeMap;

/// Index of a file in a [`SourceMap`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId(pub u32);

/// A token in a plan file: line and column count from 1, the column and length in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Span {
    pub file: FileId,
    pub line: u32,
    pub column: u32,
    pub len: u32,
}

/// The plan files of one evaluation: name as shown to a person, and text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SourceMap {
    files: Vec<(String, String)>,
    by_name: BTreeMap<String, FileId>,
}

impl SourceMap {
    /// Adds a file, or returns the id it already has.
    pub fn add(&mut self, name: &str, text: &str) -> FileId {
        if let Some(id) = self.by_name.get(name) {
            return *id;
        }
        let id = FileId(self.files.len() as u32);
        self.files.push((name.to_owned(), text.to_owned()));
        self.by_name.insert(name.to_owned(), id);
        id
    }

    pub fn find(&self, name: &str) -> Option<FileId> {
        self.by_name.get(name).copied()
    }

    pub fn name(&self, file: FileId) -> &str {
        &self.files[file.0 as usize].0
    }

    pub fn text(&self, file: FileId) -> &str {
        &self.files[file.0 as usize].1
    }

    /// All files in the order in which they were added.
    pub fn files(&self) -> impl Iterator<Item = (&str, &str)> {
        self.files.iter().map(|(n, t)| (n.as_str(), t.as_str()))
    }

    /// The span of the token that starts at a point: an identifier, or one character.
    pub fn token_at(&self, file: FileId, line: u32, column: u32) -> Span {
        let text = self.text(file).lines().nth(line.saturating_sub(1) as usize).unwrap_or("");
        let word = text
            .chars()
            .skip(column.saturating_sub(1) as usize)
            .take_while(|c| c.is_alphanumeric() || *c == '_')
            .count() as u32;
        Span { file, line, column, len: word.max(1) }
    }

    /// `plans/qwen3.rhai:9:10`, the form that tables and JSON use.
    pub fn show(&self, span: Span) -> String {
        format!("{}:{}:{}", self.name(span.file), span.line, span.column)
    }
}
