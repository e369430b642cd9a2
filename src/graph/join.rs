//! Two graphs of one program, one after the other.

use std::ops::Range;

use super::{Bucket, Flow, Graph, SharedTiles};

impl Graph {
    /// This graph, then another of the same ranks.
    pub fn then(&self, next: &Graph) -> Graph {
        let mut all = self.clone();
        let (parts, routes) = (all.parts.len() as u32, all.routes.len() as u32);
        let (flows, holders) = (all.flows.len() as u32, all.holders.len() as u32);
        all.parts.extend_from_slice(&next.parts);
        all.routes.extend_from_slice(&next.routes);
        all.holders.extend_from_slice(&next.holders);
        all.flows.extend(next.flows.iter().map(|f| Flow {
            route: f.route + routes,
            parts: moved(&f.parts, parts),
            ..f.clone()
        }));
        all.buckets
            .extend(next.buckets.iter().map(|b| Bucket { flows: moved(&b.flows, flows) }));
        all.shared.extend(
            next.shared
                .iter()
                .map(|s| SharedTiles { holders: moved(&s.holders, holders), ..s.clone() }),
        );
        all.staging_bytes = all.staging_bytes.max(next.staging_bytes);
        let both: Vec<u8> =
            [self.digest, next.digest].iter().flat_map(|d| d.to_le_bytes()).collect();
        all.digest = xxhash_rust::xxh3::xxh3_128(&both);
        all
    }
}

fn moved(range: &Range<u32>, by: u32) -> Range<u32> {
    range.start + by..range.end + by
}
