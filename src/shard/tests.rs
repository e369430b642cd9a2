//! Boxes and reshapes against plain index arithmetic.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

use crate::dtype::DType;
use crate::ir::Dims;

use super::boxes::{Window, row_major, through_reshape};
use super::moves::{crop_pieces, permute_pieces, reshape_pieces};
use super::piece::{Expr, Piece, Storage, View};

/// Every index of a window, in order.
fn indices(window: &Window) -> Vec<Vec<u64>> {
    let count = window.len.iter().product::<u64>();
    let nth = |mut n: u64| {
        let mut at = window.lo.to_vec();
        for d in (0..at.len()).rev() {
            at[d] += n % window.len[d];
            n /= window.len[d];
        }
        at
    };
    (0..count).map(nth).collect()
}

fn flat(shape: &[u64], at: &[u64]) -> u64 {
    shape.iter().zip(at).fold(0, |n, (size, i)| n * size + i)
}

/// Elements of a window of a tensor, by their place in it.
fn elements(shape: &[u64], window: &Window) -> Vec<u64> {
    indices(window).iter().map(|at| flat(shape, at)).collect()
}

/// A number of elements as a product of prime factors, and two ways to group them.
fn two_shapes() -> impl Strategy<Value = (Dims, Dims)> {
    let primes = vec(prop_oneof![Just(2u64), Just(3), Just(5)], 0..6);
    (primes, vec(any::<Index>(), 0..4), vec(any::<Index>(), 0..4))
        .prop_map(|(primes, left, right)| (grouped(&primes, &left), grouped(&primes, &right)))
}

/// A shape whose sizes are the products between some cuts; equal cuts give sizes of 1.
fn grouped(primes: &[u64], cuts: &[Index]) -> Dims {
    let mut cuts: Vec<usize> = cuts.iter().map(|c| c.index(primes.len() + 1)).collect();
    cuts.sort_unstable();
    cuts.push(primes.len());
    let mut start = 0;
    let mut shape = Dims::new();
    for end in cuts {
        shape.push(primes[start..end].iter().product());
        start = end;
    }
    shape
}

/// Some part of a shape.
fn part_of(shape: &[u64], choices: &[(Index, Index)]) -> Window {
    let mut window = Window::whole(shape);
    for (d, (lo, len)) in choices.iter().take(shape.len()).enumerate() {
        window.lo[d] = lo.index(shape[d] as usize) as u64;
        window.len[d] = 1 + len.index((shape[d] - window.lo[d]) as usize) as u64;
    }
    window
}

fn choices() -> impl Strategy<Value = Vec<(Index, Index)>> {
    vec(any::<(Index, Index)>(), 0..5)
}

proptest! {
    #[test]
    fn a_reshape_keeps_elements_and_their_order((old, new) in two_shapes(), cut in choices()) {
        let window = part_of(&new, &cut);
        let mut seen = Vec::new();
        for pair in through_reshape(&old, &new, &window) {
            prop_assert!(pair.new.intersect(&window).is_some_and(|common| common == pair.new));
            prop_assert_eq!(elements(&old, &pair.old), elements(&new, &pair.new));
            seen.extend(elements(&new, &pair.new));
        }
        seen.sort_unstable();
        prop_assert_eq!(seen, elements(&new, &window));
    }

    #[test]
    fn pieces_follow_their_elements(
        (old, new) in two_shapes(),
        cut in choices(),
        order in vec(any::<Index>(), 5),
    ) {
        // A permuted tensor, cropped: its strides are not those of its shape.
        let dims = permutation(old.len(), &order);
        let stored = whole(&old);
        let permuted: Dims = dims.iter().map(|d| old[*d]).collect();
        let moved = permute_pieces(&stored, &dims).expect("loads always follow");
        let expected: Vec<u64> = indices(&Window::whole(&permuted))
            .iter()
            .map(|at| {
                let mut from = vec![0; at.len()];
                dims.iter().zip(at).for_each(|(d, i)| from[*d] = *i);
                flat(&old, &from)
            })
            .collect();
        prop_assert_eq!(contents(&moved, &permuted), expected.clone());

        let window = part_of(&permuted, &cut);
        let cropped = crop_pieces(&moved, &window);
        let kept: Vec<u64> =
            elements(&permuted, &window).iter().map(|i| expected[*i as usize]).collect();
        prop_assert_eq!(contents(&cropped, &window.len), kept.clone());

        // The same elements in a row, and in any shape of as many.
        let row = [kept.len() as u64];
        let joined = reshape_pieces(cropped, &window.len, &row).expect("loads always follow");
        prop_assert_eq!(contents(&joined, &row), kept);
        let split = reshape_pieces(moved, &permuted, &new).expect("loads always follow");
        prop_assert_eq!(contents(&split, &new), expected);
    }

    #[test]
    fn intersection_is_what_both_have((shape, _) in two_shapes(), a in choices(), b in choices()) {
        let (a, b) = (part_of(&shape, &a), part_of(&shape, &b));
        let (left, right) = (elements(&shape, &a), elements(&shape, &b));
        let both: Vec<u64> = left.into_iter().filter(|e| right.contains(e)).collect();
        let found = a.intersect(&b);
        prop_assert_eq!(found.clone().map_or(Vec::new(), |w| elements(&shape, &w)), both);
        prop_assert_eq!(found, b.intersect(&a));
    }
}

fn permutation(rank: usize, order: &[Index]) -> Vec<usize> {
    let mut dims: Vec<usize> = (0..rank).collect();
    for i in (1..rank).rev() {
        dims.swap(i, order[i].index(i + 1));
    }
    dims
}

/// A stored tensor as one piece.
fn whole(shape: &[u64]) -> Vec<Piece> {
    let view = View {
        storage: Storage::Source(0),
        dtype: DType::F32,
        start: 0,
        strides: row_major(shape),
    };
    vec![Piece { at: Window::whole(shape), expr: Expr::Load(view) }]
}

/// The stored place of each element, in order; each must have one.
fn contents(pieces: &[Piece], shape: &[u64]) -> Vec<u64> {
    let mut out = vec![None; shape.iter().product::<u64>() as usize];
    for piece in pieces {
        let Expr::Load(view) = &piece.expr else { panic!("not a load: {piece:?}") };
        for at in indices(&piece.at) {
            let off = at.iter().zip(&piece.at.lo).map(|(a, b)| a - b);
            let place = view.start + off.zip(&view.strides).map(|(i, s)| i * s).sum::<u64>();
            let slot = &mut out[flat(shape, &at) as usize];
            assert_eq!(slot.replace(place), None, "{at:?} of {shape:?} is filled twice");
        }
    }
    out.into_iter().map(|e| e.expect("every element has a piece")).collect()
}

#[test]
fn rows_of_split_heads_stay_boxes() {
    let window = Window { lo: [0, 1, 0][..].into(), len: [2, 2, 6][..].into() };
    let pairs = through_reshape(&[8, 6], &[2, 4, 6], &window);
    let old: Vec<(u64, u64)> = pairs.iter().map(|p| (p.old.lo[0], p.old.len[0])).collect();
    assert_eq!(old, [(1, 2), (5, 2)]);
    // Splitting a dimension that the window takes whole needs one box.
    let whole = Window::whole(&[2, 4, 6]);
    assert_eq!(through_reshape(&[8, 6], &[2, 4, 6], &whole).len(), 1);
}
