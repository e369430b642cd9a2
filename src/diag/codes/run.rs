//! Codes of lowering (E05) and of the run (E06).

use super::Code;

pub(super) const CODES: &[Code] = &[
    Code {
        code: "E0501",
        title: "there is no way to execute this expression",
        text: "\
The plan is well typed, but no tile program computes this value: a derived parameter
that reads several target parameters, for one, or a two-step quantization whose second
grid differs while its tiles are shared between trainer ranks. Write the value with
fewer steps, or derive it from one target parameter:
    let kv_b = w.quantize(q);  attn[\"kv_b_proj.weight\"] = kv_b;
    attn[\"W_UV\"] = kv_b.dequantize(bf16).reshape([-1, P + V, L]).slice(1, P..P + V);",
    },
    Code {
        code: "E0502",
        title: "a fault of the engine",
        text: "\
Before anything runs, the engine proves of every schedule that each byte is written
once, that each message has its receiver and that nothing waits for itself. This one
failed, so nothing was written. If a rank stopped at a bug while an update ran, a file
run has published nothing, and a receiver in memory is part old, part new. It is a fault
of the engine, or of the program that embeds it, not of the plan: please report it with
the plan, the config and the command line.",
    },
    Code {
        code: "E0601",
        title: "a file could not be read or written",
        text: "\
The operating system refused a read or a write. The message names the file and the
reason: no such file, no permission, no space, a file that changed while it was read.
Output is written aside and renamed at the end, so what was published before is as it
was. Run again once the cause is gone.",
    },
    Code {
        code: "E0602",
        title: "weights that are not finite",
        text: "\
A source tensor holds NaN or infinity; the message names it, the count, the first index
and the kind. Quantized, such a value would spoil its whole block without a trace. When
the check ran before the transfer, nothing was written; when it ran during it, the
update failed on all ranks and receivers are torn until the next good one. Look for the
step where training diverged. To send such weights knowingly, use --finite-check allow.",
    },
    Code {
        code: "E0603",
        title: "the output folder cannot be used",
        text: "\
The folder exists and is not empty, another run is writing to it, or it is not the
output of a run and will not be overwritten. Give another --out. With --force the output
of an earlier run is replaced, once the new one is complete; a folder that holds
anything else is never removed.",
    },
    Code {
        code: "E0604",
        title: "a peer did not answer in time",
        text: "\
Every wait has a limit (--timeout). A peer died, never started, runs another plan or is
slower than the limit. All ranks end with this error instead of waiting for ever, and
receivers that were being written are torn until the next update succeeds; no restart is
needed. The message names the peer and the step. Look at that peer's own log first, and
raise --timeout only if it was alive and slow.",
    },
    Code {
        code: "E0605",
        title: "the device or backend cannot be used",
        text: "\
The chosen backend is not available: no GPU, no driver or a too old one, a library that
does not load, not enough memory for the staging buffers, or a card without FP8. The
message gives the library's own reason. `--backend cpu` works everywhere and gives the
same bytes; `--staging SIZE` lowers the memory that is needed.",
    },
    Code {
        code: "E0606",
        title: "verification found different bytes",
        text: "\
The plan was computed a second time, element by element, and the result differs from
what is stored or live. The message names the parameter, the rank, the first index and
both values. Either the data changed after it was written (another process, a receiver
that reprocessed its weights, a source that was trained further), or the engine is
wrong. Do not serve these weights. The exit status is 4.",
    },
    Code {
        code: "E0607",
        title: "the output folder's manifest is damaged or from another version",
        text: "\
`manifest.json` in the output folder is missing, is not valid, has a schema that this
engine does not know, or does not agree with the files beside it. A run writes it last,
so a folder without one was never complete. Write the folder anew with `engine run`, or
read it with the version that made it.",
    },
    Code {
        code: "E0608",
        title: "the run was interrupted",
        text: "\
The process was asked to stop (Ctrl-C, or a signal from a scheduler) and did so at the
next safe point. A file run leaves no output folder behind, and one from before is
unchanged. On a live update the receivers in work are torn until the next update
succeeds. Run it again.",
    },
    Code {
        code: "E0609",
        title: "weights that are not finite were let through",
        text: "\
A warning, only with --finite-check allow: NaN or infinity was found in a source tensor
and sent as the recipe encodes it; every value of its block may be spoiled with it. The
message names the tensor, the count and the first index. Without the flag this is the
error E0602.",
    },
    Code {
        code: "E0610",
        title: "the processes of a run cannot be put together",
        text: "\
A run of several processes reads each one's place from its launcher: RANK, WORLD_SIZE,
LOCAL_RANK, MASTER_ADDR and MASTER_PORT from torchrun, or SLURM_PROCID, SLURM_NTASKS and
SLURM_LOCALID from srun, with MASTER_ADDR and MASTER_PORT exported by you. One of them
is missing or malformed, two processes claim one number or differ in how many they are,
the port is taken, or what answers there is another run. Process 0 listens at
MASTER_ADDR on KERNELCAST_PORT (if unset, MASTER_PORT + 1). Processes of one run share a
token: KERNELCAST_TOKEN, else the id that torchrun or Slurm gave the job.",
    },
    Code {
        code: "E0611",
        title: "processes of a run do not agree",
        text: "\
Before anything moves, all processes compare what they are about to do: the digest of
the plan, the hash of the schedule, the version of the engine. The message names a
process that differs, and both values. Usually one host has an older copy of the plan,
the config, the expert map or the engine, or was started with other flags. Nothing was
written.",
    },
];
