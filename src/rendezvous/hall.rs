//! Where the members of a run meet: rounds of an exchange, and the failure that ends them.
//! Knows nothing of HTTP; a member is a thread of this process or a call that the server holds.

use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use axum::body::Bytes;
use serde_json::Value;
use tokio::sync::Notify;

use super::words::{processes, seconds};
use crate::diag::{Diagnostic, codes};

/// The longest wait that a caller can ask for.
const LONGEST: Duration = Duration::from_secs(7 * 24 * 3600);

/// Where the members of a run meet. An attempt fails once, for all: every wait in it then ends
/// with the same failure, until all members start over and the next attempt begins.
pub struct Hall {
    members: usize,
    state: Mutex<State>,
    /// Wakes the threads that wait here.
    changed: Condvar,
    /// Wakes the calls that the server holds.
    told: Notify,
    failed: AtomicBool,
}

struct State {
    attempt: u64,
    /// By name, in the order in which they were begun: a member's n-th use of a name meets the
    /// n-th of the others. A round that all have taken is gone.
    rounds: BTreeMap<String, VecDeque<Round>>,
    begun: u64,
    failure: Option<Failure>,
    /// Who asks to start over.
    again: Vec<bool>,
    /// Who will not come any more, and why.
    away: Vec<Option<String>>,
    /// Where each member runs, once it has connected; empty where nobody connects.
    places: Vec<Option<String>>,
    closed: bool,
}

struct Round {
    serial: u64,
    given: Vec<Option<Value>>,
    missing: usize,
    complete: Option<Arc<Complete>>,
    taken: usize,
}

/// A round that all members have come to.
pub(super) struct Complete {
    /// In the order of the members.
    pub payloads: Vec<Value>,
    /// The same as the server sends it: written once, for all.
    pub body: OnceLock<Bytes>,
}

/// What ended an attempt.
struct Failure {
    /// The member that told it; none if the hall found it.
    by: Option<usize>,
    diagnostic: Diagnostic,
}

struct Ticket<'a> {
    member: usize,
    round: &'a str,
    serial: u64,
}

/// What a member that listens is told.
pub(super) struct News {
    pub attempt: u64,
    pub failure: Option<Diagnostic>,
    pub closed: bool,
}

impl Hall {
    /// A hall for so many members, numbered from 0.
    pub fn new(members: usize) -> Arc<Hall> {
        let state = State {
            attempt: 0,
            rounds: BTreeMap::new(),
            begun: 0,
            failure: None,
            again: vec![false; members],
            away: vec![None; members],
            places: Vec::new(),
            closed: false,
        };
        Arc::new(Hall {
            members,
            state: Mutex::new(state),
            changed: Condvar::new(),
            told: Notify::new(),
            failed: AtomicBool::new(false),
        })
    }

    /// How many members meet here.
    pub fn members(&self) -> usize {
        self.members
    }

    pub(super) fn exchange(
        &self,
        (member, attempt): (usize, u64),
        round: &str,
        payload: Value,
        timeout: Duration,
    ) -> Result<Arc<Complete>, Diagnostic> {
        let ticket = self.give((member, attempt), round, payload)?;
        self.wait(timeout, |state| state.take(&ticket, self.members))
            .unwrap_or_else(|| self.late(&ticket, timeout))
    }

    /// The same for a call that the server holds.
    pub(super) async fn exchange_held(
        &self,
        (member, attempt): (usize, u64),
        round: &str,
        payload: Value,
        timeout: Duration,
    ) -> Result<Arc<Complete>, Diagnostic> {
        let ticket = self.give((member, attempt), round, payload)?;
        self.hold(timeout, |state| state.take(&ticket, self.members))
            .await
            .unwrap_or_else(|| self.late(&ticket, timeout))
    }

    /// Waits until all members start over; gives the number of the new attempt.
    pub(super) fn again(
        &self,
        (member, attempt): (usize, u64),
        timeout: Duration,
    ) -> Result<u64, Diagnostic> {
        self.ask_again(member, attempt)?;
        self.wait(timeout, |state| state.renewed(member, attempt))
            .unwrap_or_else(|| self.not_again((member, attempt), timeout))
    }

