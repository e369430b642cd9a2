//! Which file holds which tensor: the index of a sharded checkpoint, or the folder itself.
//! Reads headers and directory entries, never tensor bytes.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use rayon::prelude::*;
use serde::Deserialize;

use super::fault::{count, some_names};
use super::header::{self, Header, HeaderFault};
use super::json::{self, Pairs};
use crate::diag::Diagnostic;

/// The index file of a sharded checkpoint.
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// What a folder or file turned out to hold, with all its problems and notes.
#[derive(Default, Debug)]
pub(super) struct Found {
    pub headers: Vec<Header>,
    /// Tensors that count: name, then header number and tensor number inside it.
    pub chosen: Vec<(String, usize, usize)>,
    pub problems: Vec<Diagnostic>,
    pub notes: Vec<Diagnostic>,
}

#[derive(Deserialize)]
struct IndexFile {
    weight_map: Pairs<String>,
}

/// Reads the files that the index names. `present` are all safetensors files of the folder.
pub(super) fn indexed(folder: &Path, present: &[PathBuf]) -> Found {
    let mut found = Found::default();
    let path = folder.join(INDEX);
    let weight_map = match json::read::<IndexFile>(&path, "index", "E0419") {
        Ok(index) => index.weight_map,
        Err(problem) => {
            found.problems.push(problem);
            return found;
        }
    };
    let repeated: Vec<_> = weight_map.repeated.iter().collect();
    if !repeated.is_empty() {
        let names = some_names(&repeated);
        let text = format!("index {} maps {names} more than once", path.display());
        found.problems.push(Diagnostic::error("E0419", text));
    }
    if weight_map.pairs.is_empty() {
        let text = format!("index {} maps no tensor", path.display());
        found.problems.push(Diagnostic::error("E0419", text));
    }

    let mut files: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let mut home: BTreeMap<&str, &str> = BTreeMap::new();
    for (name, file) in &weight_map.pairs {
        files.entry(file).or_default().push(name);
        home.insert(name, file);
    }
    files.retain(|file, names| {
        let plain = is_plain_name(file);
        if !plain {
            let text = format!(
                "index {} sends {} to {file:?}, which is not the name of a file of its folder",
                path.display(),
                some_names(names)
            );
            found.problems.push(Diagnostic::error("E0416", text));
        }
        plain
    });
    let order: Vec<(&str, Vec<&str>)> = files.into_iter().collect();
    let opened: Vec<_> =
        order.par_iter().map(|(file, _)| header::open(&folder.join(file))).collect();
    for ((file, names), opened) in order.iter().zip(opened) {
        match opened {
            Ok(header) => take_indexed(&mut found, header, file, names, &home),
            Err(HeaderFault::Bad(problem)) => found.problems.push(problem),
            Err(HeaderFault::Missing) => found.problems.push(
                Diagnostic::error(
                    "E0413",
                    format!(
                        "file {} is missing, and with it {} ({})",
                        folder.join(file).display(),
                        count(names.len(), "tensor"),
                        some_names(names)
                    ),
                )
                .note(format!("{} names it", path.display())),
            ),
        }
    }
    for spare in present {
        let name = spare.file_name().and_then(|n| n.to_str());
        if name.is_none_or(|name| order.iter().all(|(file, _)| *file != name)) {
            let text = format!("{} is not in the index and was ignored", spare.display());
            found.notes.push(Diagnostic::info("E0421", text));
        }
    }
    found
}

