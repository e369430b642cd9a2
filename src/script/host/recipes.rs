//! Recipes: the module `fp8` and what can be asked of a recipe.

use std::rc::Rc;

use rhai::{Dynamic, Engine, Module, NativeCallContext};

use crate::dtype::DType;
use crate::fp8::{Recipe, RecipeKind, ScaleFormat};
use crate::ir::ScaleName;

use super::super::values::{DTypeValue, RecipeValue};
use super::{Fallible, Shared, refuse};

/// The recipe of a name, with blocks of 128 and f32 scales.
fn recipe_named(name: &str) -> Option<RecipeValue> {
    let one = |kind| Recipe { kind, block: 128, scales: ScaleFormat::F32 };
    let scale_name = ScaleName::ScaleInv;
    let kind = match name {
        "vllm" => RecipeKind::Vllm,
        "deepgemm" => RecipeKind::Deepgemm,
        "prime_rl" => RecipeKind::PrimeRl,
        "ue8m0" => RecipeKind::Ue8m0,
        "ue8m0_two_step" => {
            let (first, second) = (one(RecipeKind::Vllm), one(RecipeKind::Ue8m0));
            return Some(RecipeValue::TwoStep { first, second, scale_name });
        }
        _ => return None,
    };
    Some(RecipeValue::One { recipe: one(kind), scale_name })
}

pub(in super::super) const RECIPES: [&str; 5] =
    ["vllm", "deepgemm", "prime_rl", "ue8m0", "ue8m0_two_step"];

pub(super) fn register(engine: &mut Engine, state: &Shared) {
    let mut fp8 = Module::new();
    for name in RECIPES {
        if let Some(recipe) = recipe_named(name) {
            fp8.set_var(name, Dynamic::from(recipe));
        }
    }
    let s = Rc::clone(state);
    fp8.set_native_fn("named", move |ctx: NativeCallContext, name: &str| {
        recipe_named(name).map_or_else(
            || {
                let known = RECIPES.join(", ");
                refuse(&s, &ctx, "E0110", format!("there is no recipe `{name}`: {known}"))
            },
            Ok,
        )
    });
    engine.register_static_module("fp8", fp8.into());
    let s = Rc::clone(state);
    engine.register_fn("block", move |ctx: NativeCallContext, r: RecipeValue, b: i64| {
        let block = match b {
            128 | 64 | 32 => b as u32,
            _ => {
                return refuse(&s, &ctx, "E0110", format!("a block is 128, 64 or 32, not {b}"));
            }
        };
        Ok(match r {
            RecipeValue::None => r,
            RecipeValue::One { recipe, scale_name } => {
                RecipeValue::One { recipe: Recipe { block, ..recipe }, scale_name }
            }
            RecipeValue::TwoStep { first, second, scale_name } => RecipeValue::TwoStep {
                first: Recipe { block, ..first },
                second: Recipe { block, ..second },
                scale_name,
            },
        })
    });
    let s = Rc::clone(state);
    engine
        .register_fn("scales", move |ctx: NativeCallContext, r: RecipeValue, d: DTypeValue| {
            scales(&s, &ctx, r, d.0)
        });
    let s = Rc::clone(state);
    engine.register_fn(
        "scale_suffix",
        move |ctx: NativeCallContext, r: RecipeValue, t: &str| {
            let name = match t {
                "_scale_inv" => ScaleName::ScaleInv,
                "_scale" => ScaleName::Scale,
                _ => {
                    let why = format!("a scale's suffix is _scale_inv or _scale, not `{t}`");
                    return refuse(&s, &ctx, "E0110", why);
                }
            };
            Ok(match r {
                RecipeValue::None => r,
                RecipeValue::One { recipe, .. } => {
                    RecipeValue::One { recipe, scale_name: name }
                }
                RecipeValue::TwoStep { first, second, .. } => {
                    RecipeValue::TwoStep { first, second, scale_name: name }
                }
            })
        },
    );
    engine.register_fn("==", |a: RecipeValue, b: RecipeValue| a == b);
    engine.register_fn("!=", |a: RecipeValue, b: RecipeValue| a != b);
}

fn scales(
    s: &Shared,
    ctx: &NativeCallContext,
    r: RecipeValue,
    dtype: DType,
) -> Fallible<RecipeValue> {
    let scales = match dtype {
        DType::F32 => ScaleFormat::F32,
        DType::E8m0 => ScaleFormat::E8m0,
        _ => return refuse(s, ctx, "E0110", format!("scales are f32 or e8m0, not {dtype}")),
    };
    let powers =
        |recipe: Recipe| recipe.kind == RecipeKind::Ue8m0 || scales == ScaleFormat::F32;
    match r {
        RecipeValue::None => Ok(r),
        RecipeValue::One { recipe, scale_name } if powers(recipe) => {
            Ok(RecipeValue::One { recipe: Recipe { scales, ..recipe }, scale_name })
        }
        RecipeValue::TwoStep { first, second, scale_name } => {
            let second = Recipe { scales, ..second };
            Ok(RecipeValue::TwoStep { first, second, scale_name })
        }
        RecipeValue::One { recipe, .. } => refuse(
            s,
            ctx,
            "E0110",
            format!("scales of recipe {} are not powers of two", recipe.kind.name()),
        ),
    }
}
