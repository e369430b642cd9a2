//! What can be held without a GPU: no missing library is a panic, and the compiler compiles.

use super::driver::{self, Gpu};
use super::nvrtc::Compiler;
use super::{cache, nccl};
use crate::diag::Diagnostic;

/// A refusal says the code, the library and the loader's own reason.
fn refuses(failure: &Diagnostic, library: &str) {
    assert_eq!(failure.code, "E0605");
    assert!(failure.message.contains(library), "{}", failure.message);
    assert!(failure.hint.is_some());
    let reasons = failure.notes.iter().filter(|note| note.contains("loader says")).count();
    assert!(reasons > 0, "{:?}", failure.notes);
    for note in &failure.notes {
        assert!(note.contains(".so"), "{note}");
    }
}

#[test]
fn without_a_driver_the_refusal_says_why() {
    for _ in 0..2 {
        match driver::load() {
            Ok(()) => assert!(driver::version().unwrap() >= (12, 0)),
            // A driver without a GPU, or an old one: not the loader's words.
            Err(failure) if !failure.message.contains("does not load") => {
                assert_eq!(failure.code, "E0605");
            }
            Err(failure) => {
                refuses(&failure, "libcuda.so.1");
                assert_eq!(driver::device_count().unwrap_err(), failure);
                assert_eq!(Gpu::open(0).err().unwrap(), failure);
            }
        }
    }
}

#[test]
fn without_nccl_the_refusal_says_why() {
    match nccl::load() {
        Ok(nccl) => assert!(nccl.version().unwrap() >= 21800),
        Err(failure) => refuses(&failure, "libnccl.so.2"),
    }
}

#[test]
fn every_function_of_the_driver_is_asked_for_before_it_is_called() {
    let source =
        |name: &str| std::fs::read_to_string(format!("src/backend/cuda/{name}")).unwrap();
    let listed = source("driver.rs");
    let mut called = std::collections::BTreeSet::new();
    for entry in std::fs::read_dir("src/backend/cuda").unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if !name.ends_with(".rs") || name == "tests.rs" {
            continue;
        }
        for (at, _) in source(&name).match_indices("sys::cu") {
            let rest = &source(&name)[at + "sys::".len()..];
            let function: String =
                rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            called.insert(function);
        }
    }
    assert!(called.len() > 50);
    for function in &called {
        assert!(listed.contains(&format!("    \"{function}\",")), "{function} is not listed");
    }
    let count = listed.lines().filter(|line| line.starts_with("    \"cu")).count();
    assert_eq!(count, called.len(), "the list names what is not called");
}

const SOURCE: &str = r#"
extern "C" __global__ void scale(unsigned short *out, const float *in, unsigned count) {
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) {
        unsigned short pair;
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(pair) : "f"(in[i] * FACTOR));
        out[i] = pair;
    }
}
"#;

/// The compiler, or nothing with a word on why; where a variable names one, it must load.
fn compiler() -> Option<&'static Compiler> {
    match Compiler::load() {
        Ok(compiler) => Some(compiler),
        Err(failure) => {
            refuses(&failure, "NVRTC");
            assert!(std::env::var_os(super::nvrtc::VARIABLE).is_none(), "{failure:?}");
            eprintln!("not compiled: {} {:?}", failure.message, failure.notes);
            None
        }
    }
}

#[test]
fn a_kernel_is_compiled_for_every_card_that_the_compiler_knows() {
    let Some(compiler) = compiler() else { return };
    let dir = tempfile::tempdir().unwrap();
    let defines = [("FACTOR", "2.0f".to_string())];
    for arch in [(8, 0), (9, 0), (10, 0)] {
        if !compiler.supports(arch) {
            continue;
        }
        let cubin = compiler.cubin(SOURCE, "scale.cu", arch, &defines).unwrap();
        assert!(cubin.starts_with(b"\x7fELF"));
        let name = b"scale\0";
        assert!(cubin.windows(name.len()).any(|window| window == name));
        for _ in 0..2 {
            let cached =
                cache::kernels_in(Some(dir.path()), SOURCE, "scale.cu", arch, &defines);
            assert_eq!(cached.unwrap(), cubin, "compiling is deterministic");
        }
    }
}

#[test]
fn what_the_compiler_says_is_in_the_notes() {
    let Some(compiler) = compiler() else { return };
    let failure = compiler.cubin("int wrong = ;\n", "wrong.cu", (9, 0), &[]).unwrap_err();
    assert_eq!(failure.code, "E0605");
    assert!(failure.message.contains("compile wrong.cu"), "{}", failure.message);
    assert!(failure.notes.iter().any(|n| n.contains("wrong.cu(1): error")), "{failure:?}");
    assert!(failure.notes.iter().any(|n| n.contains("sm_90")), "{failure:?}");
    let failure = compiler.cubin(SOURCE, "scale.cu", (3, 0), &[]).unwrap_err();
    assert!(failure.notes.iter().any(|n| n.contains("sm_30")), "{failure:?}");
}
