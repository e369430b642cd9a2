//! Cuts of a quantized value over ranks: on its grid of blocks, or refused.

use super::{Type, TypeError, in_matrix};

/// Equal parts of `local` along a dimension, one a rank.
pub(super) struct Cut<'a> {
    /// What cuts, in words: `tp = 8`.
    pub what: &'a str,
    pub dim: usize,
    pub local: u64,
    pub parts: u64,
    /// Whether part k is what rank k holds.
    pub by_rank: bool,
}

impl Cut<'_> {
    /// Refuses a cut of a quantized value that falls inside a block.
    pub fn check(&self, t: &Type) -> Result<(), TypeError> {
        let Cut { what, dim, local, parts, by_rank } = *self;
        let Some(block) = t.quant.map(|q| q.block) else { return Ok(()) };
        if !in_matrix(t, dim) || parts < 2 || local.is_multiple_of(block) {
            return Ok(());
        }
        let size = t.shape[dim];
        let shared = if by_rank { sharing(local, block, parts) } else { String::new() };
        Err(TypeError {
            code: "E0304",
            message: format!("a cut at {local} crosses a quantization block of {block}"),
            label: Some(format!(
                "{what} cuts dimension {dim} of {size} into {local}: {local} mod {block} = {}{shared}",
                local % block
            )),
            hint: Some(
                "write .shard before .quantize to quantize each rank's own rows; an FP8 source \
                 can only be cut at multiples of its block"
                    .to_owned(),
            ),
        })
    }
}

/// Which ranks would need parts of one block: `; ranks 0 and 1, 2 and 3 would share tiles`.
fn sharing(local: u64, block: u64, parts: u64) -> String {
    const SHOWN: usize = 4;
    let mut groups: Vec<(u64, u64)> = Vec::new();
    let mut first = 0;
    for rank in 0..parts {
        // What a rank begins in the middle of a block, the rank before it has begun.
        if u128::from(rank) * u128::from(local) % u128::from(block) == 0 {
            first = rank;
        } else if first + 1 == rank {
            groups.push((first, rank));
        } else if let Some(group) = groups.last_mut() {
            group.1 = rank;
        }
        if groups.len() > SHOWN {
            break;
        }
    }
    let shown: Vec<String> = groups
        .iter()
        .take(SHOWN)
        .map(|(a, b)| if a + 1 == *b { format!("{a} and {b}") } else { format!("{a} to {b}") })
        .collect();
    let more = if groups.len() > SHOWN { " and so on" } else { "" };
    format!("; ranks {}{more} would share tiles", shown.join(", "))
}

#[cfg(test)]
mod tests {
    use super::sharing;

    #[test]
    fn ranks_that_share_blocks_are_named() {
        // 8 ranks of 64: blocks of 128 hold two each.
        let pairs = "; ranks 0 and 1, 2 and 3, 4 and 5, 6 and 7 would share tiles";
        assert_eq!(sharing(64, 128, 8), pairs);
        // 160 = 128 + 32: only after four ranks does a cut fall on the grid again.
        assert_eq!(sharing(160, 128, 8), "; ranks 0 to 3, 4 to 7 would share tiles");
        assert_eq!(sharing(160, 128, 2), "; ranks 0 and 1 would share tiles");
        assert!(sharing(64, 128, 16).ends_with("6 and 7 and so on would share tiles"));
    }
}
