//! Taking messages from a RabbitMQ.

use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use backon::ExponentialBackoff;
use futures_util::stream::{SelectAll, once};
use futures_util::{Stream, StreamExt as _};
use lapin::options::{BasicCancelOptions, BasicConsumeOptions, BasicGetOptions, BasicQosOptions};
use lapin::types::{FieldTable, ShortString};
use lapin::{Channel, message};
use tokio::sync::watch;
use tokio::time::timeout;

use super::ack_batcher::Acks;
use super::delivery::{Delivery, Outward, REQUEUE};
use super::link::{self, Link, LinkError, OutageLog, RPC_TIMEOUT};
use super::publisher::Publisher;
use super::queue_monitor::Look;
use super::topology::Topology;
use super::unsettled::Unsettled;
use crate::{LinkStatus, backoff};

/// A consumer of the queue, on a connection of its own: a publishing connection that the broker has
/// blocked would hold back its acks too.
pub(crate) struct Consumer {
    name: String,
    prefetch: u16,
    publisher: Publisher,
    status: watch::Sender<LinkStatus>,
    session: Option<Session>,
    outage: OutageLog,
    waits: ExponentialBackoff,
    connected_at: Instant,
    /// Whether a session was given nothing although there was something, and none since has shown that
    /// it is better.
    in_vain: bool,
}

struct Session {
    // Before the connection, which it looks by.
    look: Look,
    connection: Arc<Link>,
    channel: Channel,
    /// Of one consumer or more, which together have the prefetch.
    deliveries: SelectAll<Events>,
    tags: Vec<ShortString>,
    prefetch: u16,
    outward: Arc<Outward>,
    status: watch::Sender<LinkStatus>,
    /// Whether the status says so.
    is_sound: bool,
}

/// What comes of one consumer of the channel.
enum Event {
    // Boxed, because it is much larger than the other.
    Delivery(lapin::Result<Box<message::Delivery>>),
    /// The consumer of this tag has ended, which among several would go unnoticed otherwise.
    Ended(ShortString),
}

type Events = Pin<Box<dyn Stream<Item = Event> + Send + Sync>>;

impl Consumer {
    pub(crate) fn new(name: &str, prefetch: u16, publisher: Publisher) -> Self {
        let (status, _) = watch::channel(Err("not connected yet".to_owned()));
        Self {
            name: name.to_owned(),
            prefetch,
            publisher,
            status,
            session: None,
            outage: OutageLog::default(),
            waits: backoff(),
            connected_at: Instant::now(),
            in_vain: false,
        }
    }

    pub(crate) fn status(&self) -> watch::Receiver<LinkStatus> {
        self.status.subscribe()
    }

    pub(crate) async fn next(&mut self) -> Delivery {
        loop {
            let reason = match &mut self.session {
                Some(session) => match session.next().await {
                    Ok(received) => return Delivery::new(received, Arc::clone(&session.outward)),
                    Err(reason) => reason,
                },
                None => match self.open().await {
                    Ok(session) => {
                        let session = self.session.insert(session);
                        self.connected_at = Instant::now();
                        self.outage.up(&self.name);
                        if !self.in_vain {
                            session.tell_that_it_is_sound();
                        }
                        continue;
                    }
                    Err(error) => error.to_string(),
                },
            };
            self.lose(reason);
            tokio::time::sleep(self.waits.next().unwrap_or(Duration::from_secs(1))).await;
        }
    }

    /// The broker takes back all that came by this session as soon as it is closed.
    fn lose(&mut self, reason: String) {
        if let Some(session) = self.session.take() {
            self.in_vain = session.look.is_in_vain() || !session.is_sound;
            if self.connected_at.elapsed() > Duration::from_secs(5) {
                self.waits = backoff();
            }
        }
        self.outage.down(&self.name, &reason);
        _ = self.status.send_replace(Err(reason));
    }

    pub(crate) async fn set_prefetch(&mut self, prefetch: u16) {
        self.prefetch = prefetch;
        let queue = self.publisher.topology().queue.clone();
        let Some(session) = &mut self.session else { return };
        match timeout(RPC_TIMEOUT, session.set_prefetch(queue, prefetch)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => self.lose(error.to_string()),
            Err(late) => self.lose(late.to_string()),
        }
    }

