//! The task that owns the unit: it alone starts, stops and seals; everyone else asks it.

use std::collections::VecDeque;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use ebb_storage::layer::{LazyLayers, Origin};
use ebb_storage::volume::{Mount, MountOptions, Sealed, Volume, VolumeDirs};
use ebb_types::{LayerId, Lsn};
use nix::sys::signal::Signal;
use nix::unistd::geteuid;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::isolation::House;
use super::postmaster::{Event, Plan, Postmaster};
use super::roles::Roles;
use super::server::{self, Ask};
use super::{Config, RunDir, durability};
use crate::clock::Stages;
use crate::control::{Durability, Reply, Request, Status};
use crate::error::{Error, OsContext, Result, chain};
use crate::manager::{ArchiveSpec, UnitSpec};
use crate::shipper::{self, Shipper};
use crate::user::RunAs;
use crate::{files, long_path};

/// How old what is published may be if the unit is killed: whoever logs in while it lives asks for a look
/// ([`Request::PublishRoles`]). A look costs Postgres well below a millisecond.
const ROLES_EVERY: Duration = Duration::from_secs(1);

/// LIMIT: the shipper gives up by itself before that.
const SHIPPER_DEADLINE: Duration = Duration::from_secs(10);

/// Whoever the wake was for goes first: a session of the unit's own would take processor time from theirs.
const ROLES_AFTER_READY: Duration = Duration::from_millis(100);

/// LIMIT: a fast shutdown writes out at most shared_buffers; whoever takes longer is stopped at once, and recovers.
const FAST_SHUTDOWN_DEADLINE: Duration = Duration::from_secs(60);

/// LIMIT: an immediate shutdown writes nothing; after this it is killed, which comes to the same.
const IMMEDIATE_SHUTDOWN_DEADLINE: Duration = Duration::from_secs(5);

/// LIMIT: a server that crashes more often than this within [`RESTARTS_WITHIN`] will go on doing so: a person must look.
const RESTARTS_MAX: usize = 5;

/// See [`RESTARTS_MAX`].
const RESTARTS_WITHIN: Duration = Duration::from_secs(60);

/// The wait before a second restart in a row; doubled for each further one.
const BACKOFF: Duration = Duration::from_millis(100);

/// LIMIT: a reply is a few hundred bytes to a local peer.
const FAREWELL_DEADLINE: Duration = Duration::from_secs(1);

/// What is read until so long after Postgres is ready counts as read by the wake.
const FIRST_ROWS: Duration = Duration::from_secs(1);

/// LIMIT: while as many backends wait for pages from the bucket, others can still read what is here.
const LAZY_THREADS: usize = 16;

/// What others may see of the unit at any time.
#[derive(Debug)]
struct View {
    ready: bool,
    ever_ready: bool,
    postmaster_pid: Option<u32>,
    wal_end: Option<Lsn>,
    restarts: u32,
    stages: Stages,
    /// Fetches what is missing of the volume's layers.
    source: Option<Arc<LazyLayers>>,
}

type SharedView = Arc<Mutex<View>>;

fn look(view: &SharedView) -> MutexGuard<'_, View> {
    view.lock().unwrap_or_else(PoisonError::into_inner)
}

impl View {
    /// Notes the end of a stage of the first start; what a restart takes is in the log.
    fn stage(&mut self, stage: &str) {
        if !self.ever_ready {
            self.stages.end(stage);
        }
    }

    fn status(&self, dirty: bool) -> Status {
        Status {
            ready: self.ready,
            postmaster_pid: self.postmaster_pid,
            wal_end: self.wal_end,
            dirty,
            restarts: self.restarts,
            stages: self.stages.ended(),
            fetched: self.source.as_ref().map(|source| source.fetched()).unwrap_or_default(),
            shipping: None,
        }
    }
}

/// An open, mounted volume.
#[derive(Debug)]
struct Mounted {
    volume: Arc<Volume>,
    mount: Mount,
}

impl Mounted {
    /// Unmounts and closes the volume, so that it can be opened again.
    fn close(self) -> Result<()> {
        Ok(self.mount.unmount()?)
    }
}

/// The unit.
#[derive(Debug)]
pub(super) struct Owner {
    dirs: VolumeDirs,
    house: Arc<House>,
    plan: Plan,
    view: SharedView,
    roles: Roles,
    config: Config,
    run_dir: RunDir,
    archive: Option<ArchiveSpec>,
    /// Ships WAL from the first time on that Postgres is ready.
    shipper: Option<Shipper>,
    /// Whether what is missing of layers is fetched in the background.
    hydrate: bool,
    /// When Postgres was restarted lately, oldest first.
    restarted: VecDeque<Instant>,
    /// Completing layers. They hold the volume open: wait for them before it is closed.
    finishing: TaskTracker,
    events: mpsc::Receiver<Event>,
    events_sender: mpsc::Sender<Event>,
}

