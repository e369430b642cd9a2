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
    /// Run an update: on CPU threads from safetensors files, or on GPUs where they are
    Run(RunArgs),
    /// Compare the plan with what a receiver holds
    Check(CheckArgs),
    /// Recompute a run's output with the reference interpreter and compare every byte
    Verify(VerifyArgs),
    /// Predict an update's time and traffic on a cluster: no GPU, no weights
    Simulate(SimulateArgs),
    /// Measure updates on the GPUs at hand, with random weights, against plain copies
    Bench {
        #[command(subcommand)]
        what: BenchCommand,
    },
    /// Say what a diagnostic code means
    Explain {
        /// A code such as E0304
        code: String,
    },
}

impl Command {
    /// True if diagnostics are wanted as JSON.
    pub fn json(&self) -> bool {
        match self {
            Command::DryRun(a) => a.format == TableFormat::Json,
            Command::Check(a) => a.format == ReportFormat::Json,
            Command::Verify(a) => a.format == ReportFormat::Json,
            Command::Simulate(a) => a.format == ReportFormat::Json,
            Command::Bench { what } => what.format() == ReportFormat::Json,
            Command::Run(_) | Command::Explain { .. } => false,
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
    /// Value of an option that the plan declares; give --set once for each
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

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ReportFormat {
    Table,
    Json,
}

#[derive(Debug, ClapArgs)]
// The plan stands before --manifest, which takes every word up to the next flag.
#[command(override_usage = "engine check [OPTIONS] <PLAN> --manifest <FILE>...")]
pub struct CheckArgs {
    #[command(flatten)]
    pub inputs: PlanArgs,
    /// Receiver manifests: the parameters, buffers and aliases of a rank, as JSON
    #[arg(long, value_name = "FILE", required = true, num_args = 1..)]
    pub manifest: Vec<PathBuf>,
    #[arg(long, value_enum, default_value_t = ReportFormat::Table)]
    pub format: ReportFormat,
}

#[derive(Debug, ClapArgs)]
pub struct VerifyArgs {
    /// The output folder of a run; its manifest.json names the inputs
    #[arg(value_name = "OUT_DIR")]
    pub out: PathBuf,
    /// The checkpoint, where it is no longer at the place that the manifest names
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    #[arg(long, value_enum, default_value_t = ReportFormat::Table)]
    pub format: ReportFormat,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Backend {
    Auto,
    Cpu,
    Cuda,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Path {
    Auto,
    Peer,
    Nccl,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Finite {
    Auto,
    Before,
    During,
    Allow,
}

#[derive(Debug, ClapArgs)]
pub struct RunArgs {
    #[command(flatten)]
    pub inputs: PlanArgs,
    /// Output folder; by default the one that the plan declares
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    #[arg(long, value_enum, default_value_t = Backend::Auto)]
    pub backend: Backend,
    /// How bytes travel between GPUs
    #[arg(long, value_enum, default_value_t = Path::Auto)]
    pub path: Path,
    /// Cap on staging memory: bytes, or with KiB, MiB, GiB
    #[arg(long, value_name = "SIZE", default_value = "256MiB", value_parser = size)]
    pub staging: u64,
    /// Time limit of every wait for another rank
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = seconds)]
    pub timeout: std::time::Duration,
    /// NaN and infinity: auto refuses them before anything is published
    #[arg(long, value_enum, default_value_t = Finite::Auto)]
    pub finite_check: Finite,
    /// Recompute the output with the reference interpreter afterwards
    #[arg(long)]
    pub verify: bool,
    /// Replace the output of an earlier run
    #[arg(long)]
    pub force: bool,
}

#[derive(Debug, ClapArgs)]
pub struct SimulateArgs {
    #[command(flatten)]
    pub inputs: PlanArgs,
    /// Hosts and links, as JSON; by default 8 GPUs and 8 NICs of 45 GB/s a host
    #[arg(long, value_name = "FILE")]
    pub cluster: Option<PathBuf>,
    /// Cap on staging memory: bytes, or with KiB, MiB, GiB
    #[arg(long, value_name = "SIZE", default_value = "256MiB", value_parser = size)]
    pub staging: u64,
    #[arg(long, value_enum, default_value_t = ReportFormat::Table)]
    pub format: ReportFormat,
    /// Draw when each rank has which buckets under way
    #[arg(long, value_name = "FILE.html")]
    pub timeline: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Updates from trainer GPUs to inference GPUs at a model's real shapes
    Transfer(BenchTransferArgs),
    /// Quantization on one GPU against a copy that reads and writes as much
    Quantize(BenchQuantizeArgs),
}

impl BenchCommand {
    fn format(&self) -> ReportFormat {
        match self {
            BenchCommand::Transfer(a) => a.format,
            BenchCommand::Quantize(a) => a.format,
        }
    }
}

#[derive(Debug, ClapArgs)]
pub struct BenchTransferArgs {
    /// The plan file
    #[arg(long, value_name = "PLAN")]
    pub plan: PathBuf,
    /// Model folder or config.json: only shapes are read
    #[arg(long, value_name = "DIR|config.json")]
    pub model: Option<PathBuf>,
    /// Inference topology, as in a run
    #[arg(long, value_name = "AXES")]
    pub infer: Option<String>,
    /// Trainer mesh, as in a run
    #[arg(long, value_name = "AXES")]
    pub train: Option<String>,
    /// Value of an option that the plan declares; give --set once for each
    #[arg(long, value_name = "K=V")]
    pub set: Vec<String>,
    /// How bytes travel between GPUs
    #[arg(long, value_enum, default_value_t = Path::Auto)]
    pub path: Path,
    /// Measured updates, after two to warm up
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub updates: usize,
    /// GPUs to use at most
    #[arg(long, value_name = "N")]
    pub gpus: Option<usize>,
    /// Cap on each GPU's staging memory: bytes, or with KiB, MiB, GiB
    #[arg(long, value_name = "SIZE", default_value = "256MiB", value_parser = size)]
    pub staging: u64,
    /// Time limit of every wait for another rank
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = seconds)]
    pub timeout: std::time::Duration,
    /// Leave out the update tensor by tensor, the slowest of the baselines
    #[arg(long)]
    pub skip_unfused: bool,
    /// Blocks of the kernels that make and that store, as MAKE,STORE: to try other sizes
    #[arg(long, value_name = "N,N", value_delimiter = ',', num_args = 1, hide = true)]
    pub blocks: Vec<u32>,
    #[arg(long, value_enum, default_value_t = ReportFormat::Table)]
    pub format: ReportFormat,
}

#[derive(Debug, ClapArgs)]
pub struct BenchQuantizeArgs {
    /// Rows of the matrix, a multiple of 128
    #[arg(long, default_value_t = 65536, value_parser = tiled)]
    pub rows: u64,
    /// Columns of the matrix, a multiple of 128
    #[arg(long, default_value_t = 16384, value_parser = tiled)]
    pub cols: u64,
    /// vllm, deepgemm, prime_rl or ue8m0
    #[arg(long, default_value = "vllm")]
    pub recipe: String,
    #[arg(long, value_enum, default_value_t = ReportFormat::Table)]
    pub format: ReportFormat,
}

fn tiled(text: &str) -> Result<u64, String> {
    match text.parse::<u64>() {
        Ok(n) if n > 0 && n % 128 == 0 => Ok(n),
        _ => Err("not a multiple of 128".to_owned()),
    }
}

fn size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        other => return Err(format!("unknown unit {other}: give bytes, KiB, MiB or GiB")),
    };
    let number: u64 = digits.parse().map_err(|_| "not a whole number of bytes".to_owned())?;
    let bytes = number.checked_mul(unit).ok_or("too large")?;
    if bytes < 1 << 20 { Err("at least 1 MiB".to_owned()) } else { Ok(bytes) }
}

fn seconds(text: &str) -> Result<std::time::Duration, String> {
    let number: f64 = text.parse().map_err(|_| "not a number of seconds".to_owned())?;
    match std::time::Duration::try_from_secs_f64(number) {
        Ok(d) if !d.is_zero() => Ok(d),
        _ => Err("more than 0".to_owned()),
    }
}
