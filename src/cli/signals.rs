//! Signals of a run: the first asks it to stop and clean up, the second ends the process.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::flag;

/// While it lives, Ctrl-C and a scheduler's request to end set a flag instead of ending the
/// process.
pub(super) struct Signals {
    asked: Arc<AtomicBool>,
}

impl Signals {
    pub(super) fn watch() -> io::Result<Self> {
        let asked = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            // In this order: a signal that finds the flag set ends the process.
            flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&asked))?;
            flag::register(signal, Arc::clone(&asked))?;
        }
        Ok(Signals { asked })
    }

    /// True once the run was asked to stop.
    pub(super) fn asked(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.asked)
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        // There is nothing left to clean up: the next signal ends the process.
        self.asked.store(true, Ordering::SeqCst);
    }
}

/// Makes a write beyond the limit of a file's size (`ulimit -f`) an error like any other.
pub(super) fn report_large_files() {
    // Without it, such a write ends the process, as it would have before.
    _ = flag::register(SIGXFSZ, Arc::default());
}
