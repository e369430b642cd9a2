//! The command line as text: clap structs, nothing resolved yet.

use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};

/// Moves RL-trained weights from trainer ranks straight into vLLM's kernel format.
#[derive(Debug, Parser)]
#[command(name = "engine", version, about, max_term_width = 100)]
pub struct Args {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Print the shape table: what each inference rank gets, from what, how large
    DryRun(DryRunArgs),
}

impl Command {
    /// True if diagnostics are wanted as JSON.
    pub fn json(&self) -> bool {
        match self {
            Command::DryRun(a) => a.format == TableFormat::Json,
        }
    }
}

/// What every command that compiles a plan takes.
#[derive(Clone, Debug, ClapArgs)]
pub struct PlanArgs {
    /// The plan file
    pub plan: PathBuf,
    /// Model folder (config.json and safetensors), or a config.json alone
    #[arg(long, value_name = "DIR|config.json")]
    pub model: Option<PathBuf>,
    /// Inference topology: tp=8,dp=2,ep=16,pp=1,redundant_experts=0,eplb=0,replicas=1
    #[arg(long, value_name = "AXES")]
    pub infer: Option<String>,
    /// Trainer mesh: dp_replicate=2,fsdp=8,tp=1,ep=1,pp=1; left out, one rank holds all
    #[arg(long, value_name = "AXES")]
    pub train: Option<String>,
    /// Facts about the receiver: sm=90,moe_backend=triton,...
    #[arg(long, value_name = "K=V,...", value_delimiter = ',')]
    pub target: Vec<String>,
    /// Value of an option that the plan declares
    #[arg(long, value_name = "K=V")]
    pub set: Vec<String>,
    /// Physical to logical experts by layer, as JSON
    #[arg(long, value_name = "FILE")]
    pub expert_map: Option<PathBuf>,
    /// Names, shapes and placements of a live trainer's tensors, as JSON
    #[arg(long, value_name = "FILE")]
    pub source_manifest: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TableFormat {
    Table,
    Json,
    Markdown,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Stage {
    Shapes,
    Plan,
    Shards,
    Program,
    Graph,
}

#[derive(Debug, ClapArgs)]
pub struct DryRunArgs {
    #[command(flatten)]
    pub inputs: PlanArgs,
    /// One rank, or all; by default all as JSON, and one of each class of equal ranks as a table
    #[arg(long, value_name = "N|all")]
    pub rank: Option<String>,
    #[arg(long, value_enum, default_value_t = TableFormat::Table)]
    pub format: TableFormat,
    /// Which stage of the pipeline to print
    #[arg(long, value_enum, default_value_t = Stage::Shapes)]
    pub emit: Stage,
}