    pub(crate) async fn stop(&mut self) {
        let Some(session) = &mut self.session else { return };
        match timeout(RPC_TIMEOUT, session.give_back()).await {
            Ok(Ok(())) => {}
            // The session is broken, and with its end the broker takes everything back by itself.
            Ok(Err(error)) => tracing::debug!(%error, "cannot cancel the consumer"),
            Err(_) => tracing::debug!("the broker did not answer the cancel"),
        }
        _ = self.status.send_replace(Err("stopped".to_owned()));
    }

    pub(crate) async fn close(self) {
        let Some(session) = self.session else { return };
        let applied = session.have_acks_applied(&self.publisher.topology().queue);
        let in_doubt = match timeout(RPC_TIMEOUT, applied).await {
            Ok(applied) => applied.err().map(|error| error.to_string()),
            Err(late) => Some(late.to_string()),
        };
        if let Some(error) = in_doubt {
            tracing::warn!(
                error,
                "no word that the last acks are applied; their messages may come again"
            );
        }
        link::close(&session.connection).await;
    }

    async fn open(&self) -> Result<Session, LinkError> {
        let connection = link::connect(&self.publisher.config().access, &self.name).await?;
        let topology: &Topology = self.publisher.topology();
        timeout(RPC_TIMEOUT, topology.declare(&connection)).await??;
        let channel = timeout(RPC_TIMEOUT, connection.create_channel()).await?;
        let channel = channel.map_err(LinkError::OpenChannel)?;
        let consuming = consume(&channel, topology.queue.clone(), self.prefetch);
        let consumer = timeout(RPC_TIMEOUT, consuming).await?.map_err(LinkError::Consume)?;
        let connection = Arc::new(connection);
        let unsettled = Arc::new(Unsettled::default());
        let look = Look::start(
            &connection,
            topology.clone(),
            Arc::clone(&unsettled),
            Arc::clone(self.publisher.expiry()),
            self.prefetch,
        );
        let outward = Arc::new(Outward {
            publisher: self.publisher.clone(),
            acks: Acks::start(),
            unsettled,
            kept: OnceLock::new(),
        });
        let status = self.status.clone();
        Ok(Session {
            look,
            connection,
            channel,
            tags: vec![consumer.tag()],
            deliveries: SelectAll::from_iter([with_end(consumer)]),
            prefetch: self.prefetch,
            outward,
            status,
            is_sound: false,
        })
    }
}

/// Begins to take up to `prefetch` deliveries on `channel`, whatever is taken there already.
async fn consume(
    channel: &Channel,
    queue: ShortString,
    prefetch: u16,
) -> lapin::Result<lapin::Consumer> {
    channel.basic_qos(prefetch, BasicQosOptions::default()).await?;
    let options = BasicConsumeOptions::default();
    channel.basic_consume(queue, "".into(), options, FieldTable::default()).await
}

fn with_end(consumer: lapin::Consumer) -> Events {
    let tag = consumer.tag();
    Box::pin(
        consumer
            .map(|delivery| Event::Delivery(delivery.map(Box::new)))
            .chain(once(async { Event::Ended(tag) })),
    )
}

impl Session {
    // Decision: docs/decisions/0025-how-does-max-consumers-change-at-run-time.md
    /// RabbitMQ has no prefetch that changes: it is a consumer's from its beginning. So another one takes
    /// what is to be more. When it is to be less, another one takes the place of all of them.
    async fn set_prefetch(&mut self, queue: ShortString, prefetch: u16) -> lapin::Result<()> {
        let more = match prefetch.checked_sub(self.prefetch) {
            Some(0) => return Ok(()),
            Some(more) => more,
            None => {
                self.give_back().await?;
                prefetch
            }
        };
        let consumer = consume(&self.channel, queue, more).await?;
        self.tags.push(consumer.tag());
        self.deliveries.push(with_end(consumer));
        self.prefetch = prefetch;
        self.look.set_prefetch(prefetch);
        Ok(())
    }

