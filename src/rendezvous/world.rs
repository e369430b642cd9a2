//! A process's place among the processes of a run, as its launcher describes it.
//! Reads the environment through a function; knows nothing of how processes meet.

use std::net::{IpAddr, Ipv6Addr};

use crate::diag::Diagnostic;

/// More processes than any cluster has GPUs; a larger number is a mistake.
const MOST: usize = 1 << 16;

/// The token of a run whose launcher gives none.
const NO_TOKEN: &str = "kernelcast";

/// What a process knows of its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct World {
    /// This process's number, below `size`.
    pub rank: usize,
    /// How many processes the run has.
    pub size: usize,
    /// This process's number on its host: the GPU that it takes.
    pub local_rank: usize,
    /// Where process 0 listens: a host name or an IP address, IPv6 without brackets.
    pub address: String,
    pub port: u16,
    /// What tells this run's processes from another's.
    pub token: String,
}

/// The variables in which one launcher says the same things.
struct Launcher {
    name: &'static str,
    rank: &'static str,
    size: &'static str,
    local: &'static str,
    job: &'static str,
}

const TORCHRUN: Launcher = Launcher {
    name: "torchrun",
    rank: "RANK",
    size: "WORLD_SIZE",
    local: "LOCAL_RANK",
    job: "TORCHELASTIC_RUN_ID",
};

const SRUN: Launcher = Launcher {
    name: "srun",
    rank: "SLURM_PROCID",
    size: "SLURM_NTASKS",
    local: "SLURM_LOCALID",
    job: "SLURM_JOB_ID",
};

impl World {
    /// Reads torchrun's variables, else those of an srun step; none set is `None`. torchrun's
    /// own store listens on MASTER_PORT, so process 0 takes KERNELCAST_PORT or the next port.
    /// A batch script outside srun, and a step of one task without MASTER_ADDR, are no run of
    /// several processes.
    ///
    /// # Errors
    /// E0610 for a variable that is missing beside others, malformed, or contradicts another.
    pub fn from_env(get: &dyn Fn(&str) -> Option<String>) -> Result<Option<World>, Diagnostic> {
        let set = |name: &str| get(name).is_some();
        if [TORCHRUN.rank, TORCHRUN.size, TORCHRUN.local].into_iter().any(set) {
            return World::read(&TORCHRUN, get).map(Some);
        }
        // Slurm gives a batch script, too, the number 0 among all tasks of the job.
        let in_step = !set(SRUN.job) || set("SLURM_STEP_ID") || set("SLURM_STEPID");
        if !set(SRUN.rank) || !in_step {
            return Ok(None);
        }
        if get(SRUN.size).as_deref() == Some("1") && !set("MASTER_ADDR") {
            return Ok(None);
        }
        World::read(&SRUN, get).map(Some)
    }

    fn read(
        launcher: &Launcher,
        get: &dyn Fn(&str) -> Option<String>,
    ) -> Result<World, Diagnostic> {
        let fixed_port = get("KERNELCAST_PORT");
        let mut needed = vec![launcher.rank, launcher.size, launcher.local, "MASTER_ADDR"];
        if fixed_port.is_none() {
            needed.push("MASTER_PORT");
        }
        let (set, missing): (Vec<&str>, Vec<&str>) =
            needed.into_iter().partition(|name| get(name).is_some());
        if !missing.is_empty() {
            let (set, missing) = (set.join(", "), missing.join(", "));
            return Err(unusable(launcher, format!("{set} are set, but not {missing}")));
        }
        let value = |name: &str| get(name).unwrap_or_default();
        let number = |name: &str, least: usize, most: usize| {
            let text = value(name);
            let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
            let number = text.parse().ok().filter(|n| digits && (least..=most).contains(n));
            number.ok_or_else(|| {
                let is = format!("{name} is `{text}`, not a number from {least} to {most}");
                unusable(launcher, is)
            })
        };
        let size = number(launcher.size, 1, MOST)?;
        let rank = number(launcher.rank, 0, MOST)?;
        let local_rank = number(launcher.local, 0, MOST)?;
        for (name, value) in [(launcher.rank, rank), (launcher.local, local_rank)] {
            if value >= size {
                let is = format!("{name} is {value}, but {} is {size}", launcher.size);
                return Err(unusable(launcher, is));
            }
        }
        let port = match fixed_port {
            Some(_) => number("KERNELCAST_PORT", 1, 65535)?,
            None => number("MASTER_PORT", 1, 65535)? + 1,
        };
        let port = u16::try_from(port).map_err(|_| {
            let is = "MASTER_PORT is 65535, and there is no port after it";
            unusable(launcher, is.into()).hint("set KERNELCAST_PORT to a free port")
        })?;
        let address = address(&value("MASTER_ADDR")).map_err(|is| unusable(launcher, is))?;
        let token = ["KERNELCAST_TOKEN", launcher.job].into_iter().find_map(|name| {
            let token = get(name)?;
            (!token.is_empty()).then_some(token)
        });
        let token = token.unwrap_or_else(|| NO_TOKEN.into());
        Ok(World { rank, size, local_rank, address, port, token })
    }

    /// `node17:29501`, with brackets around an IPv6 address.
    pub fn authority(&self) -> String {
        match self.address.parse() {
            Ok(IpAddr::V6(address)) => format!("[{address}]:{}", self.port),
            _ => format!("{}:{}", self.address, self.port),
        }
    }
}

/// A host name or an IP address, without brackets.
fn address(text: &str) -> Result<String, String> {
    let inner = text.strip_prefix('[').and_then(|t| t.strip_suffix(']'));
    if let Some(v6) = inner.or(Some(text)).and_then(|t| t.parse::<Ipv6Addr>().ok()) {
        return Ok(v6.to_string());
    }
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    match !text.is_empty() && text.len() <= 253 && text.bytes().all(plain) {
        true => Ok(text.into()),
        false => Err(format!("MASTER_ADDR is `{text}`, not a host name or an IP address")),
    }
}

fn unusable(launcher: &Launcher, is: String) -> Diagnostic {
    let diagnostic = Diagnostic::error(
        "E0610",
        format!("{}'s environment is not usable: {is}", launcher.name),
    );
    match launcher.name {
        "srun" => diagnostic.hint(
            "before srun: export MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | \
             head -n 1) MASTER_PORT=29500",
        ),
        _ => diagnostic.hint(
            "torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; to run \
             one process alone, unset them",
        ),
    }
}
