//! How the processes of a run meet: they exchange what all must know, compare what must be
//! equal, and hear of each other's failures. Knows nothing of plans, bytes or GPUs.
//!
//! Process 0 owns the [`Hall`] and serves it over HTTP; the others hold connections. Every
//! message is JSON, every wait has a limit, and every error names the process and the step.
//!
//! - [`Member::exchange`] is a round: all give, all take. Rounds of one name meet in the order of
//!   their use, so a name may be used for every update.
//! - A failure ends the *attempt* for all: each wait, and each later one, ends with it, and
//!   [`Member::failure`] tells it to a watchdog. [`Member::retry`], called by all, begins the
//!   next attempt; no process needs a restart.
//! - A process that dies is noticed by its connection within seconds. One that drops its
//!   [`Member`] has left: nobody is alarmed until somebody waits for it.

mod agree;
mod client;
mod hall;
mod server;
mod wire;
mod words;
mod world;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

pub use agree::agree;
pub use hall::Hall;
pub use server::{Server, serve};
pub use world::World;

use self::client::Client;
use crate::diag::Diagnostic;

/// A process among the others of its run. Dropping it leaves the run.
pub struct Member {
    rank: usize,
    size: usize,
    way: Way,
}

/// How a member reaches the hall.
enum Way {
    Local { hall: Arc<Hall>, attempt: AtomicU64, _server: Option<Server> },
    Remote(Client),
}

/// Meets the other processes: process 0 serves, the others connect to it and wait for it.
///
/// # Errors
/// E0610 if the port is taken or another run answers there, if two processes claim one number
/// or the run's size differs; E0611 for another version of the engine; E0604 if process 0 is
/// not found in time.
pub fn join(world: &World, timeout: Duration) -> Result<Member, Diagnostic> {
    let World { rank, size, .. } = *world;
    if rank >= size {
        let text = format!("there is no process {rank} among {size}");
        return Err(Diagnostic::error("E0610", text));
    }
    let way = match rank {
        0 => {
            let hall = Hall::new(size);
            let server = if size > 1 { Some(serve(Arc::clone(&hall), world)?) } else { None };
            Way::Local { hall, attempt: AtomicU64::new(0), _server: server }
        }
        _ => Way::Remote(Client::join(world, timeout)?),
    };
    Ok(Member { rank, size, way })
}

impl Hall {
    /// A member of this process. Each number belongs to one.
    ///
    /// # Panics
    /// If there is no such number.
    pub fn member(self: &Arc<Self>, rank: usize) -> Member {
        let size = self.members();
        assert!(rank < size, "member {rank} of {size}");
        let (hall, attempt) = (Arc::clone(self), AtomicU64::new(0));
        Member { rank, size, way: Way::Local { hall, attempt, _server: None } }
    }
}

impl Member {
    /// Its number, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// How many members the run has.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Gives a payload and waits until all members have given theirs; gives all, in order.
    ///
    /// # Errors
    /// E0604 that names the members that did not come, or tells another's failure; its own
    /// failure as it told it; E0502 for a payload of more than 64 MiB.
    pub fn exchange(
        &self,
        round: &str,
        payload: Value,
        timeout: Duration,
    ) -> Result<Vec<Value>, Diagnostic> {
        match &self.way {
            Way::Local { hall, attempt, .. } => {
                let attempt = attempt.load(Ordering::Relaxed);
                let all = hall.exchange((self.rank, attempt), round, payload, timeout)?;
                // The last to take a round need not copy it.
                Ok(Arc::try_unwrap(all).map_or_else(|all| all.payloads.clone(), |c| c.payloads))
            }
            Way::Remote(client) => client.exchange(round, payload, timeout),
        }
    }

    /// [`exchange`](Self::exchange) of values of one type.
    ///
    /// # Errors
    /// Those of `exchange`, and E0611 if another member's value is not of this type.
    pub fn share<T: Serialize + DeserializeOwned>(
        &self,
        round: &str,
        value: &T,
        timeout: Duration,
    ) -> Result<Vec<T>, Diagnostic> {
        let payload = serde_json::to_value(value).map_err(|e| {
            Diagnostic::error("E0502", format!("the payload of `{round}` is not JSON: {e}"))
        })?;
        let all = self.exchange(round, payload, timeout)?.into_iter().enumerate();
        all.map(|(member, value)| {
            serde_json::from_value(value).map_err(|e| {
                let text =
                    format!("what process {member} gave at `{round}` makes no sense: {e}");
                Diagnostic::error("E0611", text)
            })
        })
        .collect()
    }

    /// Waits until all members are here.
    ///
    /// # Errors
    /// Those of [`exchange`](Self::exchange).
    pub fn barrier(&self, round: &str, timeout: Duration) -> Result<(), Diagnostic> {
        self.exchange(round, Value::Null, timeout).map(|_| ())
    }

    /// Ends the attempt for all members. The first failure that is told stands.
    pub fn fail(&self, diagnostic: &Diagnostic) {
        match &self.way {
            Way::Local { hall, attempt, .. } => {
                hall.fail((self.rank, attempt.load(Ordering::Relaxed)), diagnostic);
            }
            Way::Remote(client) => client.fail(diagnostic),
        }
    }

    /// What ended the attempt, if anything did. Free to ask while nothing has: for watchdogs.
    pub fn failure(&self) -> Option<Diagnostic> {
        match &self.way {
            Way::Local { hall, attempt, .. } => {
                hall.failure((self.rank, attempt.load(Ordering::Relaxed)))
            }
            Way::Remote(client) => client.failure(),
        }
    }

    /// Begins the next attempt once all members have called this; a failure is forgotten, and
    /// rounds begin afresh. Called while nothing has failed, it gives the attempt up for all.
    ///
    /// # Errors
    /// E0604 that names the members that did not come in time, have left or are gone. It may
    /// be called again.
    pub fn retry(&self, timeout: Duration) -> Result<(), Diagnostic> {
        match &self.way {
            Way::Local { hall, attempt, .. } => {
                let old = attempt.load(Ordering::Relaxed);
                let new = hall.again((self.rank, old), timeout)?;
                attempt.store(new, Ordering::Relaxed);
                Ok(())
            }
            Way::Remote(client) => client.again(timeout),
        }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.fail(&Diagnostic::error("E0502", "it stopped at a bug (a panic)"));
        }
        if let Way::Local { hall, .. } = &self.way {
            hall.away(self.rank, format!("process {} has left the run", self.rank), false);
        }
    }
}
