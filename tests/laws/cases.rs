//! Random plans as text, with a topology and source tensors that fit them.

use std::collections::BTreeMap;

use kernelcast::dtype::DType;

use crate::train::{self, Train};

/// Random numbers that a test case is made of; zeros once it has run out, so that every choice
/// numbered 0 should be the simplest.
pub struct Tape {
    words: std::vec::IntoIter<u32>,
}

impl Tape {
    pub fn new(words: Vec<u32>) -> Self {
        Tape { words: words.into_iter() }
    }

    pub fn below(&mut self, n: u64) -> u64 {
        u64::from(self.words.next().unwrap_or(0)) % n.max(1)
    }

    pub fn pick<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len() as u64) as usize]
    }

    /// True in one of `n` cases.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == n - 1
    }
}

/// A tensor of the checkpoint.
#[derive(Clone, Debug)]
pub struct SourceTensor {
    pub name: String,
    pub dtype: DType,
    pub shape: Vec<u64>,
}

/// A plan that should compile, and everything it needs.
#[derive(Clone)]
pub struct Case {
    pub text: String,
    pub infer: String,
    /// Tile size of quantized sources.
    pub block: u64,
    pub sources: Vec<SourceTensor>,
    pub experts: BTreeMap<String, Vec<u64>>,
    /// Where a sharded trainer has the sources; not looked at by laws of one trainer rank.
    pub train: Train,
}

impl std::fmt::Debug for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "--infer {} (blocks of {})", self.infer, self.block)?;
        writeln!(f, "experts {:?}, trainer {:?}", self.experts, self.train)?;
        for s in &self.sources {
            writeln!(f, "// {} {} {:?}", s.name, s.dtype, s.shape)?;
        }
        f.write_str(&self.text)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Plain(DType),
    Quant { block: u64, e8m0: bool },
}

/// A value of the plan: its variable and its local type.
#[derive(Clone, Debug)]
struct Value {
    name: String,
    shape: Vec<u64>,
    kind: Kind,
    /// Dimension 0 counts this rank's experts, which may differ from rank to rank.
    ragged: bool,
}

const MAX_ELEMENTS: u64 = 1 << 14;
const FLOATS: [DType; 3] = [DType::Bf16, DType::F32, DType::F16];

struct Maker {
    tape: Tape,
    lines: Vec<String>,
    sources: Vec<SourceTensor>,
    block: u64,
    tp: u64,
    dp: u64,
    ep: u64,
    redundant: u64,
    /// Number of logical experts, if an expert map fixes it.
    mapped: Option<u64>,
}

/// Makes a case out of random numbers.
pub fn make(words: Vec<u32>) -> Case {
    let mut tape = Tape::new(words);
    let (tp, dp) = (tape.pick(&[1, 2, 3, 4, 8]), 1 + tape.below(2));
    let ep = if tape.one_in(2) { dp * tp } else { 1 };
    let eplb = ep > 1 && tape.one_in(2);
    let redundant = if eplb { tape.below(5) } else { 0 };
    let block = tape.pick(&[32, 64]);
    let count = (ep * (1 + redundant.div_ceil(ep)) - redundant) + ep * tape.below(2);
    let mapped = tape.one_in(2).then_some(if eplb { count } else { 1 + tape.below(6) });
    let mut maker = Maker {
        tape,
        lines: vec!["let b = at(\"m\");".to_owned()],
        sources: Vec::new(),
        block,
        tp,
        dp,
        ep,
        redundant,
        mapped,
    };
    let params = 1 + maker.tape.below(3);
    let mut used_experts = false;
    for p in 0..params {
        used_experts |= maker.param(p, eplb);
    }
    let mut infer = format!("tp={tp},dp={dp},ep={ep}");
    if eplb {
        infer += &format!(",redundant_experts={redundant},eplb=1");
    }
    let mut experts = BTreeMap::new();
    if let Some(count) = mapped.filter(|_| used_experts) {
        // Every expert has a slot: any order of them, then repeats.
        let mut order: Vec<u64> = (0..count).collect();
        for i in (1..order.len()).rev() {
            order.swap(i, maker.tape.below(i as u64 + 1) as usize);
        }
        for _ in 0..redundant {
            let extra = maker.tape.below(count);
            let at = maker.tape.below(order.len() as u64 + 1) as usize;
            order.insert(at, extra);
        }
        experts.insert("m".to_owned(), order);
    }
    maker.lines.push("drop(\"m.*\", optional);".to_owned());
    infer += &format!(",replicas={}", maker.replicas());
    let train = train::make(&mut maker.tape, &maker.sources);
    Case { train, text: maker.lines.join("\n"), infer, block, sources: maker.sources, experts }
}

