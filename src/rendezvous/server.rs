//! The HTTP server of process 0: holds each call until the hall has its answer, and notices
//! processes that die. Runs on a thread of its own.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, ToSocketAddrs};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Bytes, HttpBody};
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::StatusCode;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::serve::ListenerExt;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::watch;

use super::hall::Hall;
use super::wire::{
    Again, Body, Done, Exchange, Fail, GRACE, HELD, Head, Heard, Join, LIMIT, Leave, Outcome,
    PATIENCE, Renewed, SCHEMA, Told, VERSION, Watch, answer,
};
use super::words::place;
use super::world::World;
use crate::diag::Diagnostic;

/// How long the last answers may take once the server stops.
const DRAIN: Duration = Duration::from_secs(1);

/// The server of process 0. Ends when it is dropped, and whoever waits in it hears of that.
pub struct Server {
    port: u16,
    hall: Arc<Hall>,
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

/// Opens the hall to the other processes of the world, at its port; port 0 takes any.
///
/// # Errors
/// E0610 if the port cannot be listened on.
pub fn serve(hall: Arc<Hall>, world: &World) -> Result<Server, Diagnostic> {
    let ip = interface(&world.address);
    let refused = |e: &std::io::Error| {
        let text = format!("process 0 cannot listen on {ip}, port {}: {e}", world.port);
        Diagnostic::error("E0610", text).hint(
            "another run, or another process with number 0, may have the port; KERNELCAST_PORT \
             names another one for all processes",
        )
    };
    let listener = TcpListener::bind((ip, world.port)).map_err(|e| refused(&e))?;
    listener.set_nonblocking(true).map_err(|e| refused(&e))?;
    let port = listener.local_addr().map_err(|e| refused(&e))?.port();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|e| refused(&e))?;

    hall.place(0, place());
    let (stop, stopped) = watch::channel(false);
    let desk = Arc::new(Desk {
        hall: Arc::clone(&hall),
        token: world.token.clone(),
        guests: Mutex::new((0..hall.members()).map(|_| None).collect()),
    });
    let thread = std::thread::Builder::new()
        .name("rendezvous".into())
        .spawn(move || runtime.block_on(run(listener, desk, stopped)))
        .map_err(|e| refused(&e))?;
    Ok(Server { port, hall, stop, thread: Some(thread) })
}

