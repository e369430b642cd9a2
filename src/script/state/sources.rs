//! Declares a source: how it is really stored, and whether that is what the plan says.

use serde_json::Value;

use crate::diag::{Diagnostic, Span};
use crate::dtype::DType;
use crate::fp8::ScaleFormat;
use crate::ir::{Dims, Op, Source, SourceFormat, SourceId, SourceScale, Type, show_shape};

use super::super::limits::Stop;
use super::super::values::Tensor;
use super::State;

impl State {
    /// Declares and reads a source tensor.
    pub fn source(
        &mut self,
        name: String,
        shape: Dims,
        dtype: DType,
        span: Span,
    ) -> Result<Tensor, Stop> {
        if let Some(id) = self.source_ids.get(&name).copied() {
            let known = &self.sources[id.0 as usize];
            if known.shape != shape {
                let d = Diagnostic::error(
                    "E0402",
                    format!(
                        "{name} is named twice with shapes {} and {}",
                        show_shape(&known.shape),
                        show_shape(&shape)
                    ),
                )
                .at(span)
                .also(known.span, "first named here")
                .about(name);
                let event = self.event()?;
                self.problem(event, d);
                return Ok(Tensor(None));
            }
            return self.read(id, dtype, span);
        }
        match self.source_format(&name, &shape, dtype) {
            Ok(format) => {
                let id = SourceId(self.sources.len() as u32);
                self.source_ids.insert(name.clone(), id);
                self.sources.push(Source { name, shape, format, span });
                self.read(id, dtype, span)
            }
            Err(d) => {
                let event = self.event()?;
                self.problem(event, d.at(span).about(name));
                Ok(Tensor(None))
            }
        }
    }

    /// Reads a source in the type that the plan declares, which its own may widen to.
    fn read(&mut self, id: SourceId, declared: DType, span: Span) -> Result<Tensor, Stop> {
        let value = self.push(Op::Source(id), &[], span)?;
        let source = &self.sources[id.0 as usize];
        match source.format {
            SourceFormat::Plain(dtype) if dtype == declared => Ok(value),
            SourceFormat::Plain(dtype) if dtype.widens_to(declared) => {
                self.push(Op::Cast { dtype: declared }, &[value], span)
            }
            SourceFormat::Quantized { .. } if declared.is_float() => Ok(value),
            _ => {
                let d = Diagnostic::error(
                    "E0403",
                    format!("{} is named twice, now as {declared}", source.name),
                )
                .at(span)
                .also(source.span, "first named here")
                .about(source.name.clone());
                let event = self.event()?;
                self.problem(event, d);
                Ok(Tensor(None))
            }
        }
    }

    /// How a source is really stored; what the plan declares where no files are known.
    fn source_format(
        &self,
        name: &str,
        shape: &Dims,
        declared: DType,
    ) -> Result<SourceFormat, Diagnostic> {
        if !self.has_catalog {
            return Ok(SourceFormat::Plain(declared));
        }
        let Some(found) = self.catalog.get(name) else {
            return Err(Diagnostic::error(
                "E0401",
                format!("there is no source tensor {name}"),
            ));
        };
        if found.shape != *shape {
            return Err(Diagnostic::error(
                "E0402",
                format!(
                    "{name} is {} in the source, the plan says {}",
                    show_shape(&found.shape),
                    show_shape(shape)
                ),
            )
            .hint("is the plan's formula right for this model's config.json?"));
        }
        if declared == DType::U8 && declared.reads(&found.dtype_name) {
            return Ok(SourceFormat::Plain(declared));
        }
        let Some(dtype) = found.dtype else {
            return Err(Diagnostic::error(
                "E0418",
                format!(
                    "{name} is stored as {}, which the engine does not read",
                    found.dtype_name
                ),
            ));
        };
        if dtype == DType::E4m3 && declared.is_float() {
            return self.quantized_format(name, shape);
        }
        if dtype.widens_to(declared) {
            return Ok(SourceFormat::Plain(dtype));
        }
        Err(Diagnostic::error(
            "E0403",
            format!("{name} is {dtype} in the source, the plan says {declared}"),
        )
        .hint(match (dtype, dtype.is_float() && declared.is_float()) {
            (_, true) => format!(
                "name the stored type and write the cast: src(.., .., {dtype}).to({declared})"
            ),
            (DType::E4m3, _) => {
                "an FP8 value is declared as a float: src(.., .., bf16)".to_owned()
            }
            _ => format!("declare it as it is stored: src(.., .., {dtype})"),
        }))
    }

    fn quantized_format(&self, name: &str, shape: &Dims) -> Result<SourceFormat, Diagnostic> {
        let block = self.source_block()?;
        let beside = [format!("{name}_scale_inv"), format!("{name}_scale")];
        // DeepSeek's own checkpoints have `wo_a.scale` beside `wo_a.weight`.
        let instead = name.strip_suffix(".weight").map(|module| format!("{module}.scale"));
        let found = beside
            .into_iter()
            .chain(instead)
            .find_map(|scale| self.catalog.get(&scale).map(|entry| (scale, entry)));
        let Some((scale, entry)) = found else {
            return Err(Diagnostic::error(
                "E0412",
                format!("{name} is e4m3 and has no scale: {name}_scale_inv is missing"),
            )
            .hint("FP8 codes mean nothing without their block scales"));
        };
        let quantized = Type {
            shape: shape.clone(),
            dtype: DType::E4m3,
            quant: Some(crate::ir::Quant {
                block,
                scales: ScaleFormat::F32,
                scale_name: crate::ir::ScaleName::ScaleInv,
            }),
        };
        let wanted = quantized.scale_shape().unwrap_or_default();
        if entry.shape != wanted {
            return Err(Diagnostic::error(
                "E0412",
                format!(
                    "{scale} is {}, blocks of {block} over {} need {}",
                    show_shape(&entry.shape),
                    show_shape(shape),
                    show_shape(&wanted)
                ),
            ));
        }
        match entry.dtype {
            Some(dtype @ (DType::F32 | DType::Bf16 | DType::E8m0)) => {
                Ok(SourceFormat::Quantized {
                    block,
                    scale: SourceScale {
                        name: scale,
                        dtype,
                        shape: wanted,
                        target: match dtype {
                            DType::E8m0 => ScaleFormat::E8m0,
                            _ => ScaleFormat::F32,
                        },
                    },
                })
            }
            _ => Err(Diagnostic::error(
                "E0412",
                format!("{scale} is {}; block scales are f32, bf16 or e8m0", entry.dtype_name),
            )),
        }
    }

    /// The tile size of the model's own FP8 weights; 128 where the config says nothing.
    fn source_block(&self) -> Result<u64, Diagnostic> {
        let sizes = self
            .model
            .as_ref()
            .and_then(|m| m.get("quantization_config")?.get("weight_block_size").cloned());
        let Some(sizes) = sizes.filter(|s| !s.is_null()) else { return Ok(128) };
        let list: Option<Vec<u64>> =
            sizes.as_array().and_then(|l| l.iter().map(Value::as_u64).collect());
        match list.as_deref() {
            Some([a, b]) if a == b && *a > 0 => Ok(*a),
            _ => Err(Diagnostic::error(
                "E0412",
                format!("weight_block_size {sizes} of the config is not a square block"),
            )),
        }
    }
}
