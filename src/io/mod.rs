//! Files in and out: safetensors checkpoints, rank files, JSON manifests.
