//! Whether all members are about to do the same.

use std::collections::BTreeMap;
use std::time::Duration;

use super::Member;
use super::words::processes;
use crate::diag::Diagnostic;

/// The round in which members compare.
const ROUND: &str = "agreement";

/// Compares named values of all members: a plan's digest, a schedule's hash. All members come to
/// the same verdict, and those that hold what most do are taken to be right.
///
/// # Errors
/// E0611 that names those who differ in the first such value, and both values; the rest are
/// notes. E0604 as for every exchange.
pub fn agree(
    member: &Member,
    what: &[(&str, String)],
    timeout: Duration,
) -> Result<(), Diagnostic> {
    let own: Vec<(String, String)> =
        what.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
    let all = member.share(ROUND, &own, timeout)?;
    match differences(&all).as_slice() {
        [] => Ok(()),
        [first, rest @ ..] => {
            let told = Diagnostic::error("E0611", first);
            Err(rest.iter().fold(told, |told, next| told.note(next)))
        }
    }
}

/// One sentence for each name and each value of it that is not the usual one.
fn differences(all: &[Vec<(String, String)>]) -> Vec<String> {
    let mut names: Vec<&str> = Vec::new();
    for (name, _) in all.iter().flatten() {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    let mut found = Vec::new();
    for name in names {
        let value = |given: &[(String, String)]| {
            given.iter().find(|(n, _)| n == name).map(|(_, value)| value.clone())
        };
        let values: Vec<Option<String>> = all.iter().map(|given| value(given)).collect();
        // Holders by value, in order of the first holder.
        let mut holders: BTreeMap<&Option<String>, Vec<usize>> = BTreeMap::new();
        for (member, value) in values.iter().enumerate() {
            holders.entry(value).or_default().push(member);
        }
        let mut groups: Vec<(&Option<String>, Vec<usize>)> = holders.into_iter().collect();
        groups.sort_by_key(|(_, members)| (std::cmp::Reverse(members.len()), members[0]));
        let words = |value: &Option<String>| value.clone().unwrap_or_else(|| "none".into());
        let Some(((usual, by), others)) = groups.split_first() else { continue };
        for (other, members) in others {
            let verb = if members.len() == 1 { "has" } else { "have" };
            found.push(format!(
                "{} {verb} another {name} than {}: {} instead of {}",
                processes(members),
                processes(by),
                words(other),
                words(usual)
            ));
        }
    }
    found
}
