//! TLS over the sockets to the upstream: one configuration and one memory of sessions for all lines, and buffers that a
//! stream of minutes can keep. Knows no HTTP.

use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::unversioned::transport::{Buffers, ConnectionDetails, Connector, Either, NextTimeout, RustlsConnector, Transport};

use super::buffers::SmallBuffers;
use super::watch::Watch;
use super::wire::Wire;
use crate::error::StartError;

/// Bytes of ureq's own buffers, each way, which never grow or shrink; ours behind them do. With 16 KiB each stream kept
/// 16 KiB, and a larger head did not fit.
pub const PIECE: usize = 2 * 1024;

/// Makes TLS connections out of those that need it. Shared by all lines: a session that one had can be resumed by another,
/// which saves a round trip or the check of a certificate.
#[derive(Clone, Debug)]
pub struct Tls {
    pub config: TlsConfig,
    connector: Arc<RustlsConnector>,
}

impl Tls {
    /// Trusts the certificates in this PEM file, or the public ones that are compiled in. Errs where the file cannot be
    /// read or has none; one that is PEM and no certificate within is passed over when the first call is made.
    pub fn new(ca_file: Option<&Path>) -> Result<Tls, StartError> {
        let mut config = TlsConfig::builder();
        if let Some(path) = ca_file {
            config = config.root_certs(RootCerts::new_with_certs(&certificates(path)?));
        }
        Ok(Tls { config: config.build(), connector: Arc::default() })
    }
}

fn certificates(path: &Path) -> Result<Vec<Certificate<'static>>, StartError> {
    let wrong = |what: String| StartError::usage(format!("UPSTREAM_CA_FILE: {}: {what}", path.display()));
    let pem = std::fs::read(path).map_err(|e| wrong(format!("it cannot be read: {e}")))?;
    let items: Result<Vec<_>, _> = parse_pem(&pem).collect();
    let items =
        items.map_err(|_| wrong("it is not PEM as it should be; has each part of it its BEGIN and its END?".to_string()))?;
    let certificate = |item| if let PemItem::Certificate(certificate) = item { Some(certificate) } else { None };
    let certificates: Vec<_> = items.into_iter().filter_map(certificate).collect();
    if certificates.is_empty() {
        return Err(wrong("there is no certificate in it; it must be PEM (-----BEGIN CERTIFICATE-----)".to_string()));
    }
    Ok(certificates)
}

impl Connector<Wire> for Tls {
    type Out = Either<Wire, Sealed>;

    fn connect(&self, details: &ConnectionDetails, wire: Option<Wire>) -> Result<Option<Self::Out>, ureq::Error> {
        let watch = wire.as_ref().map(|wire| wire.watch.clone()).unwrap_or_default();
        Ok(self.connector.connect(details, wire)?.map(|wire| match wire {
            Either::A(plain) => Either::A(plain),
            Either::B(tls) => {
                Either::B(Sealed { tls: tls.boxed(), buffers: SmallBuffers::default(), watch, just_read: false, failed: None })
            }
        }))
    }
}

/// A TLS connection.
#[derive(Debug)]
pub struct Sealed {
    tls: Box<dyn Transport>,
    buffers: SmallBuffers,
    watch: Watch,
    just_read: bool,
    /// What is wrong with it, which is told when all that came before is taken.
    failed: Option<ureq::Error>,
}

impl Sealed {
    fn send(&mut self, timeout: NextTimeout) -> Result<(), ureq::Error> {
        // Not kept: a stream sends nothing more.
        let output = std::mem::take(&mut self.buffers.output);
        let mut unsent = &output[..std::mem::take(&mut self.buffers.unsent)];
        while !unsent.is_empty() {
            let space = self.tls.buffers().output();
            let (piece, rest) = unsent.split_at(space.len().min(unsent.len()));
            space[..piece.len()].copy_from_slice(piece);
            self.tls.transmit_output(piece.len(), timeout)?;
            unsent = rest;
        }
        Ok(())
    }

    /// Waits for what comes next and takes it; false: the upstream has closed.
    fn receive(&mut self, timeout: NextTimeout) -> Result<bool, ureq::Error> {
        if self.failed.is_none() {
            match self.tls.maybe_await_input(timeout) {
                Err(e) if self.watch.ended().is_none() => self.failed = Some(e),
                came => return came,
            }
        }
        // What came before an alert, say, is sound.
        if matches!(self.look(), Ok(true)) {
            return Ok(true);
        }
        self.failed.take().map_or(Ok(false), Err)
    }

    /// Takes what is there, without a wait: an error of the kind `WouldBlock` where that is nothing.
    fn look(&mut self) -> Result<bool, ureq::Error> {
        self.tls.maybe_await_input(NextTimeout { after: Duration::ZERO.into(), ..NextTimeout::default() })
    }
}

impl Transport for Sealed {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), ureq::Error> {
        self.buffers.unsent += amount;
        if self.buffers.is_full() { self.send(timeout) } else { Ok(()) }
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, ureq::Error> {
        self.send(timeout)?;
        self.just_read = self.receive(timeout)?;
        if !self.just_read {
            return Ok(false);
        }
        let came = self.tls.buffers().input();
        let space = self.buffers.input_append_buf();
        if space.is_empty() {
            return Err(ureq::Error::BodyStalled);
        }
        let amount = came.len().min(space.len());
        space[..amount].copy_from_slice(&came[..amount]);
        self.tls.buffers().input_consume(amount);
        self.buffers.input_appended(amount);
        Ok(amount > 0)
    }

    fn is_open(&mut self) -> bool {
        // ureq asks when it puts the connection by and when it takes it up again; the second time counts.
        if std::mem::take(&mut self.just_read) {
            return true;
        }
        // A record that nobody asked for may be here already, decrypted or not, and would answer the next question. What is
        // TLS's own (a ticket, a new key) is no answer.
        let open = matches!(self.look(), Err(ureq::Error::Io(e)) if e.kind() == ErrorKind::WouldBlock);
        self.watch.note_reuse(open);
        open
    }

    fn is_tls(&self) -> bool {
        true
    }
}
