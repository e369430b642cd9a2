//! An update: launched, watched, and given up where a GPU does not come.

use std::time::{Duration, Instant};

use super::{Session, Setting, Updated, join};
use crate::backend::cuda::Fallible;
use crate::backend::cuda::program::{Instruction, Lane};
use crate::backend::cuda::seats::Seat;
use crate::diag::Diagnostic;

/// How long a stream may take to end once it has been let go.
const LET_GO: Duration = Duration::from_secs(5);

/// How long a wait polls without sleeping.
const AWAKE: Duration = Duration::from_millis(500);

impl Session {
    /// Runs one update. Gives the units in which something was not finite.
    ///
    /// # Errors
    /// E0604 naming the GPU and the step that did not come in time, or another GPU's failure;
    /// E0605 for an error of the device. Receivers are then part old, part new.
    pub fn update(&self) -> Fallible<Vec<u32>> {
        Ok(self.update_timed()?.suspects)
    }

    /// The same, with times.
    ///
    /// # Errors
    /// As [`Session::update`].
    pub fn update_timed(&self) -> Fallible<Updated> {
        let Setting { member, timeout, .. } = &self.setting;
        let done = self.run();
        if let Err(problem) = &done {
            member.fail(problem);
        }
        let launch = done?;
        let mut words = vec![0u8; self.bad.bytes() as usize];
        self.control.download(self.bad.address(), &mut words)?;
        let words: &[u32] = bytemuck::cast_slice(&words);
        let bad = (0..).zip(&words[..self.units]).filter(|(_, word)| **word != 0);
        let bad: Vec<u32> = bad.map(|(unit, _)| unit).collect();
        let mut all: Vec<u32> = match self.setting.seats.count {
            1 => bad,
            _ => member.share("done", &bad, *timeout)?.into_iter().flatten().collect(),
        };
        all.sort_unstable();
        all.dedup();
        Ok(Updated { suspects: all, launch })
    }

    /// Gives the time that the launches took.
    fn run(&self) -> Fallible<Duration> {
        self.reset()?;
        if self.setting.seats.count > 1 {
            self.setting.member.barrier("ready", self.setting.timeout)?;
        }
        let started = Instant::now();
        for stage in &self.stages {
            if let Some(captured) = &stage.captured {
                captured.launch(self.lane(Lane::Make))?;
            }
        }
        let launch = started.elapsed();
        self.watch(Instant::now() + self.setting.timeout)?;
        Ok(launch)
    }

    /// Clears what an update reports and waits for.
    pub(super) fn reset(&self) -> Fallible<()> {
        let flags = self.arenas[self.setting.member.rank()].flag_bytes(self.stages.len());
        self.control.fill(self.own.address(), 0, flags)?;
        self.control.fill(self.bad.address(), 0, self.bad.bytes())?;
        self.control.synchronize()?;
        for word in 0..self.progress.slice().len() / 4 {
            self.progress.write_u32(word, 0);
        }
        Ok(())
    }

    /// Waits for all lanes, at most until a time or until another GPU fails.
    pub(super) fn watch(&self, deadline: Instant) -> Fallible<()> {
        let waited = Instant::now();
        loop {
            // The other lanes are joined to this one.
            if self.lane(Lane::Make).finished()? {
                return Ok(());
            }
            if let Some(failure) = self.setting.member.failure() {
                self.let_go();
                return Err(failure);
            }
            if let Some(comm) = &self.comm
                && let Err(problem) = comm.async_error()
            {
                self.let_go();
                return Err(problem);
            }
            if Instant::now() > deadline {
                let problem = self.late();
                self.let_go();
                return Err(problem);
            }
            // Awake while an update usually lasts: a thread that has slept launches slowly. Every
            // question takes the driver's lock, which the launches of other threads want too.
            match waited.elapsed() < AWAKE {
                true => pause(),
                false => std::thread::sleep(Duration::from_micros(200)),
            }
        }
    }

    /// Who is waited for, and in which step.
    fn late(&self) -> Diagnostic {
        let step =
            (0..self.stages.len()).map(|s| self.progress.read_u32(s)).collect::<Vec<_>>();
        let stage = step.iter().rposition(|s| *s > 0).unwrap_or(0);
        let now = step.get(stage).copied().unwrap_or(0).saturating_sub(1);
        let mut at = 0;
        let mut from: Vec<Seat> = Vec::new();
        for instruction in self.stages.get(stage).map_or(&[][..], |s| &s.program.instructions) {
            match instruction {
                Instruction::Step { number } => at = *number,
                Instruction::Await { from: seat, .. }
                | Instruction::Receive { from: seat, .. }
                    if at >= now =>
                {
                    from.push(*seat);
                }
                Instruction::Send { to, .. } if at >= now => from.push(*to),
                _ => {}
            }
        }
        from.sort_unstable();
        from.dedup();
        let names: Vec<String> = from.iter().map(|s| self.name(*s)).collect();
        let who = if names.is_empty() { "the GPU".to_owned() } else { names.join(", ") };
        let seconds = self.setting.timeout.as_secs_f64();
        Diagnostic::error("E0604", format!("{who} did not do step {now} within {seconds} s"))
            .note(format!("{} waited", self.name(self.setting.member.rank())))
            .hint("--timeout sets the limit of every wait")
    }

    /// A GPU and the ranks on it.
    fn name(&self, seat: Seat) -> String {
        let seats = &self.setting.seats;
        let trainers: Vec<u32> = seats.trainers_on(seat).collect();
        let ranks: Vec<u64> = seats.ranks_on(seat).map(|r| r.0).collect();
        format!("GPU {seat} (trainer ranks {trainers:?}, inference ranks {ranks:?})")
    }

    /// Ends all waits of this GPU's streams: flags are raised, the communicator is given up.
    pub(super) fn let_go(&self) {
        if let Some(comm) = &self.comm {
            comm.abort();
        }
        let flags = self.arenas[self.setting.member.rank()].flag_bytes(self.stages.len());
        // A failure here changes nothing: the update has failed already.
        let _ = self.control.fill(self.own.address(), 0x7f, flags);
        let _ = self.control.synchronize();
        let deadline = Instant::now() + LET_GO;
        while Instant::now() < deadline
            && self.lanes.iter().any(|lane| lane.finished().is_ok_and(|done| !done))
        {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// After a failed update: meets the others again, so that the next one can run.
    ///
    /// # Errors
    /// E0604 for a GPU that does not come.
    pub fn retry(&mut self) -> Fallible<()> {
        self.setting.member.retry(self.setting.timeout)?;
        if self.comm.is_none() {
            return Ok(());
        }
        for stage in &mut self.stages {
            stage.captured = None;
        }
        self.comm = None;
        self.comm = Some(join(&self.setting)?);
        self.connect(0..self.stages.len())?;
        (0..self.stages.len()).try_for_each(|stage| self.capture(stage))
    }
}

/// About 20 µs without a call of the driver or the system.
fn pause() {
    let until = Instant::now() + Duration::from_micros(20);
    while Instant::now() < until {
        std::hint::spin_loop();
    }
}
