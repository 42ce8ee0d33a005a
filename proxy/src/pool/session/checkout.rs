//! Getting a backend: one that is idle, one that others give back, or a new one; and bringing it to where the client left
//! its last one.

use tokio::time::{Instant, sleep_until};

use super::Session;
use crate::backend::{StartError, relayed_error};
use crate::branch::{Doing, Standing};
use crate::errors::Said;
use crate::hibernate::{self, ReplayError};
use crate::pool::reset::{RESET, ask, note, query, reset};
use crate::pool::{Grant, Pooled, Slot, Waiting};
use crate::session::{End, GaugeGuard, Hold, RETRY_AFTER, StartFailed, parameter_status};
use crate::waits::{Stage, Wait};
use crate::wire::error_field;

impl Session {
    /// Gets a backend that is as the client left its last one; or none, if the client does not want one any more.
    pub(super) async fn check_out(&mut self) -> Result<Option<Box<Pooled>>, End> {
        let mut wait = None;
        let result = self.check_out_after(&mut wait).await;
        if let Some(wait) = wait {
            wait.over(self.client.shared.config.slow_wake, result.is_ok());
        }
        result
    }

    /// The same; `wait` is there once it had to wait for its compute.
    async fn check_out_after(&mut self, wait: &mut Option<Wait>) -> Result<Option<Box<Pooled>>, End> {
        let mut hold = Hold::begin(self.client.shared.config.wake_budget);
        // What Postgres said when it did not take one more connection.
        let mut refused = None;
        loop {
            self.client.obey()?;
            if self.client.seat.is_called_off() {
                return Ok(None);
            }
            if self.client.branch.begin_work(self.client.conn()) {
                if let Some(backend) = self.try_check_out(&mut hold, &mut refused, wait).await? {
                    return Ok(Some(backend));
                }
                self.client.branch.stand(self.client.conn(), Standing::Apart);
                if self.client.seat.is_called_off() {
                    return Ok(None);
                }
            }
            self.client.seat.set_doing(Doing::Waiting);
            wait.get_or_insert_with(Wait::begin).enter(Stage::Gate);
            if self.client.hold_at_gate(RETRY_AFTER, &mut hold).await? {
                return Err(match refused {
                    Some(words) => End::Pass(relayed_error(&words)),
                    None => End::Say(self.client.held_too_long(&hold)),
                });
            }
        }
    }

    /// One try. A fence that comes up meanwhile calls it off, as does the client.
    async fn try_check_out(
        &mut self,
        hold: &mut Hold,
        refused: &mut Option<Vec<u8>>,
        wait: &mut Option<Wait>,
    ) -> Result<Option<Box<Pooled>>, End> {
        loop {
            let grant = match self.pool.ask(self.client.conn(), &self.pool_key) {
                Ok(grant) => grant,
                Err(waiting) => match self.queue(waiting, hold.begun).await? {
                    Some(grant) => grant,
                    None => return Ok(None),
                },
            };
            let mut backend = match grant {
                // The next one may be alive.
                Grant::Backend(backend) if !backend.is_alive() => continue,
                Grant::Backend(backend) => backend,
                Grant::Slot(slot) => {
                    let wait = wait.get_or_insert_with(Wait::begin).clone();
                    match self.start(slot, hold, refused, wait).await? {
                        Some(backend) => backend,
                        None => return Ok(None),
                    }
                }
            };
            if self.dress_up(&mut backend).await? {
                self.client.seat.set_backend(backend.generation, Some(backend.cancel_target()));
                return Ok(Some(backend));
            }
        }
    }

    /// Stands in the queue. Nothing if a fence came up, or the client wants no backend any more.
    async fn queue(&mut self, mut waiting: Waiting, begun: Instant) -> Result<Option<Grant>, End> {
        self.client.seat.set_doing(Doing::Waiting);
        let _gauge = GaugeGuard::new("ebb_proxy_pool_waiting");
        let seat = self.client.seat.clone();
        let since = Instant::now();
        let deadline = begun + self.client.shared.config.pool_wait;
        let result = loop {
            tokio::select! {
                grant = waiting.granted() => break Ok(Some(grant)),
                () = seat.attention() => {
                    if let Err(end) = self.client.obey() {
                        break Err(end);
                    }
                    if seat.is_called_off() || self.client.is_shut_out() {
                        break Ok(None);
                    }
                }
                () = sleep_until(deadline) => {
                    metrics::counter!("ebb_proxy_pool_timeouts_total").increment(1);
                    break Err(End::Say(Said::pool_exhausted(self.pool.size(), self.client.shared.config.pool_wait)));
                }
            }
        };
        metrics::histogram!("ebb_proxy_pool_wait_seconds").record(since.elapsed().as_secs_f64());
        if !matches!(result, Ok(Some(_)))
            && let Some(Grant::Backend(backend)) = waiting.withdraw()
        {
            self.let_go(backend).await;
        }
        result
    }