    /// The same for a call that the server holds.
    pub(super) async fn again_held(
        &self,
        (member, attempt): (usize, u64),
        timeout: Duration,
    ) -> Result<u64, Diagnostic> {
        self.ask_again(member, attempt)?;
        self.hold(timeout, |state| state.renewed(member, attempt))
            .await
            .unwrap_or_else(|| self.not_again((member, attempt), timeout))
    }

    /// Waits until there is something that the member does not know.
    pub(super) async fn news_held(
        &self,
        member: usize,
        known: (u64, bool),
        timeout: Duration,
    ) -> News {
        let news = |state: &State| News {
            attempt: state.attempt,
            failure: state.failure.as_ref().map(|f| f.told(member)),
            closed: state.closed,
        };
        let unknown = |state: &State| {
            let is = (state.attempt, state.failure.is_some());
            state.closed || is != known
        };
        self.hold(timeout, |state| unknown(state).then(|| news(state)))
            .await
            .unwrap_or_else(|| news(&self.lock()))
    }

    /// Ends the attempt for all members. The first failure stands; one of an earlier attempt
    /// is old news.
    pub(super) fn fail(&self, (member, attempt): (usize, u64), diagnostic: &Diagnostic) {
        let mut state = self.lock();
        if state.attempt == attempt {
            self.end(&mut state, Some(member), diagnostic.clone());
        }
    }

    /// What ended the attempt, as the member hears it; costs one load while there is nothing.
    pub(super) fn failure(&self, (member, attempt): (usize, u64)) -> Option<Diagnostic> {
        if !self.failed.load(Ordering::Acquire) {
            return None;
        }
        let state = self.lock();
        let failure = state.failure.as_ref().filter(|_| state.attempt == attempt);
        failure.map(|f| f.told(member))
    }

    /// A member that will not come any more: what waits for it ends, and with `at_once` the
    /// attempt does even if nobody waits yet.
    pub(super) fn away(&self, member: usize, why: String, at_once: bool) {
        let mut state = self.lock();
        let awaited = state.rounds.iter().find_map(|(name, rounds)| {
            rounds.iter().any(|r| r.given[member].is_none()).then(|| name.clone())
        });
        if awaited.is_some() || at_once {
            let step = awaited.map(|name| format!("; others wait for it at `{name}`"));
            let text = format!("{why}{}", step.unwrap_or_default());
            self.end(&mut state, None, Diagnostic::error("E0604", text));
        }
        state.away[member] = Some(why);
        self.wake();
    }

    /// A member that is here, after all.
    pub(super) fn back(&self, member: usize) {
        self.lock().away[member] = None;
    }

    /// Says where a member runs, so that messages can.
    pub(super) fn place(&self, member: usize, place: String) {
        let mut state = self.lock();
        state.places.resize(self.members, None);
        state.places[member] = Some(place);
    }

    /// Nobody can meet here any more.
    pub(super) fn close(&self, why: &str) {
        let mut state = self.lock();
        if state.rounds.values().flatten().any(|r| r.complete.is_none()) {
            self.end(&mut state, None, Diagnostic::error("E0604", why));
        }
        state.away[0] = Some(why.into());
        state.closed = true;
        self.wake();
    }

