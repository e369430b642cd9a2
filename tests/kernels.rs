//! The kernels compile for every card that they are for, without one: NVRTC is enough.

use kernelcast::backend::cuda::kernels::SOURCE;
use kernelcast::backend::cuda::nvrtc::Compiler;

/// Compute capabilities of A100, H100 and B200.
const CARDS: [(i32, i32); 3] = [(8, 0), (9, 0), (10, 0)];

#[test]
fn the_kernels_compile_for_all_cards() {
    let compiler = match Compiler::load() {
        Ok(compiler) => compiler,
        Err(why) if std::env::var_os("KERNELCAST_REQUIRE_NVRTC").is_some() => {
            panic!("NVRTC is required: {}", why.message)
        }
        Err(why) => {
            eprintln!("skipped: the kernels are not compiled here ({})", why.message);
            return;
        }
    };
    for card in CARDS {
        let cubin = compiler.cubin(SOURCE, "update.cu", card, &[]);
        let cubin = cubin.unwrap_or_else(|d| panic!("sm_{}{}: {d:?}", card.0, card.1));
        // An ELF file with the three kernels' names in it.
        assert_eq!(&cubin[..4], b"\x7fELF");
        for kernel in ["quantize", "copy", "evaluate"] {
            let found = cubin.windows(kernel.len()).any(|w| w == kernel.as_bytes());
            assert!(found, "{kernel} is not among the kernels of sm_{}{}", card.0, card.1);
        }
    }
}
