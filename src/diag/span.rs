//! Places in plan files. Rhai gives a point; a span widens it to the token that starts there.
//! Knows nothing of messages; nothing here panics on a place that a file does not have.

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

/// One plan file, with the byte at which each of its lines starts.
#[derive(Clone, Debug, PartialEq, Eq)]
struct File {
    name: String,
    text: String,
    starts: Vec<usize>,
}

/// The plan files of one evaluation: name as shown to a person, and text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SourceMap {
    files: Vec<File>,
    by_name: BTreeMap<String, FileId>,
}

impl SourceMap {
    /// Adds a file, or returns the id it already has.
    pub fn add(&mut self, name: &str, text: &str) -> FileId {
        if let Some(id) = self.by_name.get(name) {
            return *id;
        }
        let id = FileId(self.files.len() as u32);
        let ends = text.bytes().enumerate().filter(|(_, b)| *b == b'\n').map(|(at, _)| at + 1);
        let starts = std::iter::once(0).chain(ends).collect();
        self.files.push(File { name: name.to_owned(), text: text.to_owned(), starts });
        self.by_name.insert(name.to_owned(), id);
        id
    }

    /// The id of a file that was added under this name.
    pub fn find(&self, name: &str) -> Option<FileId> {
        self.by_name.get(name).copied()
    }

    /// The file's name as shown to a person.
    pub fn name(&self, file: FileId) -> &str {
        self.file(file).map_or("<unknown file>", |f| f.name.as_str())
    }

    /// The file's text; empty for an id that is not of this map.
    pub fn text(&self, file: FileId) -> &str {
        self.file(file).map_or("", |f| f.text.as_str())
    }

    /// All files in the order in which they were added.
    pub fn files(&self) -> impl Iterator<Item = (&str, &str)> {
        self.files.iter().map(|f| (f.name.as_str(), f.text.as_str()))
    }

    /// A line, counted from 1, without its end; the empty line after a last newline counts,
    /// because a parser puts "end of file" there.
    pub fn line(&self, file: FileId, line: u32) -> Option<&str> {
        let file = self.file(file)?;
        let index = (line as usize).checked_sub(1)?;
        let start = *file.starts.get(index)?;
        let end = file.starts.get(index + 1).copied().unwrap_or(file.text.len());
        let text = file.text.get(start..end)?;
        let text = text.strip_suffix('\n').unwrap_or(text);
        Some(text.strip_suffix('\r').unwrap_or(text))
    }

    /// The span of the token that starts at a point: an identifier, a text in quotes, an index
    /// `["name"]`, or one character. A dot stands for the property behind it.
    pub fn token_at(&self, file: FileId, line: u32, column: u32) -> Span {
        let text = self.line(file, line).unwrap_or("");
        let rest = || text.chars().skip(column.saturating_sub(1) as usize);
        let word = |c: &char| c.is_alphanumeric() || *c == '_';
        let mut first = rest();
        let len = match (first.next(), first.next()) {
            (Some('.'), Some(c)) if c.is_alphabetic() => {
                return self.token_at(file, line, column + 1);
            }
            (Some('"'), _) => quoted(rest()),
            (Some('['), Some('"')) => quoted(rest().skip(1)).map(|n| n + 2),
            _ => None,
        };
        let len = len.unwrap_or_else(|| rest().take_while(word).count() as u32);
        Span { file, line, column, len: len.max(1) }
    }

    /// True if a parenthesis follows right behind the span.
    pub fn opens_call(&self, span: Span) -> bool {
        let text = self.line(span.file, span.line).unwrap_or("");
        let behind = span.column.saturating_sub(1) + span.len;
        text.chars().nth(behind as usize) == Some('(')
    }

    /// `plans/qwen3.rhai:9:10`, the form that tables and JSON use.
    pub fn show(&self, span: Span) -> String {
        format!("{}:{}:{}", self.name(span.file), span.line, span.column)
    }

    fn file(&self, file: FileId) -> Option<&File> {
        self.files.get(file.0 as usize)
    }
}

/// Characters of a text from its opening to its closing quote; none without one in the line.
fn quoted(mut text: impl Iterator<Item = char>) -> Option<u32> {
    text.next()?;
    let inside = text.position(|c| c == '"')?;
    Some(inside as u32 + 2)
}
