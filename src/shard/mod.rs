//! Which boxes of which sources make up what a rank holds. Integers only: no bytes, no devices.

mod boxes;
mod moves;
mod piece;
mod resolve;

pub use boxes::{Window, row_major};
pub(crate) use moves::crop_pieces;
pub use piece::{Expr, Made, Piece, ScaleView, Storage, Stored, Tiles, TilesFrom, View};
pub use resolve::{ExpertMap, Resolver};

#[cfg(test)]
mod tests;
