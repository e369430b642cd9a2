//! How many boxes one parameter may take. A few moves of rows and columns in turn can ask for one
//! box an element, which no machine holds.

use std::cell::Cell;

/// Most boxes that are looked at for one parameter of one rank.
pub const MOST_BOXES: u64 = 1 << 21;

thread_local! {
    /// Unbounded outside of [`within`].
    static LEFT: Cell<u64> = const { Cell::new(u64::MAX) };
}

/// Does some work of this thread on a budget of its own; none if that was not enough.
pub(super) fn within<T>(work: impl FnOnce() -> T) -> Option<T> {
    LEFT.set(MOST_BOXES);
    let done = work();
    let enough = LEFT.replace(u64::MAX) > 0;
    enough.then_some(done)
}

/// Takes some boxes off the budget. Once this is false nothing that is made will be used.
pub(super) fn take(boxes: u64) -> bool {
    let left = LEFT.get().saturating_sub(boxes);
    LEFT.set(left);
    left > 0
}