/// Takes what the index expects of one file; the rest of the file is ignored with a note.
fn take_indexed(
    found: &mut Found,
    header: Header,
    file: &str,
    names: &[&str],
    home: &BTreeMap<&str, &str>,
) {
    let path = header.path.display();
    let mut missing: BTreeSet<&str> = names.iter().copied().collect();
    let mut copies: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let mut unnamed = Vec::new();
    for (number, (name, _)) in header.tensors.iter().enumerate() {
        match home.get(name.as_str()) {
            Some(at) if *at == file => {
                missing.remove(name.as_str());
                found.chosen.push((name.clone(), found.headers.len(), number));
            }
            Some(at) => copies.entry(at).or_default().push(name),
            None => unnamed.push(name.as_str()),
        }
    }
    if !missing.is_empty() {
        let missing: Vec<&str> = missing.into_iter().collect();
        let text = format!(
            "the index sends {} to {path}, whose header does not have {}",
            some_names(&missing),
            if missing.len() == 1 { "it" } else { "them" }
        );
        found.problems.push(Diagnostic::error("E0416", text));
    }
    for (at, names) in copies {
        let text = format!(
            "{} of {path} was ignored: the index takes {} from {at}",
            some_names(&names),
            if names.len() == 1 { "it" } else { "them" }
        );
        found.notes.push(Diagnostic::info("E0421", text));
    }
    if !unnamed.is_empty() {
        let text = format!(
            "{} of {path} not in the index and ignored: {}",
            count(unnamed.len(), "tensor"),
            some_names(&unnamed)
        );
        found.notes.push(Diagnostic::info("E0421", text));
    }
    found.headers.push(header);
}

/// Reads every one of `files`; a name may be in one of them only.
pub(super) fn all_of(files: &[PathBuf]) -> Found {
    let mut found = Found::default();
    let opened: Vec<_> = files.par_iter().map(|file| header::open(file)).collect();
    for (file, opened) in files.iter().zip(opened) {
        match opened {
            Ok(header) => found.headers.push(header),
            Err(HeaderFault::Bad(problem)) => found.problems.push(problem),
            Err(HeaderFault::Missing) => {
                let text = format!("file {} is missing", file.display());
                let hint = "it may be a link whose target is gone";
                found.problems.push(Diagnostic::error("E0413", text).hint(hint));
            }
        }
    }
    let mut first: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
    let mut twice: BTreeMap<(usize, usize), Vec<&str>> = BTreeMap::new();
    for (file, header) in found.headers.iter().enumerate() {
        for (number, (name, _)) in header.tensors.iter().enumerate() {
            match first.get(name.as_str()) {
                Some(&(other, _)) => twice.entry((other, file)).or_default().push(name),
                None => _ = first.insert(name, (file, number)),
            }
        }
    }
    for ((a, b), names) in twice {
        let text = format!(
            "{} and {} both hold {}, and no index says which counts",
            found.headers[a].path.display(),
            found.headers[b].path.display(),
            some_names(&names)
        );
        let hint = format!("add {INDEX} or remove one of the files");
        found.problems.push(Diagnostic::error("E0415", text).hint(hint));
    }
    let chosen = first.into_iter().map(|(name, (file, n))| (name.to_owned(), file, n));
    found.chosen = chosen.collect();
    found.problems.extend(missing_parts(files));
    found
}

/// Without an index, `model-00002-of-00003.safetensors` still tells which files belong.
fn missing_parts(files: &[PathBuf]) -> Vec<Diagnostic> {
    let mut series: BTreeMap<(String, u64), (BTreeSet<u64>, usize)> = BTreeMap::new();
    for file in files {
        let name = file.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let stem = name.strip_suffix(".safetensors").unwrap_or(name);
        let Some((head, total)) = stem.rsplit_once("-of-") else { continue };
        let Some((head, part)) = head.rsplit_once('-') else { continue };
        if let (Ok(part), Ok(total)) = (part.parse(), total.parse()) {
            let seen = series.entry((head.to_owned(), total)).or_default();
            seen.0.insert(part);
            seen.1 += 1;
        }
    }
    let incomplete = series.into_iter().filter(|((_, total), (parts, _))| {
        // Both countings are in use: from 1 to the total and from 0 to one less.
        let zero = u64::from(!parts.contains(&0));
        let expected = zero..total.saturating_add(zero);
        !parts.iter().all(|p| expected.contains(p)) || (parts.len() as u64) < *total
    });
    incomplete
        .map(|((head, total), (_, seen))| {
            let text = format!("{seen} of the {total} files {head}-*-of-* are here");
            Diagnostic::error("E0413", text)
                .note(format!("there is no {INDEX} that would name the tensors of the rest"))
        })
        .collect()
}

/// One ordinary component: no folder, no way up, nothing that another system reads as one.
pub(super) fn is_plain_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None))
        && !name.contains(['/', '\\', '\0'])
}