    /// Takes no more, and gives back what was not handed out. What was can be settled all the same.
    async fn give_back(&mut self) -> lapin::Result<()> {
        // A tag is kept until it is cancelled, for this may be dropped midway and begun again; and what is not
        // cancelled would be given back and delivered again without end.
        while let Some(tag) = self.tags.last().cloned() {
            self.channel.basic_cancel(tag, BasicCancelOptions::default()).await?;
            self.tags.pop();
        }
        while let Some(event) = self.deliveries.next().await {
            if let Event::Delivery(delivery) = event {
                delivery?.nack(REQUEUE).await?;
            }
        }
        Ok(())
    }

    // Decision: docs/decisions/0035-how-are-acks-flushed-before-a-close.md
    /// Sees that every ack that was sent reaches the queue, also if the channel is closed right after.
    ///
    /// RabbitMQ's channel has at most 33 commands under way to a quorum queue. The acks beyond that it
    /// keeps to itself until those are applied, and forgets them when it is closed. A `basic.get` goes to
    /// the queue by the same way, behind the acks under way, and its answer comes back behind the
    /// news that they are applied, upon which the channel sends the rest. The queue gets that before it
    /// hears of the close, since the channel is the sender of both. A passive declaration would not
    /// do: it is answered without regard to what is under way.
    async fn have_acks_applied(&self, queue: &ShortString) -> lapin::Result<()> {
        let got = self.channel.basic_get(queue.clone(), BasicGetOptions::default()).await?;
        if let Some(message) = got {
            message.nack(REQUEUE).await?;
        }
        Ok(())
    }

    // Decision: docs/decisions/0005-what-happens-to-deliveries-of-a-deleted-queue.md
    /// Lets what was handed out be settled as before, for as long as its channel lasts: if the queue was
    /// deleted, it may be all that there is of these messages.
    async fn keep_channel(&mut self) {
        // A consumer that is left on it would be given messages that nobody polls for.
        let given_back = self.tags.is_empty()
            || matches!(timeout(RPC_TIMEOUT, self.give_back()).await, Ok(Ok(())));
        if given_back {
            let kept = (self.channel.clone(), Arc::clone(&self.connection));
            _ = self.outward.kept.set(kept);
        }
    }

    fn tell_that_it_is_sound(&mut self) {
        if !std::mem::replace(&mut self.is_sound, true) {
            _ = self.status.send_replace(Ok(()));
        }
    }

    /// The next message, or why there will be none by this session.
    async fn next(&mut self) -> Result<lapin::message::Delivery, String> {
        let _waiting = self.look.waiting();
        loop {
            // Without them each delivery would be lost, and the session would look sound.
            if self.outward.acks.have_died() {
                return Err("what sends the acks has died".to_owned());
            }
            // The stream can fall silent without an end, so the connection is looked at as well.
            match timeout(Duration::from_secs(1), self.deliveries.next()).await {
                Ok(Some(Event::Delivery(Ok(delivery)))) if delivery.acker.usable() => {
                    self.tell_that_it_is_sound();
                    return Ok(*delivery);
                }
                // What lapin had buffered when the channel was lost; it will be delivered again.
                Ok(Some(Event::Delivery(Ok(_)))) => return Err("the channel is lost".to_owned()),
                Ok(Some(Event::Delivery(Err(error)))) => return Err(error.to_string()),
                Ok(Some(Event::Ended(tag))) => {
                    self.tags.retain(|other| *other != tag);
                    self.keep_channel().await;
                    return Err("the broker cancelled the consumer: its queue was deleted, or it \
                                held a message for longer than the broker's consumer timeout"
                        .to_owned());
                }
                Ok(None) => return Err("no consumer is left".to_owned()),
                Err(_) if self.look.is_gone() => {
                    self.keep_channel().await;
                    return Err("the queue is gone".to_owned());
                }
                Err(_) if !self.connection.status().connected() => {
                    return Err("the connection is closed".to_owned());
                }
                Err(_) if !self.channel.status().connected() => {
                    return Err("the channel is closed".to_owned());
                }
                // Another session may be given what this one is not.
                Err(_) if self.look.is_in_vain() => {
                    return Err(
                        "the broker gives nothing although the queue is not empty".to_owned()
                    );
                }
                Err(_) if self.look.has_ended() => {
                    return Err("nobody looks at the queues any more".to_owned());
                }
                Err(_) if self.look.is_empty() => self.tell_that_it_is_sound(),
                Err(_) => {}
            }
        }
    }
}
