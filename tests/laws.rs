//! Laws that hold for every plan, topology and content.

#[path = "laws/cases.rs"]
mod cases;
#[path = "laws/pieces.rs"]
mod pieces;
#[path = "laws/world.rs"]
mod world;

use kernelcast::backend::reference::{Oracle, Stored};
use kernelcast::compile::Compiled;
use kernelcast::ir::Place;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

use cases::Case;
use world::{Values, World, compile_case};

/// Evaluates all targets of one rank of a compiled plan, in the plan's order.
type Evaluator = fn(&Compiled, &World, usize) -> Vec<Stored>;

/// Law 1: what an evaluator makes of a rank is what the oracle finds, bit for bit.
fn check_against_oracle(case: &Case, seed: u64, values: Values, evaluate: Evaluator) {
    let world = World::random(&case.sources, seed, values);
    let compiled = match compile_case(case, &world) {
        Ok(compiled) => compiled,
        Err(e) => {
            let codes: Vec<_> = e.error.diagnostics.iter().map(|d| d.code).collect();
            assert!(codes.iter().all(|c| *c == "E0501"), "{:#?}", e.error.diagnostics);
            return;
        }
    };
    for (number, rank) in compiled.program.ranks.iter().enumerate() {
        let plan = &compiled.stages[rank.coords.pp as usize];
        let place = Place::of(&compiled.mesh, rank.coords);
        let oracle = Oracle::new(plan, place, &case.experts, &world).expect("it was compiled");
        let found = evaluate(&compiled, &world, number);
        assert_eq!(found.len(), plan.params.len());
        for (param, found) in plan.params.iter().zip(found) {
            let expected = oracle.param(param).expect("every source is there");
            assert_eq!(found, expected, "{} on rank {}", param.name, rank.rank);
        }
    }
}

/// Failures are kept in a file and tried first.
fn config() -> ProptestConfig {
    let kept = FileFailurePersistence::Direct("tests/laws/failures.txt");
    ProptestConfig {
        max_shrink_iters: 20_000,
        failure_persistence: Some(Box::new(kept)),
        ..ProptestConfig::default()
    }
}

fn case() -> impl Strategy<Value = Case> {
    vec(any::<u32>(), 0..120).prop_map(cases::make)
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn pieces_are_what_the_oracle_finds(case in case(), seed: u64) {
        check_against_oracle(&case, seed, Values::Any, pieces::evaluate);
    }
}
