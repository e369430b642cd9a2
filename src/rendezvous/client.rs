//! A process's connection to process 0. A thread of its own asks for news, so that a failure is
//! known at once and the death of process 0 within seconds.

use std::future::Future;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::Request;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::sync::watch;

use super::wire::{
    Again, Answer, Call, Done, Exchange, Fail, GRACE, HELD, Head, Heard, Join, LIMIT, Leave,
    Outcome, Payloads, Renewed, SCHEMA, Told, VERSION, Watch, too_long,
};
use super::words::{place, seconds};
use super::world::World;
use crate::diag::Diagnostic;

/// How much later than the server a call gives up.
const MARGIN: Duration = Duration::from_secs(5);

/// The time of a call that is answered at once.
const SHORT: Duration = Duration::from_secs(2);

/// The time between two tries to connect.
const PAUSE: Duration = Duration::from_millis(100);

/// The longest answer: all members' payloads of a round.
const LONGEST_ANSWER: usize = 1 << 30;

/// A connection to process 0.
pub(super) struct Client {
    shared: Arc<Shared>,
    runtime: tokio::runtime::Handle,
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    http: hyper_util::client::legacy::Client<HttpConnector, Body>,
    head: Head,
    /// `node17:29501`.
    authority: String,
    attempt: AtomicU64,
    /// Whether there is anything in `news`.
    any: AtomicBool,
    news: Mutex<News>,
    gone: watch::Sender<bool>,
}

#[derive(Default)]
struct News {
    /// What ended an attempt, and which.
    failure: Option<(u64, Diagnostic)>,
    /// Why process 0 cannot be reached.
    gone: Option<String>,
    /// Process 0 has ended in order.
    closed: bool,
}

/// Why a call has no answer.
enum Trouble {
    /// Nothing was sent.
    Unreachable(String),
    /// It was sent, and the answer, if there was one, is lost.
    Lost(String),
    /// Process 0 said no.
    Told(Diagnostic),
}

impl Client {
    /// Connects to process 0, which may start later.
    pub(super) fn join(world: &World, timeout: Duration) -> Result<Client, Diagnostic> {
        let deadline = Instant::now() + timeout;
        let authority = world.authority();
        let broken = |e: std::io::Error| {
            Diagnostic::error(
                "E0605",
                format!("the thread of the rendezvous did not start: {e}"),
            )
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(broken)?;
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(SHORT));
        connector.set_keepalive(Some(MARGIN));
        let http = hyper_util::client::legacy::Client::builder(TokioExecutor::new())
            .pool_idle_timeout(Duration::from_secs(20))
            .build(connector);
        let shared = Arc::new(Shared {
            http,
            head: Head {
                schema: SCHEMA,
                version: VERSION.into(),
                token: world.token.clone(),
                member: world.rank,
                size: world.size,
                instance: instance(),
            },
            authority,
            attempt: AtomicU64::new(0),
            any: AtomicBool::new(false),
            news: Mutex::default(),
            gone: watch::Sender::new(false),
        });
        let (stop, mut stopped) = watch::channel(false);
        let handle = runtime.handle().clone();
        let listener = Arc::clone(&shared);
        let (joined, outcome) = mpsc::channel();
        let thread = std::thread::Builder::new().name("rendezvous".into()).spawn(move || {
            runtime.block_on(async {
                let is = listener.join(deadline, timeout).await;
                let good = is.is_ok();
                let _ = joined.send(is);
                if good {
                    tokio::select! {
                        () = listener.listen() => {}
                        _ = stopped.wait_for(|stop| *stop) => {}
                    }
                }
            });
            runtime.shutdown_background();
        });
        let thread = thread.map_err(broken)?;
        match outcome.recv() {
            Ok(Ok(())) => Ok(Client { shared, runtime: handle, stop, thread: Some(thread) }),
            Ok(Err(refused)) => {
                let _ = thread.join();
                Err(refused)
            }
            Err(_) => Err(fault("the first meeting")),
        }
    }

    /// Gives a payload and takes those of all members.
    pub(super) fn exchange(
        &self,
        round: &str,
        payload: Value,
        timeout: Duration,
    ) -> Result<Vec<Value>, Diagnostic> {
        let shared = Arc::clone(&self.shared);
        let attempt = shared.attempt.load(Ordering::Relaxed);
        let body =
            Exchange { attempt, round: round.into(), timeout_ms: millis(timeout), payload };
        let bytes = shared.encode(&body);
        if bytes.len() > LIMIT {
            let long = too_long(round, bytes.len());
            self.fail(&long);
            return Err(long);
        }
        let all: Payloads = self.ask(("exchange", round), bytes, timeout)?;
        Ok(all.payloads)
    }