/// What the owner does next.
#[derive(Debug)]
enum Action {
    Event(Event),
    Ask(Ask),
    LookAtRoles,
    ShipperEnded(shipper::End),
    Terminate,
}

impl Owner {
    /// Owns a unit that is isolated and has nothing open yet.
    pub fn new(
        spec: UnitSpec,
        dirs: VolumeDirs,
        house: House,
        plan: Plan,
        config: Config,
        run_dir: RunDir,
        stages: Stages,
    ) -> Self {
        // LIMIT: two events for each run of Postgres, and one run at a time.
        let (events_sender, events) = mpsc::channel(4);
        let roles = Roles::new(dirs.branch.join(files::ROLES), house.run(), spec.initial_roles, spec.fork);
        let view = View {
            ready: false,
            ever_ready: false,
            postmaster_pid: None,
            wal_end: None,
            restarts: 0,
            stages,
            source: dirs.source.clone(),
        };
        Self {
            dirs,
            house: Arc::new(house),
            plan,
            view: Arc::new(Mutex::new(view)),
            roles,
            config,
            run_dir,
            archive: spec.archive,
            shipper: None,
            hydrate: spec.hydrate,
            restarted: VecDeque::new(),
            finishing: TaskTracker::new(),
            events,
            events_sender,
        }
    }

    /// Starts Postgres and serves until the unit is stopped.
    pub fn run(self) -> Result<ExitCode> {
        let mounted = mount(&self.dirs, &self.house, self.plan.user, &self.view)?;
        let postmaster = self.start_postgres()?;
        // Postgres is on its way: everything from here on is done while it comes up.
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().on("start", "the unit's runtime")?;
        let branch_dir = self.dirs.branch.clone();
        let end = runtime.block_on(self.serve(mounted, postmaster));
        for name in [files::CONTROL, files::PID, files::SOCKET, files::SOCKET_LOCK] {
            let _ = std::fs::remove_file(branch_dir.join(name));
        }
        end.map(|()| ExitCode::SUCCESS)
    }

    fn start_postgres(&self) -> Result<Postmaster> {
        let (view, events) = (self.view.clone(), &self.events_sender);
        self.run_dir.open()?;
        let run_dir = self.run_dir.clone();
        let on_ready = move || {
            if let Err(error) = run_dir.close() {
                tracing::error!(error = chain(&error), "the socket's directory cannot be taken back");
            }
            let status = {
                let mut view = look(&view);
                view.ready = true;
                if view.ever_ready {
                    return;
                }
                view.stage("ready");
                view.ever_ready = true;
                view.status(true)
            };
            super::say_ready(&status);
        };
        let postmaster = Postmaster::spawn(&self.plan, events, on_ready)?;
        let mut view = look(&self.view);
        view.postmaster_pid = self.house.host_pid_of(postmaster.pid());
        view.stage("started");
        tracing::info!(pid = postmaster.pid(), "postgres started");
        Ok(postmaster)
    }

    async fn serve(mut self, mounted: Mounted, postmaster: Postmaster) -> Result<()> {
        let path = self.dirs.branch.join(files::CONTROL);
        let listener = long_path::listen(&path).on("listen at", &path)?;
        let (asks_sender, mut asks) = mpsc::channel(1);
        let (closing, connections) = (CancellationToken::new(), TaskTracker::new());
        let accepting = tokio::spawn(server::serve(listener, asks_sender, closing.clone(), connections.clone()));

        let ended = self.serve_until_end(mounted, postmaster, &mut asks).await;
        // Order: no new requests, then every reply goes out, then the process may end.
        closing.cancel();
        drop(asks);
        let _ = accepting.await;
        connections.close();
        let _ = timeout(FAREWELL_DEADLINE, connections.wait()).await;
        ended
    }

