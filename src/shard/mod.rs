//! Which boxes of which sources make up what a rank holds. Integers only: no bytes, no devices.

mod boxes;
mod budget;
mod leaf;
mod moves;
mod piece;
mod resolve;
mod split;

pub(crate) use boxes::contiguous;
pub use boxes::{Window, row_major};
pub use budget::MOST_BOXES;
pub use leaf::Leaf;
pub(crate) use moves::crop_pieces;
pub use piece::{Expr, Made, Piece, ScaleView, Storage, Stored, Tiles, TilesFrom, View};
pub use resolve::{ExpertMap, Resolver, Unsaid};
pub use split::{Apart, Layouts, Share};

#[cfg(test)]
mod tests;