    fn give<'a>(
        &self,
        (member, attempt): (usize, u64),
        round: &'a str,
        payload: Value,
    ) -> Result<Ticket<'a>, Diagnostic> {
        let mut guard = self.lock();
        let state = &mut *guard;
        if state.attempt != attempt {
            let text = format!(
                "process {member} came to `{round}` of attempt {attempt}, but this is attempt {}",
                state.attempt
            );
            return Err(Diagnostic::error("E0604", text));
        }
        if let Some(failure) = &state.failure {
            return Err(failure.told(member));
        }
        // Only a round's first use needs its name kept.
        if !state.rounds.contains_key(round) {
            state.rounds.insert(round.into(), VecDeque::new());
        }
        let rounds = state.rounds.get_mut(round).expect("inserted above");
        let open = rounds.iter().position(|r| r.given[member].is_none());
        let index = open.unwrap_or_else(|| {
            state.begun += 1;
            rounds.push_back(Round::new(state.begun, self.members));
            rounds.len() - 1
        });
        let this = &mut rounds[index];
        this.given[member] = Some(payload);
        this.missing -= 1;
        let serial = this.serial;
        if this.missing == 0 {
            let payloads = this.given.iter_mut().map(|g| g.take().unwrap_or_default());
            let payloads: Vec<Value> = payloads.collect();
            this.given = vec![Some(Value::Null); self.members];
            this.complete = Some(Arc::new(Complete { payloads, body: OnceLock::new() }));
            self.wake();
        } else if let Some(why) = this.needs(&state.away) {
            let text = format!("{why}; process {member} waits for it at `{round}`");
            self.end(state, None, Diagnostic::error("E0604", text.clone()));
            return Err(Diagnostic::error("E0604", text));
        }
        Ok(Ticket { member, round, serial })
    }

    fn ask_again(&self, member: usize, attempt: u64) -> Result<(), Diagnostic> {
        let mut state = self.lock();
        match state.attempt {
            // The answer to the member's last call was lost.
            now if now == attempt + 1 => return Ok(()),
            now if now == attempt => {}
            now => {
                let text = format!("process {member} leaves attempt {attempt}, this is {now}");
                return Err(Diagnostic::error("E0604", text));
            }
        }
        if state.failure.is_none() {
            let gave_up = Diagnostic::error("E0604", "it gave the update up and starts over");
            self.end(&mut state, Some(member), gave_up);
        }
        state.again[member] = true;
        if state.again.iter().all(|a| *a) {
            state.attempt += 1;
            state.failure = None;
            state.rounds.clear();
            state.again.fill(false);
            self.failed.store(false, Ordering::Release);
            self.wake();
        }
        Ok(())
    }

    /// Members that do not start over in time. The member takes its own word back.
    fn not_again(
        &self,
        (member, attempt): (usize, u64),
        timeout: Duration,
    ) -> Result<u64, Diagnostic> {
        let mut state = self.lock();
        if state.attempt > attempt {
            return Ok(state.attempt);
        }
        let missing: Vec<usize> = (0..self.members).filter(|m| !state.again[*m]).collect();
        state.again[member] = false;
        let (who, limit) = (processes(&missing), seconds(timeout));
        let text = format!("{who} did not come to start the update over within {limit}");
        let late = Diagnostic::error("E0604", text);
        Err(state.whereabouts(&missing, late))
    }

    /// Members that did not come in time. The first to find it tells all.
    fn late(&self, ticket: &Ticket, timeout: Duration) -> Result<Arc<Complete>, Diagnostic> {
        let mut state = self.lock();
        // What came while the lock was awaited counts.
        if let Some(outcome) = state.take(ticket, self.members) {
            return outcome;
        }
        let rounds = state.rounds.get(ticket.round).into_iter().flatten();
        let missing: Vec<usize> = rounds
            .filter(|r| r.serial == ticket.serial)
            .flat_map(|r| (0..self.members).filter(|m| r.given[*m].is_none()))
            .collect();
        let (who, limit) = (processes(&missing), seconds(timeout));
        let text = format!("{who} did not come to `{}` within {limit}", ticket.round);
        let late = Diagnostic::error("E0604", text)
            .note(format!("process {} waited for it", ticket.member))
            .hint(
                "look at that process's own log first; --timeout sets the limit of every wait",
            );
        let late = state.whereabouts(&missing, late);
        self.end(&mut state, None, late.clone());
        Err(late)
    }

    /// Records the failure of the attempt, unless there is one.
    fn end(&self, state: &mut State, by: Option<usize>, diagnostic: Diagnostic) {
        if state.failure.is_none() {
            state.failure = Some(Failure { by, diagnostic });
            self.failed.store(true, Ordering::Release);
            self.wake();
        }
    }

    fn wake(&self) {
        self.changed.notify_all();
        self.told.notify_waiters();
    }

    /// Waits on this thread; none when the time is over.
    fn wait<T>(&self, timeout: Duration, ready: impl Fn(&mut State) -> Option<T>) -> Option<T> {
        let deadline = Instant::now() + timeout.min(LONGEST);
        let mut state = self.lock();
        loop {
            if let Some(is) = ready(&mut state) {
                return Some(is);
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            let woken = self.changed.wait_timeout(state, left);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits in the server's runtime; none when the time is over.
    fn hold<T>(
        &self,
        timeout: Duration,
        ready: impl Fn(&mut State) -> Option<T>,
    ) -> impl Future<Output = Option<T>> {
        let deadline = tokio::time::Instant::now() + timeout.min(LONGEST);
        async move {
            loop {
                let told = self.told.notified();
                tokio::pin!(told);
                told.as_mut().enable();
                let is = ready(&mut self.lock());
                if is.is_some() {
                    return is;
                }
                tokio::time::timeout_at(deadline, told).await.ok()?;
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// What the ticket's holder gets: the round, if it is complete, else the failure. A complete
    /// round stays good when a failure follows, so that all members see the same.
    fn take(
        &mut self,
        ticket: &Ticket,
        members: usize,
    ) -> Option<Result<Arc<Complete>, Diagnostic>> {
        let failed = self.failure.as_ref().map(|f| Err(f.told(ticket.member)));
        let Some(rounds) = self.rounds.get_mut(ticket.round) else { return failed };
        let Some(index) = rounds.iter().position(|r| r.serial == ticket.serial) else {
            return failed;
        };
        let Some(complete) = rounds[index].complete.clone() else { return failed };
        rounds[index].taken += 1;
        if rounds[index].taken == members {
            rounds.remove(index);
            if rounds.is_empty() {
                self.rounds.remove(ticket.round);
            }
        }
        Some(Ok(complete))
    }

    /// The number of the new attempt once there is one. Without all members there will be none.
    fn renewed(&mut self, member: usize, attempt: u64) -> Option<Result<u64, Diagnostic>> {
        if self.attempt > attempt {
            return Some(Ok(self.attempt));
        }
        let why = self.away.iter().flatten().next()?;
        let text = format!("{why}; an update cannot start over without it");
        self.again[member] = false;
        Some(Err(Diagnostic::error("E0604", text).hint("restart all processes of the run")))
    }

    /// Says of members that are late where they are.
    fn whereabouts(&self, missing: &[usize], mut diagnostic: Diagnostic) -> Diagnostic {
        for &member in missing.iter().take(4) {
            let waits = self.rounds.iter().find_map(|(name, rounds)| {
                let here = |r: &Round| r.complete.is_none() && r.given[member].is_some();
                rounds.iter().any(here).then_some(name)
            });
            if let Some(name) = waits {
                diagnostic = diagnostic.note(format!("process {member} waits at `{name}`"));
            }
            match self.places.get(member) {
                Some(Some(place)) => {
                    diagnostic = diagnostic.note(format!("process {member} runs on {place}"));
                }
                Some(None) => {
                    diagnostic = diagnostic.note(format!("process {member} never connected"));
                }
                None => {}
            }
        }
        diagnostic
    }
}

impl Round {
    fn new(serial: u64, members: usize) -> Round {
        let given = vec![None; members];
        Round { serial, given, missing: members, complete: None, taken: 0 }
    }

    /// Why the round cannot be completed, if a member that it needs is away.
    fn needs<'a>(&self, away: &'a [Option<String>]) -> Option<&'a String> {
        let absent = self.given.iter().zip(away).filter(|(given, _)| given.is_none());
        absent.filter_map(|(_, why)| why.as_ref()).next()
    }
}

impl Failure {
    /// The failure as a member hears it: its own as it told it, another's with its number.
    fn told(&self, to: usize) -> Diagnostic {
        let own = &self.diagnostic;
        let Some(by) = self.by.filter(|by| *by != to) else { return own.clone() };
        let title = codes::find(own.code).map_or("", |code| code.title);
        let mut told =
            Diagnostic::error("E0604", format!("process {by} failed: {}", own.message))
                .note(format!("its code is {}: {title}", own.code));
        told.notes.extend(own.label.iter().chain(&own.notes).cloned());
        told.hint.clone_from(&own.hint);
        told.subject.clone_from(&own.subject);
        told
    }
}