impl Server {
    /// The port that it listens on.
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.hall.close("process 0 has left the run");
        let _ = self.stop.send(true);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The loopback interface if that is where process 0 is said to be, else all: a host's own name
/// often leads to its loopback in its own tables.
fn interface(address: &str) -> IpAddr {
    let local = address.eq_ignore_ascii_case("localhost");
    match address.parse::<IpAddr>() {
        Ok(ip) if ip.is_loopback() => ip,
        Ok(IpAddr::V6(_)) => Ipv6Addr::UNSPECIFIED.into(),
        Ok(IpAddr::V4(_)) => Ipv4Addr::UNSPECIFIED.into(),
        Err(_) if local => Ipv4Addr::LOCALHOST.into(),
        Err(_) => {
            let found = (address, 0).to_socket_addrs().map(Vec::from_iter).unwrap_or_default();
            match found.iter().all(|a| a.is_ipv6()) && !found.is_empty() {
                true => Ipv6Addr::UNSPECIFIED.into(),
                false => Ipv4Addr::UNSPECIFIED.into(),
            }
        }
    }
}

/// What the calls share.
struct Desk {
    hall: Arc<Hall>,
    token: String,
    guests: Mutex<Vec<Option<Guest>>>,
}

/// A process that has joined.
struct Guest {
    instance: String,
    place: String,
    /// How many of its calls for news are held.
    listening: usize,
    /// When the last one ended, and how soon the next must come.
    heard: Instant,
    patience: Duration,
    left: bool,
    gone: bool,
}

async fn run(listener: TcpListener, desk: Arc<Desk>, stopped: watch::Receiver<bool>) {
    let Ok(listener) = tokio::net::TcpListener::from_std(listener) else { return };
    let listener = listener.tap_io(|stream| {
        let _ = stream.set_nodelay(true);
    });
    let routes = Router::new()
        .route("/v1/join", post(join))
        .route("/v1/exchange", post(exchange))
        .route("/v1/again", post(again))
        .route("/v1/fail", post(fail))
        .route("/v1/watch", post(news))
        .route("/v1/leave", post(leave))
        .layer(DefaultBodyLimit::max(LIMIT))
        .layer(axum::middleware::from_fn(bounded))
        .with_state(Arc::clone(&desk));
    let until = |mut stopped: watch::Receiver<bool>| async move {
        let _ = stopped.wait_for(|stop| *stop).await;
    };
    let served = axum::serve(listener, routes).with_graceful_shutdown(until(stopped.clone()));
    let drained = async {
        until(stopped).await;
        tokio::time::sleep(DRAIN).await;
    };
    tokio::select! {
        _ = served.into_future() => {}
        () = drained => {}
        () = look_after(&desk) => {}
    }
}

/// Notices processes whose calls for news have stopped: the system closes the connection of one
/// that dies, and one whose host vanished does not ask again.
async fn look_after(desk: &Desk) {
    loop {
        tokio::time::sleep(GRACE / 10).await;
        let mut gone = Vec::new();
        for (member, guest) in desk.guests().iter_mut().enumerate() {
            let Some(guest) = guest else { continue };
            let silent = guest.listening == 0 && guest.heard.elapsed() > guest.patience;
            if silent && !guest.left && !guest.gone {
                guest.gone = true;
                gone.push((member, format!("process {member} ({}) is gone", guest.place)));
            }
        }
        for (member, why) in gone {
            desk.hall.away(member, why, true);
        }
    }
}

/// What a handler gives: a status and one JSON object.
type Reply = (StatusCode, Bytes);

/// Refuses a call that says itself that it is over the limit, before it is read.
async fn bounded(call: Request, next: Next) -> Response {
    match call.body().size_hint().lower() > LIMIT as u64 {
        true => over_limit().into_response(),
        false => next.run(call).await,
    }
}

async fn join(State(desk): State<Arc<Desk>>, call: Result<Bytes, BytesRejection>) -> Reply {
    let asked = desk.head(&call).and_then(|head| Ok((head, body::<Join>(&call)?)));
    let (head, Join { place }) = match asked {
        Ok(asked) => asked,
        Err(refused) => return refused,
    };
    let Head { member, instance, .. } = head;
    let mut guests = desk.guests();
    match &guests[member] {
        Some(guest) if guest.instance != instance && !guest.left => {
            let text = format!(
                "process {member} has joined already, from {}, and now one joins from {place}",
                guest.place
            );
            return refused(
                StatusCode::CONFLICT,
                &Diagnostic::error("E0610", text).hint(
                    "each process needs a number of its own; after a process died, restart all",
                ),
            );
        }
        _ => {}
    }
    desk.hall.place(member, place.clone());
    desk.hall.back(member);
    guests[member] = Some(Guest {
        instance,
        place,
        listening: 0,
        heard: Instant::now(),
        patience: PATIENCE,
        left: false,
        gone: false,
    });
    good(Done {})
}

async fn exchange(State(desk): State<Arc<Desk>>, call: Result<Bytes, BytesRejection>) -> Reply {
    let asked = desk.guest(&call).and_then(|member| Ok((member, body::<Exchange>(&call)?)));
    drop(call);
    let (member, Exchange { attempt, round, timeout_ms, payload }) = match asked {
        Ok(asked) => asked,
        Err(refused) => return refused,
    };
    let timeout = Duration::from_millis(timeout_ms);
    match desk.hall.exchange_held((member, attempt), &round, payload, timeout).await {
        Ok(complete) => {
            let body = complete.body.get_or_init(|| {
                #[derive(Serialize)]
                struct All<'a> {
                    payloads: &'a [serde_json::Value],
                }
                answer(Outcome::Ok(All { payloads: &complete.payloads }))
            });
            (StatusCode::OK, body.clone())
        }
        Err(failure) => failed(&failure),
    }
}