    async fn serve_until_end(
        &mut self,
        mounted: Mounted,
        postmaster: Postmaster,
        asks: &mut mpsc::Receiver<Ask>,
    ) -> Result<()> {
        let mut terminate = signal(SignalKind::terminate()).on("listen for", "SIGTERM")?;
        let mut look_at_roles = interval(ROLES_EVERY);
        look_at_roles.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut mounted, mut postmaster) = (mounted, postmaster);
        loop {
            let ready = look(&self.view).ready;
            let action = tokio::select! {
                biased;
                Some(event) = self.events.recv() => Action::Event(event),
                Some(ask) = asks.recv() => Action::Ask(ask),
                _ = terminate.recv() => Action::Terminate,
                _ = look_at_roles.tick(), if ready => Action::LookAtRoles,
                end = ended(&mut self.shipper) => Action::ShipperEnded(end),
            };
            match action {
                Action::Event(Event::Ready) => {
                    tracing::info!("postgres is ready");
                    look_at_roles.reset_after(ROLES_AFTER_READY);
                    settle_down(&mounted.volume, self.hydrate);
                    self.ship(&mounted.volume);
                }
                Action::Event(Event::Exited(how)) => {
                    (mounted, postmaster) = self.recover(mounted, postmaster, how).await?;
                }
                Action::LookAtRoles => drop(self.look_at_roles().await),
                Action::Ask(Ask { request: Request::PublishRoles, reply }) => {
                    let published = self.look_at_roles().await;
                    let failed = || Reply::Failed { message: "postgres does not tell its roles now".to_owned() };
                    let _ = reply.send(if published { Reply::RolesPublished } else { failed() });
                }
                Action::Ask(Ask { request: Request::Status, reply }) => {
                    let volume = mounted.volume.clone();
                    let dirty = blocking(move || volume.is_dirty()).await;
                    let shipping = self.shipper.as_ref().map(Shipper::status);
                    let _ = reply.send(Reply::Status(Status { shipping, ..look(&self.view).status(dirty) }));
                }
                Action::Ask(Ask { request: Request::Seal { layer }, reply }) => {
                    // The layer carries roles.json: it must know the roles that are in the image.
                    self.look_at_roles().await;
                    let volume = mounted.volume.clone();
                    let sealed = blocking(move || volume.begin_seal(layer)).await;
                    let _ = reply.send(reply_to_seal(sealed.map_err(Error::from)));
                    self.finish_seals(&mounted, None);
                }
                Action::Ask(Ask { request: Request::Finish, reply }) => self.finish_seals(&mounted, Some(reply)),
                Action::Ask(Ask { request: Request::Stop { layer }, reply }) => {
                    let sealed = self.stop(mounted, postmaster, Some(layer)).await;
                    let _ = reply.send(reply_to_seal(sealed.map(|sealed| sealed.expect("a layer was asked for"))));
                    return Ok(());
                }
                Action::Ask(Ask { request: Request::Discard, reply }) => {
                    tracing::info!("discarded");
                    self.end_at_once(mounted, postmaster).await;
                    let _ = reply.send(Reply::Discarded);
                    return Ok(());
                }
                Action::Ask(Ask { request: Request::SetDurability { durability }, reply }) => {
                    self.set_durability(durability, &postmaster, reply);
                }
                Action::ShipperEnded(shipper::End::Stop(why)) => {
                    // INVARIANT (I9): a unit that was replaced acknowledges nothing more.
                    postmaster.signal(Signal::SIGKILL);
                    tracing::error!(why, "postgres is stopped at once");
                    self.end_at_once(mounted, postmaster).await;
                    return Err(Error::Stopped(why));
                }
                Action::ShipperEnded(end) => {
                    tracing::error!(?end, "the shipper ended by itself");
                    self.shipper = None;
                }
                Action::Terminate => {
                    // The machine shuts down, or someone ends this unit politely. What is in the upper stays there.
                    tracing::info!("terminated");
                    return self.stop(mounted, postmaster, None).await.map(drop);
                }
            }
        }
    }

    /// Starts to ship WAL, if it is to be shipped and is not yet.
    fn ship(&mut self, volume: &Volume) {
        let (Some(archive), Some(durability), None) = (&self.archive, self.config.shipped, &self.shipper) else {
            return;
        };
        let plan = shipper::Plan {
            bucket: Origin::At(archive.bucket.clone()),
            branch: archive.branch,
            line: archive.line,
            epoch: archive.epoch,
            socket_dir: self.house.run(),
            base_wal: Some(self.dirs.layers.join(volume.base().to_string()).join("wal")),
            delay: match durability {
                Durability::Local => ROLES_AFTER_READY,
                // The first commit waits for it.
                Durability::Bucket => Duration::ZERO,
            },
        };
        self.shipper = Some(Shipper::start(plan, durability));
    }

    /// Configures Postgres for another durability, and answers when it goes by it.
    fn set_durability(&mut self, durability: Durability, postmaster: &Postmaster, reply: oneshot::Sender<Reply>) {
        let failed = |message: String| Reply::Failed { message };
        let Some(shipped) = &mut self.config.shipped else {
            let _ = reply.send(failed("the WAL of this branch is not shipped to a bucket".to_owned()));
            return;
        };
        let before = std::mem::replace(shipped, durability);
        if let Err(error) = self.config.write() {
            self.config.shipped = Some(before);
            let _ = reply.send(failed(chain(&error)));
            return;
        }
        postmaster.signal(Signal::SIGHUP);
        if let Some(shipper) = &self.shipper {
            shipper.set_durability(durability);
        }
        let socket_dir = self.house.run();
        // It ends by its own deadline, and touches nothing of the unit's.
        tokio::spawn(async move {
            let in_effect = durability::in_effect(&socket_dir, durability).await;
            let _ = reply.send(in_effect.map_or_else(|why| failed(why.to_owned()), |()| Reply::DurabilitySet));
        });
    }

    /// Ends Postgres and the mount at once, without sealing.
    async fn end_at_once(&mut self, mounted: Mounted, postmaster: Postmaster) {
        self.shipper = None;
        postmaster.signal(Signal::SIGKILL);
        self.await_exit(&postmaster, None).await;
        self.seals_are_finished().await;
        blocking(move || {
            postmaster.bury();
            drop(mounted);
        })
        .await;
    }

    /// Completes the layers of all seals so far, and tells whoever asked.
    fn finish_seals(&self, mounted: &Mounted, asked: Option<oneshot::Sender<Reply>>) {
        let volume = mounted.volume.clone();
        self.finishing.spawn(async move {
            let finished = blocking(move || volume.finish_seals()).await.map_err(|error| chain(&error));
            if let Err(error) = &finished {
                tracing::warn!(error, "a layer was not completed; the next seal tries again");
            }
            let reply = finished.map_or_else(|message| Reply::Failed { message }, |()| Reply::Finished);
            if let Some(asked) = asked {
                // Whoever asked may be gone.
                let _ = asked.send(reply);
            }
        });
    }

    /// Waits until nobody is busy completing layers.
    async fn seals_are_finished(&self) {
        self.finishing.close();
        self.finishing.wait().await;
        self.finishing.reopen();
    }

    /// Publishes roles, if Postgres answers; a failure is worth a line, and the next look tries again. Answers whether it
    /// did.
    async fn look_at_roles(&mut self) -> bool {
        if !look(&self.view).ready {
            return false;
        }
        match self.roles.publish().await {
            Ok(Some(wal_end)) => {
                look(&self.view).wal_end = Some(wal_end);
                if let Some(shipper) = &self.shipper {
                    shipper.saw(wal_end);
                }
            }
            Ok(None) => {}
            Err(error) => {
                tracing::warn!(error = chain(&error), "roles were not published");
                return false;
            }
        }
        true
    }

    /// Stops Postgres, unmounts, and seals into `layer` if there is one. Postgres waits for the shipper, which sees to it
    /// that this does not take long; what it could not ship it finds at the next wake.
    async fn stop(
        &mut self,
        mounted: Mounted,
        postmaster: Postmaster,
        layer: Option<LayerId>,
    ) -> Result<Option<Sealed>> {
        self.look_at_roles().await;
        self.roles.close();
        look(&self.view).ready = false;
        let mut shipper = self.shipper.take();
        if let Some(shipper) = &shipper {
            shipper.drain();
        }
        postmaster.signal(Signal::SIGINT);
        if !self.await_exit(&postmaster, Some(FAST_SHUTDOWN_DEADLINE)).await {
            tracing::warn!("postgres did not shut down in time and is stopped at once");
            postmaster.signal(Signal::SIGQUIT);
            if !self.await_exit(&postmaster, Some(IMMEDIATE_SHUTDOWN_DEADLINE)).await {
                postmaster.signal(Signal::SIGKILL);
                self.await_exit(&postmaster, None).await;
            }
        }
        look(&self.view).postmaster_pid = None;
        self.seals_are_finished().await;
        let sealed = blocking(move || {
            postmaster.bury();
            mounted.mount.unmount()?;
            let sealed = layer.map(|layer| mounted.volume.seal(layer)).transpose()?;
            if sealed.is_some() {
                // After this the layer is uploaded, and its boot set with it.
                mounted.volume.write_boot_set().unwrap_or_else(|error| {
                    tracing::warn!(error = chain(&error), "no boot set was written");
                });
            }
            Ok(sealed)
        })
        .await;
        if let Some(shipper) = &mut shipper {
            match timeout(SHIPPER_DEADLINE, shipper.ended()).await {
                Ok(shipper::End::Drained) => tracing::info!("all WAL is in the bucket"),
                Ok(shipper::End::Stop(why)) => return Err(Error::Stopped(why)),
                Ok(shipper::End::GaveUp) | Err(_) => {
                    tracing::warn!("the newest WAL is on this node only; it is shipped at the next wake");
                }
            }
        }
        sealed
    }

    /// Waits for the postmaster's end; `false` if it took longer than allowed.
    async fn await_exit(&mut self, postmaster: &Postmaster, deadline: Option<Duration>) -> bool {
        let exited = async {
            while let Some(event) = self.events.recv().await {
                if let Event::Exited(how) = event {
                    tracing::info!(pid = postmaster.pid(), how, "postgres ended");
                    return;
                }
            }
        };
        match deadline {
            Some(deadline) => timeout(deadline, exited).await.is_ok(),
            None => {
                exited.await;
                true
            }
        }
    }

    /// Starts Postgres again after it ended by itself, on a freshly opened volume.
    async fn recover(
        &mut self,
        mounted: Mounted,
        postmaster: Postmaster,
        how: String,
    ) -> Result<(Mounted, Postmaster)> {
        let ever_ready = {
            let mut view = look(&self.view);
            view.ready = false;
            view.postmaster_pid = None;
            view.ever_ready
        };
        self.roles.close();
        self.seals_are_finished().await;
        let (complaint, unmounted) = blocking(move || (postmaster.bury(), mounted.close())).await;
        let why = complaint.map_or_else(|| format!("it {how}"), |complaint| format!("{complaint} (it {how})"));
        tracing::error!(how, why, "postgres ended by itself");
        unmounted?;
        let log = self.plan.log.clone();
        if !ever_ready {
            return Err(Error::Start { why, log });
        }
        let now = Instant::now();
        self.restarted.retain(|restarted| now.duration_since(*restarted) < RESTARTS_WITHIN);
        if self.restarted.len() >= RESTARTS_MAX {
            let why = format!("it ended {} times within a minute, the last time with: {why}", RESTARTS_MAX + 1);
            return Err(Error::Start { why, log });
        }
        if let Some(doubled) = self.restarted.len().checked_sub(1) {
            sleep(BACKOFF * 2_u32.pow(doubled as u32)).await;
        }
        self.restarted.push_back(Instant::now());
        look(&self.view).restarts += 1;
        let (dirs, house, user, view) = (self.dirs.clone(), self.house.clone(), self.plan.user, self.view.clone());
        let mounted = blocking(move || mount(&dirs, &house, user, &view)).await?;
        let postmaster = self.start_postgres()?;
        Ok((mounted, postmaster))
    }
}

