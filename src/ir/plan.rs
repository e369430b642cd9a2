//! A plan: sources, an arena of nodes, target parameters, and the rules for what is left alone.

use std::collections::BTreeMap;

use crate::diag::{Diagnostic, SourceMap, Span};
use crate::dtype::DType;
use crate::fp8::ScaleFormat;

use super::{Dims, Op, Pattern};

/// Index of a node in [`Plan::nodes`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub u32);

/// Index of a source tensor in [`Plan::sources`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SourceId(pub u32);

/// A trainer tensor that the plan names: full shape, and how its elements are stored.
#[derive(Clone, Debug, PartialEq)]
pub struct Source {
    pub name: String,
    pub shape: Dims,
    pub format: SourceFormat,
    pub span: Span,
}

/// How a source is stored: from the files where they are known, else as the plan declares it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceFormat {
    Plain(DType),
    /// e4m3 codes with a scale for each tile of `block` × `block`.
    Quantized {
        block: u64,
        scale: SourceScale,
    },
}

/// The tensor of scales beside a quantized source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceScale {
    pub name: String,
    /// Stored type: f32, bf16 or e8m0; widened exactly to f32 where it is read.
    pub dtype: DType,
    pub shape: Dims,
    /// How it is kept on the target if the codes pass through.
    pub target: ScaleFormat,
}

/// One operation applied to earlier nodes, and the place in the plan that made it.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    pub op: Op,
    pub inputs: Vec<NodeId>,
    pub span: Span,
    /// Counts what the script did before this node; [`crate::script`] replays up to it.
    pub event: u32,
}

/// A target parameter and the expression for what a rank holds.
#[derive(Clone, Debug, PartialEq)]
pub struct Param {
    pub name: String,
    pub node: NodeId,
    pub span: Span,
    /// True if the value is computed by the receiver from a parameter that has landed: it
    /// lies downstream of `.dequantize` of another parameter's node.
    pub derived: bool,
    pub event: u32,
}

/// A `keep` or `drop` rule.
#[derive(Clone, Debug)]
pub struct Rule {
    pub pattern: Pattern,
    /// May match nothing.
    pub optional: bool,
    pub span: Span,
}

/// What one evaluation of a script gives: the plan of one pipeline stage.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Name of the plan file as shown to a person.
    pub name: String,
    pub sources: Vec<Source>,
    pub nodes: Vec<Node>,
    pub params: Vec<Param>,
    pub keep: Vec<Rule>,
    pub drop: Vec<Rule>,
    pub files: SourceMap,
    /// Options as set or by default.
    pub options: BTreeMap<String, String>,
    /// Warnings and notes of the evaluation.
    pub notes: Vec<Diagnostic>,
}

impl Plan {
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.0 as usize]
    }

    pub fn source(&self, id: SourceId) -> &Source {
        &self.sources[id.0 as usize]
    }
}

/// The source that an expression begins with: what a problem of it is about.
pub fn first_source(nodes: &[Node], sources: &[Source], mut id: NodeId) -> Option<String> {
    loop {
        let node = nodes.get(id.0 as usize)?;
        if let Op::Source(source) = node.op {
            return sources.get(source.0 as usize).map(|s| s.name.clone());
        }
        id = *node.inputs.first()?;
    }
}
