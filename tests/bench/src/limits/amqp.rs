//! The part of AMQP 0-9-1 that is needed to publish with confirms over a plain socket.

use std::io::{BufReader, Read, Write as _};
use std::net::TcpStream;

use anyhow::{Context as _, bail, ensure};
use lapin::uri::AMQPUri;

const METHOD: u8 = 1;
const HEADER: u8 = 2;
const BODY: u8 = 3;
const FRAME_END: u8 = 0xce;
/// The only channel.
const CHANNEL: u16 = 1;
const FRAME_MAX: u32 = 131_072;
/// The flag of a content header whose only property is the delivery mode.
const DELIVERY_MODE: u16 = 1 << 12;
const PERSISTENT: u8 = 2;

/// Methods by class and number.
const CONNECTION_START_OK: [u16; 2] = [10, 11];
const CONNECTION_TUNE_OK: [u16; 2] = [10, 31];
const CONNECTION_OPEN: [u16; 2] = [10, 40];
const CHANNEL_OPEN: [u16; 2] = [20, 10];
const BASIC_PUBLISH: [u16; 2] = [60, 40];
const BASIC_ACK: [u16; 2] = [60, 80];
const CONFIRM_SELECT: [u16; 2] = [85, 10];

/// A publisher confirm.
pub(super) struct Ack {
    pub(super) tag: u64,
    /// Whether it also confirms all earlier messages.
    pub(super) multiple: bool,
}

/// Opens a connection with one channel in confirm mode. Returns the sending and the receiving half.
pub(super) fn open(uri: &str) -> anyhow::Result<(TcpStream, Confirms)> {
    let uri: AMQPUri = uri.parse().map_err(|error| anyhow::anyhow!("{error}"))?;
    let user = &uri.authority.userinfo;
    let address = (uri.authority.host.as_str(), uri.authority.port);
    let mut socket = TcpStream::connect(address).context("cannot reach the broker")?;
    socket.set_nodelay(true)?;
    let mut confirms = Confirms(BufReader::with_capacity(1 << 16, socket.try_clone()?));

    socket.write_all(b"AMQP\x00\x00\x09\x01")?;
    confirms.method()?;
    let mut start_ok = vec![0; 4];
    short_string(&mut start_ok, "PLAIN");
    let secret = format!("\0{}\0{}", user.username, user.password);
    start_ok.extend(u32::try_from(secret.len())?.to_be_bytes());
    start_ok.extend(secret.as_bytes());
    short_string(&mut start_ok, "en_US");
    socket.write_all(&method(0, CONNECTION_START_OK, &start_ok))?;
    confirms.method()?;
    // One channel, the usual frame size, no heartbeats.
    let mut tune_ok = CHANNEL.to_be_bytes().to_vec();
    tune_ok.extend(FRAME_MAX.to_be_bytes());
    tune_ok.extend([0, 0]);
    socket.write_all(&method(0, CONNECTION_TUNE_OK, &tune_ok))?;
    let mut open = Vec::new();
    short_string(&mut open, &uri.vhost);
    open.extend([0, 0]);
    socket.write_all(&method(0, CONNECTION_OPEN, &open))?;
    confirms.method()?;
    socket.write_all(&method(CHANNEL, CHANNEL_OPEN, &[0]))?;
    confirms.method()?;
    socket.write_all(&method(CHANNEL, CONFIRM_SELECT, &[0]))?;
    confirms.method()?;
    Ok((socket, confirms))
}

/// Appends the frames that publish a persistent message to `queue`.
pub(super) fn publish(out: &mut Vec<u8>, queue: &str, body: &[u8]) {
    let mut arguments = vec![0, 0, 0];
    short_string(&mut arguments, queue);
    arguments.push(0);
    out.extend(method(CHANNEL, BASIC_PUBLISH, &arguments));
    let mut header = BASIC_PUBLISH[0].to_be_bytes().to_vec();
    header.extend([0, 0]);
    header.extend((body.len() as u64).to_be_bytes());
    header.extend(DELIVERY_MODE.to_be_bytes());
    header.push(PERSISTENT);
    frame(out, HEADER, CHANNEL, &header);
    frame(out, BODY, CHANNEL, body);
}

/// The receiving half of the connection.
pub(super) struct Confirms(BufReader<TcpStream>);

impl Confirms {
    /// The next ack. A nack is an error.
    pub(super) fn next(&mut self) -> anyhow::Result<Ack> {
        let (name, arguments) = self.method()?;
        ensure!(name == BASIC_ACK, "the broker sent {name:?} instead of an ack");
        let (tag, rest) = arguments.split_first_chunk().context("an ack without a tag")?;
        Ok(Ack { tag: u64::from_be_bytes(*tag), multiple: rest.first() == Some(&1) })
    }

    /// Whether the buffer holds no further bytes.
    pub(super) fn is_drained(&self) -> bool {
        self.0.buffer().is_empty()
    }

    fn method(&mut self) -> anyhow::Result<([u16; 2], Vec<u8>)> {
        loop {
            let mut head = [0; 7];
            self.0.read_exact(&mut head).context("the broker has closed the connection")?;
            let [kind, _, _, length @ ..] = head;
            let mut payload = vec![0; u32::from_be_bytes(length) as usize + 1];
            self.0.read_exact(&mut payload)?;
            if kind != METHOD {
                continue;
            }
            let [class_high, class_low, high, low, arguments @ ..] = payload.as_slice() else {
                bail!("a method frame without a method");
            };
            let name = [[*class_high, *class_low], [*high, *low]].map(u16::from_be_bytes);
            return Ok((name, arguments.to_vec()));
        }
    }
}

fn method(channel: u16, name: [u16; 2], arguments: &[u8]) -> Vec<u8> {
    let mut payload: Vec<u8> = name.iter().flat_map(|number| number.to_be_bytes()).collect();
    payload.extend(arguments);
    let mut out = Vec::with_capacity(payload.len() + 8);
    frame(&mut out, METHOD, channel, &payload);
    out
}

fn frame(out: &mut Vec<u8>, kind: u8, channel: u16, payload: &[u8]) {
    out.push(kind);
    out.extend(channel.to_be_bytes());
    #[expect(clippy::cast_possible_truncation, reason = "every payload is shorter than a frame")]
    out.extend((payload.len() as u32).to_be_bytes());
    out.extend(payload);
    out.push(FRAME_END);
}

fn short_string(out: &mut Vec<u8>, text: &str) {
    #[expect(clippy::cast_possible_truncation, reason = "names have at most 255 bytes")]
    out.push(text.len() as u8);
    out.extend(text.as_bytes());
}