impl Maker {
    /// As many copies of the inference side as leave it at 16 ranks.
    fn replicas(&mut self) -> u64 {
        (1 + self.tape.below(3)).min((16 / (self.tp * self.dp)).max(1))
    }

    /// One parameter and perhaps one that is derived from it. True if it spreads experts.
    fn param(&mut self, number: u64, eplb: bool) -> bool {
        let mut v = self.leaf();
        let mut spread = false;
        for _ in 0..self.tape.below(8) {
            let found = self.step(&v, &mut spread, eplb);
            if let Some(next) = found {
                v = next;
            }
        }
        self.lines.push(format!("b[\"p{number}\"] = {};", v.name));
        if let Kind::Quant { block, e8m0 } = v.kind
            && self.tape.one_in(3)
        {
            let (call, shape, kind) = match self.tape.one_in(2) {
                true => ("codes()", v.shape.clone(), Kind::Plain(DType::E4m3)),
                false => {
                    let m = v.shape.len() - 2;
                    let tiles = v.shape[m..].iter().map(|n| n.div_ceil(block));
                    let grid = v.shape[..m].iter().copied().chain(tiles).collect();
                    ("scales()", grid, Kind::Plain(if e8m0 { DType::E8m0 } else { DType::F32 }))
                }
            };
            let mut part = self.apply(&v, call.to_owned(), shape, kind);
            for _ in 0..self.tape.below(3) {
                part = self.movement(&part).unwrap_or(part);
            }
            self.lines.push(format!("b[\"h{number}\"] = {};", part.name));
        }
        if let Kind::Quant { .. } = v.kind
            && self.tape.one_in(2)
        {
            let dtype = self.tape.pick(&FLOATS);
            let mut d = self.apply(
                &v,
                format!("dequantize({dtype})"),
                v.shape.clone(),
                Kind::Plain(dtype),
            );
            for _ in 0..self.tape.below(4) {
                d = self.movement(&d).unwrap_or(d);
            }
            if self.tape.one_in(4) {
                d = self.quantization(&d).unwrap_or(d);
            }
            self.lines.push(format!("b[\"d{number}\"] = {};", d.name));
        }
        spread
    }

    fn bind(&mut self, text: String, shape: Vec<u64>, kind: Kind, ragged: bool) -> Value {
        let name = format!("v{}", self.lines.len());
        self.lines.push(format!("let {name} = {text}; // {kind:?} {shape:?}"));
        Value { name, shape, kind, ragged }
    }

    fn apply(&mut self, v: &Value, call: String, shape: Vec<u64>, kind: Kind) -> Value {
        self.bind(format!("{}.{call}", v.name), shape, kind, v.ragged)
    }

    fn leaf(&mut self) -> Value {
        let rank = self.tape.pick(&[2, 2, 3, 3, 1, 4]);
        let sizes = [4, 1, 2, 3, 6, 8, 12, 32, 64, 96, 128, 33, 160];
        let mut shape: Vec<u64> = (0..rank).map(|_| self.tape.pick(&sizes)).collect();
        while shape.iter().product::<u64>() > MAX_ELEMENTS {
            let largest = (0..rank).max_by_key(|d| shape[*d]).unwrap_or(0);
            shape[largest] = shape[largest].div_ceil(2);
        }
        if let Some(count) = self.mapped
            && rank > 1
            && self.tape.one_in(2)
        {
            shape[0] = count;
        }
        if rank > 1 && self.tape.one_in(3) {
            return self.quantized_source(shape);
        }
        let dtype = self.tape.pick(&[
            DType::Bf16,
            DType::F32,
            DType::F16,
            DType::Bf16,
            DType::I32,
            DType::U8,
        ]);
        self.source(shape, dtype)
    }

    fn source(&mut self, shape: Vec<u64>, dtype: DType) -> Value {
        let name = format!("s{}", self.sources.len());
        let text = format!("b.src(\"{name}\", {shape:?}, {dtype})");
        let full = format!("m.{name}");
        self.sources.push(SourceTensor { name: full, dtype, shape: shape.clone() });
        self.bind(text, shape, Kind::Plain(dtype), false)
    }

