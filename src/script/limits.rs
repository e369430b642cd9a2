//! What a script may use: operations, depth, sizes, time; which packages and symbols it sees.

use std::cell::Cell;
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
    /// Tensor expressions, parameters, rules and assertions.
    pub tensors: u32,
    pub time: Duration,
}

/// Why an evaluation ended that the script itself did not end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// A replay reached its trap, or the evaluation starts anew.
    Trap,
    Operations,
    Tensors,
    Time,
}

pub(super) const MAP_ITEMS: usize = 10_000;
pub(super) const VARIABLES: usize = 4_000;
pub(super) const MODULES: usize = 100;
/// Keep and drop rules, and options.
pub(super) const RULES: usize = 10_000;
/// Bytes of a name, a pattern or a message.
pub(super) const NAME_BYTES: usize = 1_000;

impl Default for Limits {
    /// Room for plans of a few hundred thousand nodes; an endless loop ends within seconds.
    fn default() -> Self {
        Limits {
            operations: 50_000_000,
            call_depth: 48,
            string_bytes: 64 << 10,
            array_items: 100_000,
            tensors: 1_000_000,
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
    engine.set_max_call_levels(limits.call_depth);
    engine.set_max_expr_depths(64, 64);
    engine.set_max_string_size(limits.string_bytes);
    engine.set_max_array_size(limits.array_items);
    engine.set_max_map_size(MAP_ITEMS);
    engine.set_max_variables(VARIABLES);
    engine.set_max_functions(1_000);
    engine.set_max_modules(MODULES);
    engine.disable_symbol("eval");
    // A function that is curried with itself doubles, and no limit of rhai's counts it.
    engine.disable_symbol("curry");
    let deadline = Instant::now() + limits.time;
    let most = limits.operations;
    // Rhai starts its own count anew in every closure that it is handed.
    let count = Cell::new(0_u64);
    engine.on_progress(move |_| {
        count.set(count.get() + 1);
        // The clock is read rarely: reading it costs more than an operation.
        let late = || count.get().is_multiple_of(4096) && Instant::now() > deadline;
        if count.get() > most {
            return Some(Dynamic::from(Stop::Operations));
        }
        late().then(|| Dynamic::from(Stop::Time))
    });
}
