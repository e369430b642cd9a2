//! What a script may use: operations, depth, sizes, time; which packages and symbols it sees.

use std::time::{Duration, Instant};

use rhai::packages::{
    ArithmeticPackage, BasicArrayPackage, BasicFnPackage, BasicIteratorPackage,
    BasicMapPackage, BasicMathPackage, BasicStringPackage, LanguageCorePackage, LogicPackage,
    MoreStringPackage, Package,
};
use rhai::{Dynamic, Engine, OptimizationLevel};

/// Bounds of one evaluation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    pub operations: u64,
    pub call_depth: usize,
    pub string_bytes: usize,
    pub array_items: usize,
    pub time: Duration,
}

impl Default for Limits {
    /// Room for plans of a few hundred thousand nodes; an endless loop ends within seconds.
    fn default() -> Self {
        Limits {
            operations: 50_000_000,
            call_depth: 48,
            string_bytes: 64 << 10,
            array_items: 100_000,
            time: Duration::from_secs(20),
        }
    }
}

pub(super) fn apply(engine: &mut Engine, limits: &Limits) {
    LanguageCorePackage::new().register_into_engine(engine);
    ArithmeticPackage::new().register_into_engine(engine);
    BasicStringPackage::new().register_into_engine(engine);
    BasicIteratorPackage::new().register_into_engine(engine);
    BasicFnPackage::new().register_into_engine(engine);
    LogicPackage::new().register_into_engine(engine);
    BasicMathPackage::new().register_into_engine(engine);
    BasicArrayPackage::new().register_into_engine(engine);
    BasicMapPackage::new().register_into_engine(engine);
    MoreStringPackage::new().register_into_engine(engine);
    // The optimizer folds a missing key of a constant map to (), silently.
    engine.set_optimization_level(OptimizationLevel::None);
    engine.set_max_operations(limits.operations);
    engine.set_max_call_levels(limits.call_depth);
    engine.set_max_expr_depths(64, 64);
    engine.set_max_string_size(limits.string_bytes);
    engine.set_max_array_size(limits.array_items);
    engine.set_max_map_size(10_000);
    engine.set_max_variables(4_000);
    engine.set_max_functions(1_000);
    engine.set_max_modules(100);
    engine.disable_symbol("eval");
    let deadline = Instant::now() + limits.time;
    engine.on_progress(move |operations| {
        // The clock is read rarely: reading it costs more than an operation.
        let late = operations.is_multiple_of(4096) && Instant::now() > deadline;
        late.then_some(Dynamic::UNIT)
    });
}