    /// Asks to start over, and waits until all do.
    pub(super) fn again(&self, timeout: Duration) -> Result<(), Diagnostic> {
        let attempt = self.shared.attempt.load(Ordering::Relaxed);
        let bytes = self.shared.encode(&Again { attempt, timeout_ms: millis(timeout) });
        let renewed: Renewed = self.ask(("again", "a new start"), bytes, timeout)?;
        self.shared.attempt.store(renewed.attempt, Ordering::Relaxed);
        let mut news = self.shared.news();
        news.failure = news.failure.take().filter(|(attempt, _)| *attempt >= renewed.attempt);
        self.shared.publish(&news);
        Ok(())
    }

    /// Tells all members of a failure; returns when process 0 knows it, or cannot be told.
    pub(super) fn fail(&self, diagnostic: &Diagnostic) {
        let attempt = self.shared.attempt.load(Ordering::Relaxed);
        self.shared.note(attempt, diagnostic.clone());
        let bytes = self.shared.encode(&Fail { attempt, failure: Told::from(diagnostic) });
        let shared = Arc::clone(&self.shared);
        let told = async move { shared.call::<Done>("fail", bytes, SHORT).await.map(|_| ()) };
        let _ = self.run(told, SHORT);
    }

    /// What ended the attempt, if that is known here. Costs one load while nothing is.
    pub(super) fn failure(&self) -> Option<Diagnostic> {
        if !self.shared.any.load(Ordering::Acquire) {
            return None;
        }
        let attempt = self.shared.attempt.load(Ordering::Relaxed);
        let news = self.shared.news();
        let failed = news.failure.as_ref().filter(|(of, _)| *of == attempt);
        failed.map(|(_, diagnostic)| diagnostic.clone()).or_else(|| {
            let why = news.gone.as_ref()?;
            let text = format!("process 0 ({}) is gone: {why}", self.shared.authority);
            Some(Diagnostic::error("E0604", text))
        })
    }

    /// A call that waits for other members, at a step that messages can name.
    fn ask<T: DeserializeOwned + Send + 'static>(
        &self,
        (path, step): (&'static str, &str),
        bytes: Vec<u8>,
        timeout: Duration,
    ) -> Result<T, Diagnostic> {
        let shared = Arc::clone(&self.shared);
        let limit = timeout.saturating_add(MARGIN);
        let asked = async move {
            let mut gone = shared.gone.subscribe();
            tokio::select! {
                is = shared.insist(path, bytes, limit) => is,
                _ = gone.wait_for(|gone| *gone) => Err(Trouble::Lost(shared.why_gone())),
            }
        };
        let why = match self.run(asked, limit.saturating_add(SHORT)) {
            Some(Ok(is)) => return Ok(is),
            Some(Err(Trouble::Told(failure))) => return Err(failure),
            Some(Err(Trouble::Unreachable(why) | Trouble::Lost(why))) => why,
            None => return Err(fault(step)),
        };
        let lost = self.shared.lost(&why, step);
        // If it is only this connection that broke, the others should not wait.
        self.fail(&lost);
        Err(lost)
    }