/// Waits for the shipper's end, for ever if there is none.
async fn ended(shipper: &mut Option<Shipper>) -> shipper::End {
    match shipper {
        Some(shipper) => shipper.ended().await,
        None => std::future::pending().await,
    }
}

fn mount(dirs: &VolumeDirs, house: &House, user: RunAs, view: &SharedView) -> Result<Mounted> {
    let volume = Volume::open(dirs)?;
    look(view).stage("opened");
    let options = MountOptions {
        uid: user.uid,
        gid: user.gid,
        allow_other: geteuid().is_root(),
        threads: match volume.reads_lazily() {
            true => LAZY_THREADS,
            // LIMIT: FUSE threads mostly wait; two let a read pass a sync, more than four bring nothing.
            false => thread::available_parallelism().map_or(2, usize::from).clamp(2, 4),
        },
    };
    let mount = volume.mount(&house.data(), &options)?;
    look(view).stage("mounted");
    Ok(Mounted { volume, mount })
}

/// What is left to do once whoever the wake was for has had their first rows.
fn settle_down(volume: &Arc<Volume>, hydrate: bool) {
    // A volume that is closed meanwhile must not be kept open by this.
    let volume = Arc::downgrade(volume);
    tokio::spawn(async move {
        sleep(FIRST_ROWS).await;
        let Some(volume) = volume.upgrade() else { return };
        volume.booted();
        if hydrate && let Err(error) = volume.hydrate() {
            tracing::warn!(error = chain(&error), "layers are not filled in the background");
        }
    });
}

fn reply_to_seal(sealed: Result<Sealed>) -> Reply {
    match sealed {
        Ok(Sealed { layer, new, end }) => Reply::Sealed { layer, new, end },
        Err(error) => Reply::Failed { message: chain(&error) },
    }
}

/// Runs what blocks on a thread for it.
async fn blocking<T: Send + 'static>(act: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(act).await {
        Ok(done) => done,
        Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
    }
}
