//! TLS in front of an upstream, as a load balancer has it. Its certificate is for `localhost` and `127.0.0.1` and lasts
//! until 2126; who is to believe it trusts `AUTHORITY`. The key is for these tests, and no secret.

use super::upstream::FakeUpstream;
use rustix::event::{PollFd, PollFlags, poll};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{HandshakeKind, ServerConfig, ServerConnection, SupportedProtocolVersion};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

pub const AUTHORITY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/support/tls/authority.pem");

pub struct TlsFront {
    address: SocketAddr,
    handshakes: Arc<Mutex<Vec<HandshakeKind>>>,
}

impl TlsFront {
    pub fn of(upstream: &FakeUpstream) -> TlsFront {
        TlsFront::start(rustls::ALL_VERSIONS, b"", upstream)
    }

    pub fn speaking(version: &'static SupportedProtocolVersion, upstream: &FakeUpstream) -> TlsFront {
        TlsFront::start(&[version], b"", upstream)
    }

    /// Sends a record that no key fits, right behind each piece of an answer.
    pub fn failing(upstream: &FakeUpstream) -> TlsFront {
        TlsFront::start(rustls::ALL_VERSIONS, b"\x17\x03\x03\x00\x2032 bytes without any meaning... ", upstream)
    }

    fn start(versions: &[&'static SupportedProtocolVersion], behind_each: &'static [u8], upstream: &FakeUpstream) -> TlsFront {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let address = listener.local_addr().expect("its address");
        let certificate = CertificateDer::from_pem_slice(include_bytes!("tls/server.pem")).expect("a certificate");
        let key = PrivateKeyDer::from_pem_slice(include_bytes!("tls/server.key")).expect("a key");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider).with_protocol_versions(versions).expect("versions");
        let config = Arc::new(config.with_no_client_auth().with_single_cert(vec![certificate], key).expect("the key's own"));
        let (behind, handshakes) = (upstream.address(), Arc::<Mutex<Vec<HandshakeKind>>>::default());
        let seen = Arc::clone(&handshakes);
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let (config, seen) = (Arc::clone(&config), Arc::clone(&seen));
                let behind = TcpStream::connect(behind).expect("the upstream listens");
                std::thread::spawn(move || {
                    let tls = ServerConnection::new(config).expect("a connection");
                    // Ends with an error where one of the two leaves, as the other then notices.
                    let _ = relay(tls, &client, &behind, behind_each, &seen);
                    let _ = (client.shutdown(Shutdown::Both), behind.shutdown(Shutdown::Both));
                });
            }
        });
        TlsFront { address, handshakes }
    }

    pub fn url(&self) -> String {
        format!("https://{}/v1", self.address)
    }

    /// How those that came to their end went, in their order.
    pub fn handshakes(&self) -> Vec<HandshakeKind> {
        self.handshakes.lock().unwrap().clone()
    }
}

fn relay(
    mut tls: ServerConnection,
    mut client: &TcpStream,
    mut behind: &TcpStream,
    behind_each: &[u8],
    seen: &Mutex<Vec<HandshakeKind>>,
) -> std::io::Result<()> {
    let mut piece = vec![0; 64 * 1024];
    let mut is_counted = false;
    loop {
        let mut ready = [PollFd::new(client, PollFlags::IN), PollFd::new(behind, PollFlags::IN)];
        poll(&mut ready, None)?;
        let (from_client, from_behind) = (!ready[0].revents().is_empty(), !ready[1].revents().is_empty());
        if from_client {
            if tls.read_tls(&mut client)? == 0 {
                return Ok(());
            }
            let state = tls.process_new_packets().map_err(std::io::Error::other);
            if let Ok(state) = &state {
                piece.resize(state.plaintext_bytes_to_read().max(64 * 1024), 0);
                let came = state.plaintext_bytes_to_read();
                tls.reader().read_exact(&mut piece[..came])?;
                behind.write_all(&piece[..came])?;
            }
            while tls.wants_write() {
                tls.write_tls(&mut client)?;
            }
            state?;
        }
        if from_behind {
            let came = behind.read(&mut piece)?;
            if came == 0 {
                tls.send_close_notify();
            }
            tls.writer().write_all(&piece[..came])?;
            let mut segment = Vec::new();
            while tls.wants_write() {
                tls.write_tls(&mut segment)?;
            }
            segment.extend(behind_each);
            client.write_all(&segment)?;
            if came == 0 {
                return Ok(());
            }
        }
        if let (false, false, Some(kind)) = (is_counted, tls.is_handshaking(), tls.handshake_kind()) {
            is_counted = true;
            seen.lock().unwrap().push(kind);
        }
    }
}