    /// Runs on the connection's thread and waits here; none if that takes too long. Works in a
    /// caller that has a runtime of its own, too.
    fn run<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
        limit: Duration,
    ) -> Option<T> {
        let (done, outcome) = mpsc::sync_channel(1);
        self.runtime.spawn(async move {
            let _ = done.send(work.await);
        });
        outcome.recv_timeout(limit).ok()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let reachable = {
            let news = self.shared.news();
            news.gone.is_none() && !news.closed
        };
        if reachable {
            let bytes = self.shared.encode(&Leave {});
            let shared = Arc::clone(&self.shared);
            let left =
                async move { shared.call::<Done>("leave", bytes, SHORT).await.map(|_| ()) };
            let _ = self.run(left, Duration::from_millis(500));
        }
        let _ = self.stop.send(true);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    async fn join(&self, deadline: Instant, timeout: Duration) -> Result<(), Diagnostic> {
        let bytes = self.encode(&Join { place: place() });
        loop {
            let why = match self.call::<Done>("join", bytes.clone(), SHORT).await {
                Ok(Done {}) => return Ok(()),
                Err(Trouble::Told(no)) => {
                    return Err(no.note(format!("process 0 answered at {}", self.authority)));
                }
                Err(Trouble::Unreachable(why) | Trouble::Lost(why)) => why,
            };
            if Instant::now() + PAUSE >= deadline {
                let (at, limit) = (&self.authority, seconds(timeout));
                let text = format!("process 0 was not found at {at} within {limit}: {why}");
                return Err(Diagnostic::error("E0604", text).hint(
                    "is process 0 alive, and can this host reach that address and port? \
                     KERNELCAST_PORT names another port for all processes",
                ));
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Asks for news for ever.
    async fn listen(&self) {
        let mut known = Watch { attempt: 0, failed: false };
        let mut silent_since = None;
        loop {
            let bytes = self.encode(&known);
            let (why, at_once) = match self.call::<Heard>("watch", bytes, HELD + SHORT).await {
                Ok(heard) => {
                    silent_since = None;
                    known = Watch { attempt: heard.attempt, failed: heard.failure.is_some() };
                    let closed = heard.closed;
                    self.heard(heard);
                    if closed {
                        // Answers may still be on their way.
                        std::future::pending::<()>().await;
                    }
                    continue;
                }
                Err(Trouble::Told(no)) => (no.message, true),
                Err(Trouble::Unreachable(why) | Trouble::Lost(why)) => (why, false),
            };
            let since = *silent_since.get_or_insert_with(Instant::now);
            if at_once || since.elapsed() > GRACE {
                let mut news = self.news();
                news.gone = Some(why);
                self.publish(&news);
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    fn heard(&self, heard: Heard) {
        let mut news = self.news();
        news.gone = None;
        news.closed = heard.closed;
        if let Some(told) = heard.failure {
            news.failure = Some((heard.attempt, told.into()));
        }
        self.publish(&news);
    }

    /// Remembers the first failure of an attempt.
    fn note(&self, attempt: u64, diagnostic: Diagnostic) {
        let mut news = self.news();
        if news.failure.as_ref().is_none_or(|(of, _)| *of != attempt) {
            news.failure = Some((attempt, diagnostic));
        }
        self.publish(&news);
    }

    /// Lets those who only look or wait know.
    fn publish(&self, news: &News) {
        self.any.store(news.failure.is_some() || news.gone.is_some(), Ordering::Release);
        let gone = news.gone.is_some();
        self.gone.send_if_modified(|was| std::mem::replace(was, gone) != gone);
    }

    fn why_gone(&self) -> String {
        self.news().gone.clone().unwrap_or_default()
    }

    /// What a lost call means for the step that it was made for.
    fn lost(&self, why: &str, step: &str) -> Diagnostic {
        if self.news().closed {
            let text = format!("process 0 has left the run; it does not come to `{step}`");
            return Diagnostic::error("E0604", text);
        }
        let text = format!("process 0 ({}) was lost at `{step}`: {why}", self.authority);
        Diagnostic::error("E0604", text).hint("look at the log of process 0 first")
    }

    /// A call that is made again while nothing of it can have been sent.
    async fn insist<T: DeserializeOwned>(
        &self,
        path: &str,
        bytes: Vec<u8>,
        limit: Duration,
    ) -> Result<T, Trouble> {
        let start = Instant::now();
        loop {
            let left = limit.saturating_sub(start.elapsed());
            match self.call(path, bytes.clone(), left).await {
                Err(Trouble::Unreachable(_)) if left > PAUSE && !self.news().closed => {
                    tokio::time::sleep(PAUSE).await;
                }
                outcome => return outcome,
            }
        }
    }

    async fn call<T: DeserializeOwned>(
        &self,
        path: &str,
        bytes: Vec<u8>,
        limit: Duration,
    ) -> Result<T, Trouble> {
        let uri = format!("http://{}/v1/{path}", self.authority);
        let request = Request::post(uri)
            .header("content-type", "application/json")
            .body(Body::from(bytes))
            .map_err(|e| Trouble::Unreachable(e.to_string()))?;
        let answered = async {
            let response =
                self.http.request(request).await.map_err(|e| match e.is_connect() {
                    true => Trouble::Unreachable(root(&e)),
                    false => Trouble::Lost(root(&e)),
                })?;
            let status = response.status();
            let body =
                axum::body::to_bytes(Body::new(response.into_body()), LONGEST_ANSWER).await;
            let body = body.map_err(|e| Trouble::Lost(root(&e)))?;
            match serde_json::from_slice::<Answer<T>>(&body) {
                Ok(Answer { is: Outcome::Ok(is), .. }) => Ok(is),
                Ok(Answer { is: Outcome::Error(told), .. }) => Err(Trouble::Told(told.into())),
                Err(_) => Err(Trouble::Lost(format!(
                    "what answers there is no kernelcast ({status})"
                ))),
            }
        };
        match tokio::time::timeout(limit, answered).await {
            Ok(outcome) => outcome,
            Err(_) => Err(Trouble::Lost(format!("no answer within {}", seconds(limit)))),
        }
    }

    fn encode<T: Serialize>(&self, body: &T) -> Vec<u8> {
        serde_json::to_vec(&Call { head: &self.head, body }).expect("messages are plain JSON")
    }

    fn news(&self) -> MutexGuard<'_, News> {
        self.news.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The innermost reason of an error: the system's own words.
fn root(error: &dyn std::error::Error) -> String {
    let mut inner = error;
    while let Some(source) = inner.source() {
        inner = source;
    }
    inner.to_string()
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn fault(step: &str) -> Diagnostic {
    Diagnostic::error(
        "E0604",
        format!("the thread of the rendezvous did not answer at `{step}`"),
    )
}

/// A number that no other process has: the hasher's keys are random.
fn instance() -> String {
    use std::hash::{BuildHasher, Hasher, RandomState};
    let random = || RandomState::new().build_hasher().finish();
    format!("{:016x}{:016x}", random(), random())
}
