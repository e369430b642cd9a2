//! stub
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RecipeKind {
    Vllm,
    Deepgemm,
    PrimeRl,
    Ue8m0,
}
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ScaleFormat {
    F32,
    E8m0,
}
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Recipe {
    pub kind: RecipeKind,
    pub block: u32,
    pub scales: ScaleFormat,
}
impl RecipeKind {
    pub fn name(self) -> &'static str {
        "x"
    }
}