    fn quantized_source(&mut self, shape: Vec<u64>) -> Value {
        let block = self.block;
        let name = format!("s{}", self.sources.len());
        let text = format!("b.src(\"{name}\", {shape:?})");
        let full = format!("m.{name}");
        let mut grid = shape.clone();
        grid.iter_mut().rev().take(2).for_each(|n| *n = n.div_ceil(block));
        let dtype = self.tape.pick(&[DType::F32, DType::Bf16, DType::E8m0]);
        let scale = format!("{full}_scale_inv");
        self.sources.push(SourceTensor {
            name: full,
            dtype: DType::E4m3,
            shape: shape.clone(),
        });
        self.sources.push(SourceTensor { name: scale, dtype, shape: grid });
        let e8m0 = dtype == DType::E8m0;
        self.bind(text, shape, Kind::Quant { block, e8m0 }, false)
    }

    /// One more operation, if the one that was drawn fits.
    fn step(&mut self, v: &Value, spread: &mut bool, eplb: bool) -> Option<Value> {
        match self.tape.below(10) {
            0..5 => self.movement(v),
            5 => self.experts(v, spread, eplb),
            6 | 7 => self.quantization(v),
            8 => self.arithmetic(v),
            _ => self.join(v),
        }
    }

    fn movement(&mut self, v: &Value) -> Option<Value> {
        match self.tape.below(6) {
            0 => self.slice(v),
            1 => self.permute(v),
            2 => self.reshape(v),
            3 => self.shard(v),
            4 => self.heads(v),
            _ => self.pad(v),
        }
    }

    /// The tile size along a dimension; 1 where there is no grid.
    fn grid(v: &Value, dim: usize) -> u64 {
        match v.kind {
            Kind::Quant { block, .. } if dim + 2 >= v.shape.len() => block,
            _ => 1,
        }
    }

    /// A dimension that is equal on all ranks.
    fn dim(&mut self, v: &Value) -> Option<usize> {
        let first = u64::from(v.ragged);
        let count = (v.shape.len() as u64).checked_sub(first).filter(|n| *n > 0)?;
        Some((first + self.tape.below(count)) as usize)
    }

    fn resized(v: &Value, dim: usize, size: u64) -> Vec<u64> {
        let mut shape = v.shape.clone();
        shape[dim] = size;
        shape
    }

    fn slice(&mut self, v: &Value) -> Option<Value> {
        let dim = self.dim(v)?;
        let (size, grid) = (v.shape[dim], Self::grid(v, dim));
        let start = self.tape.below(size.div_ceil(grid)) * grid;
        let units = (size - start).div_ceil(grid);
        let end = (start + (units - self.tape.below(units)) * grid).min(size);
        let shape = Self::resized(v, dim, end - start);
        Some(self.apply(v, format!("slice({dim}, {start}..{end})"), shape, v.kind))
    }

    fn permute(&mut self, v: &Value) -> Option<Value> {
        let rank = v.shape.len();
        let fixed = usize::from(v.ragged);
        let mut dims: Vec<usize> = (0..rank).collect();
        let matrix = matches!(v.kind, Kind::Quant { .. }).then(|| rank - 2);
        let split = matrix.unwrap_or(rank).max(fixed);
        for part in [fixed..split, split..rank] {
            for i in part.clone().rev() {
                let span = (i - part.start + 1) as u64;
                dims.swap(i, part.start + self.tape.below(span) as usize);
            }
        }
        let shape = dims.iter().map(|d| v.shape[*d]).collect();
        Some(self.apply(v, format!("permute({dims:?})"), shape, v.kind))
    }

    fn reshape(&mut self, v: &Value) -> Option<Value> {
        let fixed = usize::from(v.ragged);
        let tail = &v.shape[fixed..];
        let new = match v.kind {
            Kind::Plain(_) => self.factors(tail.iter().product()),
            Kind::Quant { .. } => self.quantized_rows(tail)?,
        };
        if new.len() + fixed > 6 {
            return None;
        }
        let mut shape = v.shape[..fixed].to_vec();
        shape.extend(&new);
        let mut written: Vec<i64> = shape.iter().map(|n| *n as i64).collect();
        if v.ragged || self.tape.one_in(4) {
            written[0] = -1;
        }
        Some(self.apply(v, format!("reshape({written:?})"), shape, v.kind))
    }

