//! Codes of the script stage: what the plan's text does before there is any tensor.

use super::Code;

pub(super) const CODES: &[Code] = &[
    Code {
        code: "E0101",
        title: "the plan does not parse",
        text: "\
A plan is a Rhai script, and this text is not one: a bracket is not closed, a comma or a
semicolon is missing, or a word is not known to the language. The caret stands where the
parser gave up, which is often just after the mistake; at the end of the file it means
that something opened earlier is never closed.
    let I = model.intermediate_size     // no semicolon: the next line is refused
    let I = model.intermediate_size;",
    },
    Code {
        code: "E0102",
        title: "unknown function or method, or wrong arguments for it",
        text: "\
No function of this name takes arguments of these types. Either the name is misspelled
(the nearest one is shown), or the arguments differ in number, order or type (the forms
that exist are shown).
    gate.shard(tp, 0)       // shard takes the dimension first
    gate.shard(0, tp)
Functions of an imported file are called with the import's name: `mlp::swiglu(...)`.",
    },
    Code {
        code: "E0103",
        title: "unknown variable",
        text: "\
Nothing of this name is defined here. In Rhai a function does not see the variables of
the script around it: hand them over as arguments. The words that are visible everywhere
are `model`, `target`, the axes `tp`, `ep`, `dp`, `etp`, `pp`, the dtypes and the
recipes.
    let H = model.hidden_size;
    fn norm(block) { block.copy(\"norm.weight\", [H]); }       // H is not visible
    fn norm(block, H) { block.copy(\"norm.weight\", [H]); }",
    },
    Code {
        code: "E0104",
        title: "the model's config has no such key",
        text: "\
The plan reads a key that config.json does not have. A size that is silently absent
would give wrong shapes later, so a missing key is an error where it is read. If models
of this family may leave it out, say what it then means:
    let D = model.head_dim;
    let D = model.get(\"head_dim\", model.hidden_size / model.num_attention_heads);
Otherwise check that --model names the model that this plan is for.",
    },
    Code {
        code: "E0105",
        title: "the plan hit a limit",
        text: "\
Plans run in a sandbox with limits on operations, call depth, the sizes of strings,
arrays, maps and expressions, and time; the message names the limit and its value. The
limits are far above what a model needs, so the cause is nearly always a loop that does
not end or a function that calls itself. Look at the loop or call at the caret first. If
the plan is right but creates one value an expert, let `stack(0..E, |e| ...)` do the
repetition.",
    },
    Code {
        code: "E0106",
        title: "an import is refused or not found",
        text: "\
A plan imports files of its own folder (and folders in it) and of the built-in library,
by a relative path without the ending. Absolute paths, `..` and other characters than
letters, digits, `_`, `-` and `/` are refused: a plan must not read the machine it runs
on.
    import \"../other/mlp.rhai\" as mlp;
    import \"lib/mlp\" as mlp;",
    },
    Code {
        code: "E0107",
        title: "a reserved name is defined again",
        text: "\
Words such as `model`, `target`, `tp`, `ep`, `dp`, `etp`, `pp`, the dtypes and the
recipes mean the same in every plan, so a variable, a constant, a loop variable or a
parameter of a function cannot take their name: the plan would read one thing and do
another.
    let tp = 8;             // the axis would be hidden
    let ways = tp.size;",
    },
    Code {
        code: "E0108",
        title: "an assertion of the plan failed",
        text: "\
The plan itself says that it does not fit this case: `require(condition, message)` was
reached with a condition that is false. The message is in the words of the plan's
author. Usually the plan is for another model family, or the topology or an option asks
for something that the plan does not do. Choose another plan or other flags.",
    },
    Code {
        code: "E0109",
        title: "an unknown option, or a value that is not among its choices",
        text: "\
--set NAME=VALUE or --target KEY=VALUE names something that the plan does not declare,
or gives a value that is not allowed. A misspelled option that is ignored would silently
produce other weights, so it is an error. The message lists the options or the choices.
    engine dry-run plans/qwen3.rhai --set qant=bf16
    engine dry-run plans/qwen3.rhai --set quant=bf16",
    },
    Code {
        code: "E0110",
        title: "an argument has a wrong value or type",
        text: "\
The function exists and was called, but it cannot work with this value: a negative size,
a list where a number is expected, a fraction, an axis where a dtype is expected. The
label says what came and what was expected. A common cause is a config value that is
null or a string in this model:
    src(\"weight\", [model.vocab_size, model.hidden_size])      // one of them is null",
    },
    Code {
        code: "E0111",
        title: "the script raised an error",
        text: "\
The plan ran into an error of the language: it called `throw`, divided by zero, indexed
past the end of an array, overflowed an integer or compared things that do not compare.
The caret shows the place; notes show the calls that led there, innermost first.",
    },
    Code {
        code: "E0112",
        title: "this feature is disabled in plans",
        text: "\
Plans are pure: the same plan, config and topology must give the same schedule on every
rank. What could break that, such as `eval`, clocks, random numbers, files and the
network, is not part of the language. Use `option(name, default, choices)` for what the
user decides, `model` for what the config knows, `target` for what the receiver knows.",
    },
];