    /// Starts a backend, waking the compute if need be.
    async fn start(
        &mut self,
        slot: Slot,
        hold: &mut Hold,
        refused: &mut Option<Vec<u8>>,
        wait: Wait,
    ) -> Result<Option<Box<Pooled>>, End> {
        self.client.seat.set_doing(Doing::Waiting);
        let failed = match self.client.hold(self.client.start(&wait), hold).await? {
            Some(Ok((awake, backend))) => {
                let (key, application) = (self.pool_key.clone(), self.application.clone());
                let backend = Pooled::new(awake, backend, key, application, slot, self.client.conn());
                return Ok(self.measure(Box::new(backend)).await);
            }
            Some(Err(failed)) => failed,
            None => return Ok(None),
        };
        // Others have taken its connections; some may be free again soon.
        if let StartFailed::Start { error: StartError::Refused(body), .. } = &failed
            && error_field(body, b'C') == Some(b"53300")
        {
            *refused = Some(body.clone());
            return Ok(None);
        }
        let generation = failed.unreachable(&self.client.seat.sitter.role)?;
        self.client.branch.forget(generation);
        self.pool.lost(generation);
        Ok(None)
    }

    /// Learns from the first backend how many there may be.
    async fn measure(&self, mut backend: Box<Pooled>) -> Option<Box<Pooled>> {
        if self.pool.wants_size() {
            let mut connections_max = None;
            ask(&mut backend, "SHOW max_connections", |row| {
                connections_max = std::str::from_utf8(row).ok().and_then(|text| text.parse().ok());
            })
            .await?;
            self.pool.learn(connections_max?);
        }
        Some(backend)
    }

    /// Brings a backend to where the client left its last one; answers whether it is of use.
    async fn dress_up(&mut self, backend: &mut Pooled) -> Result<bool, End> {
        let own = backend.last == self.client.conn();
        if own && backend.dress == self.kept && backend.named == self.application {
            backend.exchange.begin(true, 0);
            return Ok(true);
        }
        if backend.dress.is_none() && self.kept.is_none() {
            let mut sql = String::new();
            if !own && backend.last != 0 {
                sql.push_str(RESET);
                backend.named.clone_from(&backend.application);
            }
            if backend.named != self.application {
                self.rename(&mut sql);
            }
            if !sql.is_empty() {
                query(&mut backend.out, &sql);
            }
            backend.exchange.begin(own, usize::from(!sql.is_empty()));
        } else {
            if !(own && backend.dress.is_none()) && reset(backend).await.is_none() {
                return Ok(false);
            }
            if backend.named != self.application {
                let mut sql = String::new();
                self.rename(&mut sql);
                if ask(backend, &sql, |_| {}).await.is_none() {
                    return Ok(false);
                }
            }
            if let Some(kept) = self.kept.clone() {
                match hibernate::replay(&mut backend.stream, &kept).await {
                    Ok(replayed) => {
                        for (name, value) in replayed.parameters {
                            note(&mut backend.parameters, &name, &value);
                        }
                        let mut out = Vec::new();
                        for (name, why) in replayed.lost_statements {
                            Said::statement_not_replayed(&name, &why).encode(&mut out);
                        }
                        self.client.send(&out).await?;
                    }
                    Err(ReplayError::Lost) => return Ok(false),
                    Err(ReplayError::Refused(why)) => return Err(End::Say(Said::not_replayed(&why))),
                }
                backend.dress = Some(kept);
            }
            backend.exchange.begin(false, 0);
        }
        backend.last = self.client.conn();
        backend.named.clone_from(&self.application);
        self.tell_parameters(backend).await?;
        Ok(true)
    }

    /// Tells the client what is otherwise than it believes.
    async fn tell_parameters(&mut self, backend: &Pooled) -> Result<(), End> {
        let mut out = Vec::new();
        // Before the greeting the client believes nothing yet.
        let told = !self.client.conversation.parameters().is_empty();
        for (name, value) in backend.parameters.iter().filter(|(name, _)| told && **name != *b"application_name") {
            if self.client.conversation.note_parameter(name, value) {
                parameter_status(&mut out, name, value);
            }
        }
        self.client.send(&out).await
    }

    fn rename(&self, sql: &mut String) {
        // Doubled quotes are right in either kind of string; backslashes are not.
        let name = String::from_utf8_lossy(&self.application).replace('\\', "?").replace('\'', "''");
        if !sql.is_empty() {
            sql.push_str("; ");
        }
        sql.push_str(&format!("SET application_name = '{name}'"));
    }
}