async fn again(State(desk): State<Arc<Desk>>, call: Result<Bytes, BytesRejection>) -> Reply {
    let asked = desk.guest(&call).and_then(|member| Ok((member, body::<Again>(&call)?)));
    let (member, Again { attempt, timeout_ms }) = match asked {
        Ok(asked) => asked,
        Err(refused) => return refused,
    };
    let timeout = Duration::from_millis(timeout_ms);
    match desk.hall.again_held((member, attempt), timeout).await {
        Ok(attempt) => good(Renewed { attempt }),
        Err(failure) => failed(&failure),
    }
}

async fn fail(State(desk): State<Arc<Desk>>, call: Result<Bytes, BytesRejection>) -> Reply {
    let asked = desk.guest(&call).and_then(|member| Ok((member, body::<Fail>(&call)?)));
    let (member, Fail { attempt, failure }) = match asked {
        Ok(asked) => asked,
        Err(refused) => return refused,
    };
    desk.hall.fail((member, attempt), &failure.into());
    good(Done {})
}

async fn news(State(desk): State<Arc<Desk>>, call: Result<Bytes, BytesRejection>) -> Reply {
    let asked = desk.guest(&call).and_then(|member| Ok((member, body::<Watch>(&call)?)));
    let (member, Watch { attempt, failed }) = match asked {
        Ok(asked) => asked,
        Err(refused) => return refused,
    };
    let mut listening = Listening::new(&desk, member);
    let news = desk.hall.news_held(member, (attempt, failed), HELD).await;
    listening.answered = true;
    good(Heard {
        attempt: news.attempt,
        failure: news.failure.as_ref().map(Told::from),
        closed: news.closed,
    })
}

async fn leave(State(desk): State<Arc<Desk>>, call: Result<Bytes, BytesRejection>) -> Reply {
    let asked = desk.guest(&call).and_then(|member| Ok((member, body::<Leave>(&call)?)));
    let (member, Leave {}) = match asked {
        Ok(asked) => asked,
        Err(refused) => return refused,
    };
    if let Some(guest) = &mut desk.guests()[member] {
        guest.left = true;
    }
    desk.hall.away(member, format!("process {member} has left the run"), false);
    good(Done {})
}

/// Counts a held call for news. When its process dies, the connection closes, the call is
/// dropped, and so is this.
struct Listening<'a> {
    desk: &'a Desk,
    member: usize,
    answered: bool,
}

impl<'a> Listening<'a> {
    fn new(desk: &'a Desk, member: usize) -> Self {
        let mut guests = desk.guests();
        if let Some(guest) = &mut guests[member] {
            guest.listening += 1;
            if std::mem::take(&mut guest.gone) {
                desk.hall.back(member);
            }
        }
        drop(guests);
        Listening { desk, member, answered: false }
    }
}

impl Drop for Listening<'_> {
    fn drop(&mut self) {
        if let Some(guest) = &mut self.desk.guests()[self.member] {
            guest.listening -= 1;
            guest.heard = Instant::now();
            guest.patience = if self.answered { PATIENCE } else { GRACE };
        }
    }
}