    /// A number as a product of up to four.
    fn factors(&mut self, mut n: u64) -> Vec<u64> {
        let mut out = Vec::new();
        for _ in 0..self.tape.below(4) {
            let divisors: Vec<u64> = (1..=n.min(64)).filter(|d| n.is_multiple_of(*d)).collect();
            let d = divisors[self.tape.below(divisors.len() as u64) as usize];
            out.push(d);
            n /= d;
        }
        let at = self.tape.below(out.len() as u64 + 1) as usize;
        out.insert(at, n);
        out
    }

    /// Splits rows, or joins them with the dimension before, on the grid.
    fn quantized_rows(&mut self, shape: &[u64]) -> Option<Vec<u64>> {
        let block = self.block;
        let m = shape.len().checked_sub(2)?;
        let rows = shape[m];
        let mut new = shape.to_vec();
        if m > 0 && rows.is_multiple_of(128) {
            new[m] *= shape[m - 1];
            new.remove(m - 1);
            return Some(new);
        }
        let step = block.max(128);
        let parts: Vec<u64> = (1..=8)
            .filter(|p| rows.is_multiple_of(*p) && (rows / p).is_multiple_of(step))
            .collect();
        let p = parts.get(self.tape.below(parts.len() as u64) as usize)?;
        new[m] = rows / p;
        new.insert(m, *p);
        Some(new)
    }

    fn axis(&mut self) -> (&'static str, u64) {
        let etp = if self.ep == 1 { self.dp * self.tp } else { 1 };
        self.tape.pick(&[("tp", self.tp), ("dp", self.dp), ("ep", self.ep), ("etp", etp)])
    }

    fn shard(&mut self, v: &Value) -> Option<Value> {
        let dim = self.dim(v)?;
        let (axis, parts) = self.axis();
        let local = v.shape[dim].is_multiple_of(parts).then(|| v.shape[dim] / parts)?;
        if parts > 1 && !local.is_multiple_of(Self::grid(v, dim)) {
            return None;
        }
        let shape = Self::resized(v, dim, local);
        Some(self.apply(v, format!("shard({dim}, {axis})"), shape, v.kind))
    }

    fn heads(&mut self, v: &Value) -> Option<Value> {
        let (axis, ranks) = self.axis();
        let rows = *v.shape.first().filter(|_| !v.ragged)?;
        let heads = self.tape.pick(&[1, 2, 3, 4, 6, 8]);
        let parts = match heads.min(ranks) {
            _ if !rows.is_multiple_of(heads) => return None,
            _ if heads.is_multiple_of(ranks) => ranks,
            _ if ranks.is_multiple_of(heads) => heads,
            _ => return None,
        };
        let local = rows / parts;
        if parts > 1 && !local.is_multiple_of(Self::grid(v, 0)) {
            return None;
        }
        let shape = Self::resized(v, 0, local);
        Some(self.apply(v, format!("heads({axis}, {heads})"), shape, v.kind))
    }

    fn experts(&mut self, v: &Value, spread: &mut bool, eplb: bool) -> Option<Value> {
        let count = *v.shape.first().filter(|_| !v.ragged)?;
        let matrix = matches!(v.kind, Kind::Quant { .. }) && v.shape.len() < 3;
        // Two spreads of one value would take the map's logical ids for physical ones.
        if matrix || *spread || self.mapped.is_some_and(|m| m != count) {
            return None;
        }
        let slots = count + self.redundant;
        if eplb && !slots.is_multiple_of(self.ep) {
            return None;
        }
        *spread = true;
        let ragged = !slots.is_multiple_of(self.ep);
        let local = slots / self.ep + u64::from(ragged);
        let shape = Self::resized(v, 0, local);
        let text = format!("{}.experts(ep)", v.name);
        Some(self.bind(text, shape, v.kind, ragged))
    }

    fn pad(&mut self, v: &Value) -> Option<Value> {
        let Kind::Plain(_) = v.kind else { return None };
        let dim = self.dim(v)?;
        let multiple = self.tape.pick(&[1, 2, 5, 32, 64]);
        let padded = v.shape[dim].next_multiple_of(multiple);
        let shape = Self::resized(v, dim, padded);
        if shape.iter().product::<u64>() > 2 * MAX_ELEMENTS {
            return None;
        }
        let value = self.tape.pick(&["", ", 1.5", ", -0.0", ", 1.0e30"]);
        Some(self.apply(v, format!("pad_to({dim}, {multiple}{value})"), shape, v.kind))
    }

