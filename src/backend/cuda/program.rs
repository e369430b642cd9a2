//! What a GPU does in an update, instruction by instruction: the form that is captured.

use super::seats::Seat;
use super::table::Table;

/// A stream of a GPU. Instructions of one lane run in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Lane {
    /// Makes what this GPU's trainer ranks send.
    Make,
    /// Sends and receives.
    Move,
    /// Stores what came, and passes it on where GPUs write to one another.
    Store,
}

impl Lane {
    pub const ALL: [Lane; 3] = [Lane::Make, Lane::Move, Lane::Store];
}

/// A word by which one GPU tells another how far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Flag {
    /// Maxima of shared tiles: own ones are known.
    Measured,
    /// Agreed ones are known.
    Agreed,
    /// A step's parts are stored.
    Made,
    /// A step's relays are stored.
    Relayed,
}

impl Flag {
    pub const ALL: [Flag; 4] = [Flag::Measured, Flag::Agreed, Flag::Made, Flag::Relayed];
}

/// One step of a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Instruction {
    /// Runs a table, by index.
    Launch {
        lane: Lane,
        table: usize,
    },
    /// Zeroes memory.
    Clear {
        lane: Lane,
        address: u64,
        bytes: u64,
    },
    /// Sends and receives between these two are one group.
    GroupStart,
    GroupEnd,
    Send {
        to: Seat,
        address: u64,
        bytes: u64,
    },
    Receive {
        from: Seat,
        address: u64,
        bytes: u64,
    },
    /// Makes an event of what a lane has done so far, and lets a lane wait for one.
    Record {
        lane: Lane,
        event: usize,
    },
    Wait {
        lane: Lane,
        event: usize,
    },
    /// Tells another GPU, and waits to be told.
    Signal {
        lane: Lane,
        to: Seat,
        flag: Flag,
        value: u32,
    },
    Await {
        lane: Lane,
        from: Seat,
        flag: Flag,
        value: u32,
    },
    /// The steps from here on are of this number: what a watchdog reports.
    Step {
        number: u32,
    },
}

/// A GPU's part of an update.
#[derive(Clone, Debug, Default)]
pub struct SeatProgram {
    pub tables: Vec<Table>,
    pub instructions: Vec<Instruction>,
    pub events: usize,
    /// Bytes of scratch memory that its tables use, all of them in turn.
    pub scratch: u64,
}

impl SeatProgram {
    /// Adds the levels of a lowering as launches of a lane; nothing for empty ones.
    pub(super) fn launch(&mut self, lane: Lane, levels: Vec<Table>, scratch: u64) -> bool {
        let mut any = false;
        for table in levels.into_iter().filter(|t| !t.is_empty()) {
            let index = self.tables.len();
            self.instructions.push(Instruction::Launch { lane, table: index });
            self.tables.push(table);
            any = true;
        }
        self.scratch = self.scratch.max(scratch);
        any
    }

    pub(super) fn push(&mut self, instruction: Instruction) {
        self.instructions.push(instruction);
    }

    /// Lets one lane wait for all that another has done so far.
    pub(super) fn after(&mut self, lane: Lane, done: Lane) -> usize {
        let event = self.record(done);
        self.push(Instruction::Wait { lane, event });
        event
    }

    pub(super) fn record(&mut self, lane: Lane) -> usize {
        let event = self.events;
        self.events += 1;
        self.push(Instruction::Record { lane, event });
        event
    }
}