impl Desk {
    fn guests(&self) -> MutexGuard<'_, Vec<Option<Guest>>> {
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The call's head, if it is of this run.
    fn head(&self, call: &Result<Bytes, BytesRejection>) -> Result<Head, Reply> {
        let bytes = bytes(call)?;
        let schema = serde_json::from_slice::<Schema>(bytes).map(|s| s.schema);
        match schema {
            Ok(SCHEMA) => {}
            Ok(other) => {
                let text = format!("a process speaks schema {other}, process 0 {SCHEMA}");
                let told = Diagnostic::error("E0611", text)
                    .note(format!("process 0 runs kernelcast {VERSION}"));
                return Err(refused(StatusCode::BAD_REQUEST, &told));
            }
            Err(e) => return Err(senseless(&e)),
        }
        let head: Head = serde_json::from_slice(bytes).map_err(|e| senseless(&e))?;
        let Head { version, token, member, size, .. } = &head;
        let members = self.hall.members();
        if *token != self.token {
            let text = "process 0 belongs to another run: its token differs";
            return Err(refused(
                StatusCode::FORBIDDEN,
                &Diagnostic::error("E0610", text).hint(
                    "give this run another KERNELCAST_PORT, or, if it is one run, all of its \
                     processes the same KERNELCAST_TOKEN",
                ),
            ));
        }
        let differs = match version == VERSION {
            false => Some(Diagnostic::error(
                "E0611",
                format!("process {member} runs kernelcast {version}, process 0 {VERSION}"),
            )),
            true if *size != members => Some(Diagnostic::error(
                "E0610",
                format!(
                    "process {member} was started as one of {size}, process 0 as one of {members}"
                ),
            )),
            true if *member == 0 => {
                Some(Diagnostic::error("E0610", "two processes have number 0"))
            }
            true if *member >= members => Some(Diagnostic::error(
                "E0610",
                format!("there is no process {member} among {members}"),
            )),
            true => None,
        };
        differs.map_or(Ok(head), |d| Err(refused(StatusCode::CONFLICT, &d)))
    }

    /// The number of the process that calls, if it has joined.
    fn guest(&self, call: &Result<Bytes, BytesRejection>) -> Result<usize, Reply> {
        let head = self.head(call)?;
        match &self.guests()[head.member] {
            Some(guest) if guest.instance == head.instance => Ok(head.member),
            _ => {
                let text = format!("process {} has not joined this process 0", head.member);
                let told = Diagnostic::error("E0604", text)
                    .hint("process 0 was started anew: restart all processes of the run");
                Err(refused(StatusCode::CONFLICT, &told))
            }
        }
    }
}

/// The one field of which every version knows the meaning.
#[derive(serde::Deserialize)]
struct Schema {
    schema: u32,
}

fn bytes(call: &Result<Bytes, BytesRejection>) -> Result<&Bytes, Reply> {
    call.as_ref().map_err(|rejection| match rejection.status() {
        StatusCode::PAYLOAD_TOO_LARGE => over_limit(),
        status => {
            let text = format!("a call was cut short: {}", rejection.body_text());
            refused(status, &Diagnostic::error("E0502", text))
        }
    })
}

fn over_limit() -> Reply {
    let text = format!("a call has more than the {} MiB allowed", LIMIT >> 20);
    refused(StatusCode::PAYLOAD_TOO_LARGE, &Diagnostic::error("E0502", text))
}

fn body<T: DeserializeOwned>(call: &Result<Bytes, BytesRejection>) -> Result<T, Reply> {
    let body = serde_json::from_slice::<Body<T>>(bytes(call)?);
    body.map(|b| b.body).map_err(|e| senseless(&e))
}

fn senseless(error: &serde_json::Error) -> Reply {
    let text = format!("a call to process 0 makes no sense: {error}");
    refused(StatusCode::BAD_REQUEST, &Diagnostic::error("E0502", text))
}

fn good<T: Serialize>(body: T) -> Reply {
    (StatusCode::OK, answer(Outcome::Ok(body)))
}

/// The call was understood, but what it waits for has failed.
fn failed(failure: &Diagnostic) -> Reply {
    refused(StatusCode::CONFLICT, failure)
}

fn refused(status: StatusCode, diagnostic: &Diagnostic) -> Reply {
    (status, answer::<()>(Outcome::Error(diagnostic.into())))
}