    fn quantization(&mut self, v: &Value) -> Option<Value> {
        let shape = v.shape.clone();
        match v.kind {
            Kind::Plain(dtype) => {
                if !FLOATS.contains(&dtype) || shape.len() < 2 {
                    return None;
                }
                let recipe = self.tape.pick(&["vllm", "deepgemm", "prime_rl", "ue8m0"]);
                let block = self.tape.pick(&[32, 64, 128]);
                let e8m0 = recipe == "ue8m0" && self.tape.one_in(2);
                let scales = if e8m0 { ".scales(e8m0)" } else { "" };
                let call = format!("quantize(fp8::{recipe}.block({block}){scales})");
                Some(self.apply(v, call, shape, Kind::Quant { block, e8m0 }))
            }
            Kind::Quant { block, e8m0 } => match self.tape.below(4) {
                0 | 1 => {
                    let dtype = self.tape.pick(&FLOATS);
                    let call = format!("dequantize({dtype})");
                    Some(self.apply(v, call, shape, Kind::Plain(dtype)))
                }
                2 if [32, 64, 128].contains(&block) => {
                    let call = format!("quantize(fp8::vllm.block({block}))");
                    Some(self.apply(v, call, shape, v.kind))
                }
                _ => {
                    let fine = block / self.tape.pick(&[2, 1, 4]);
                    let kind = Kind::Quant { block: fine.max(8), e8m0 };
                    Some(self.apply(v, format!("refine({})", fine.max(8)), shape, kind))
                }
            },
        }
    }

    fn arithmetic(&mut self, v: &Value) -> Option<Value> {
        let Kind::Plain(dtype) = v.kind else { return None };
        if !FLOATS.contains(&dtype) {
            return None;
        }
        let text = match self.tape.below(4) {
            0 => {
                let to = self.tape.pick(&FLOATS);
                let call = format!("to({to})");
                return Some(self.apply(v, call, v.shape.clone(), Kind::Plain(to)));
            }
            1 => format!("{} * {}", v.name, self.tape.pick(&["2", "0.3", "-1.5"])),
            2 if !v.ragged => {
                let other = self.source(v.shape.clone(), dtype);
                let pair = [v.name.clone(), other.name];
                let first = self.tape.below(2) as usize;
                format!("{} + {}", pair[first], pair[1 - first])
            }
            _ => format!("{0} + {0} * 0.25", v.name),
        };
        Some(self.bind(text, v.shape.clone(), v.kind, v.ragged))
    }

    fn join(&mut self, v: &Value) -> Option<Value> {
        if self.tape.one_in(3) {
            if v.shape.len() > 4
                || v.ragged
                || 2 * v.shape.iter().product::<u64>() > MAX_ELEMENTS
            {
                return None;
            }
            let other = match v.kind {
                Kind::Plain(dtype) if self.tape.one_in(2) => {
                    self.source(v.shape.clone(), dtype).name
                }
                _ => v.name.clone(),
            };
            let mut shape = v.shape.clone();
            shape.insert(0, 2);
            return Some(self.bind(
                format!("stack([{}, {other}])", v.name),
                shape,
                v.kind,
                false,
            ));
        }
        let dim = self.dim(v)?;
        if 2 * v.shape.iter().product::<u64>() > MAX_ELEMENTS {
            return None;
        }
        let other = match v.kind {
            Kind::Plain(dtype) if !v.ragged && self.tape.one_in(2) => {
                let size = 1 + self.tape.below(v.shape[dim]);
                self.source(Self::resized(v, dim, size), dtype)
            }
            _ => {
                self.slice(&Value { ..v.clone() }).filter(|s| s.shape.len() == v.shape.len())?
            }
        };
        let same = (0..v.shape.len()).all(|d| d == dim || other.shape[d] == v.shape[d]);
        let mut parts = [v, &other];
        if self.tape.one_in(2) {
            parts.swap(0, 1);
        }
        if !same || !parts[0].shape[dim].is_multiple_of(Self::grid(v, dim)) {
            return None;
        }
        let text = format!("cat([{}, {}], {dim})", parts[0].name, parts[1].name);
        let shape = Self::resized(v, dim, v.shape[dim] + other.shape[dim]);
        Some(self.bind(text, shape, v.kind, v.ragged))
    }
}
