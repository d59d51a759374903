//! The network between members: a proxy in front of each member's peer address, which knows
//! who is calling, so that each direction between two members is a link of its own.
//!
//! ```text
//!   m1 ──dials──▶ proxy of m2 ──▶ m2      bytes of the call go over link m1→m2,
//!                                         bytes of the answer over link m2→m1
//! ```
//!
//! Members advertise the proxy's address. All callers come from 127.0.0.1; whose socket it
//! is the kernel tells (`/proc/net/tcp` has the socket's inode, `/proc/<pid>/fd` who holds
//! it). So neither root nor network namespaces are needed.
//!
//! A link that is cut passes nothing on and says nothing, as a network does that lost its
//! route: connections stay open, and bytes already taken are held. When it is mended they
//! come late, or the connections are reset: whoever mends it chooses.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Bytes that one direction of one connection holds at most; then the sender waits.
const BUFFER_BYTES: usize = 64 * 1024;

/// How a link is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Link {
    is_cut: bool,
    delay: Duration,
    /// Counts how often its connections were reset.
    resets: u64,
}

/// All links between members; a clone is the same links.
#[derive(Clone)]
pub struct Links {
    members: usize,
    links: Arc<Vec<watch::Sender<Link>>>,
    /// The process of each member, or 0.
    pids: Arc<Vec<AtomicU32>>,
}

impl Links {
    /// Links between so many members, all of them whole.
    pub fn new(members: usize) -> Links {
        let links = (0..members * members).map(|_| watch::Sender::new(Link::default()));
        let pids = (0..members).map(|_| AtomicU32::new(0)).collect();
        Links { members, links: Arc::new(links.collect()), pids: Arc::new(pids) }
    }

    /// Says which process a member is.
    pub fn set_pid(&self, member: usize, pid: u32) {
        self.pids[member].store(pid, Ordering::Relaxed);
    }

    fn link(&self, from: usize, to: usize) -> &watch::Sender<Link> {
        &self.links[from * self.members + to]
    }

    /// Lets nothing through any more.
    pub fn cut(&self, from: usize, to: usize) {
        self.link(from, to).send_modify(|link| link.is_cut = true);
    }

    /// Lets everything through later.
    pub fn delay(&self, from: usize, to: usize, delay: Duration) {
        self.link(from, to).send_modify(|link| link.delay = delay);
    }

    /// Makes all links whole. Connections over those that were cut are reset, if that is
    /// asked for, else what they hold comes late.
    pub fn mend(&self, reset: bool) {
        for link in self.links.iter() {
            link.send_modify(|link| {
                link.resets += u64::from(link.is_cut && reset);
                link.is_cut = false;
                link.delay = Duration::ZERO;
            });
        }
    }

    /// The member whose socket this is.
    fn owner(&self, address: SocketAddr) -> Option<usize> {
        let inode = inode_of(address)?;
        let target = format!("socket:[{inode}]");
        let pids = self.pids.iter().map(|pid| pid.load(Ordering::Relaxed));
        pids.enumerate()
            .find(|(_, pid)| *pid != 0 && holds(*pid, &target))
            .map(|(member, _)| member)
    }

    /// Passes connections on to `member`, until the task is dropped.
    pub async fn serve(self, listener: TcpListener, member: usize, target: SocketAddr) {
        while let Ok((caller, address)) = listener.accept().await {
            let links = self.clone();
            tokio::spawn(async move {
                // Who calls and hangs up at once has nothing to say.
                let Some(from) = links.owner(address) else { return };
                let Ok(callee) = TcpStream::connect(target).await else { return };
                links.join(caller, callee, from, member).await;
            });
        }
    }

    /// Both directions of a connection that `from` made to `to`.
    async fn join(&self, caller: TcpStream, callee: TcpStream, from: usize, to: usize) {
        // Delays are of our making alone.
        let _ = (caller.set_nodelay(true), callee.set_nodelay(true));
        let (caller_in, caller_out) = caller.into_split();
        let (callee_in, callee_out) = callee.into_split();
        let there = pump(caller_in, callee_out, self.link(from, to).subscribe());
        let back = pump(callee_in, caller_out, self.link(to, from).subscribe());
        // Dropping what is left closes both connections.
        tokio::select! {
            _ = there => {}
            _ = back => {}
        }
    }
}

/// Passes bytes on while the link lets them through.
async fn pump(
    mut input: OwnedReadHalf,
    mut output: OwnedWriteHalf,
    mut link: watch::Receiver<Link>,
) -> io::Result<()> {
    let gone = |_| io::Error::from(io::ErrorKind::ConnectionReset);
    let resets = link.borrow().resets;
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let length = tokio::select! {
            length = input.read(&mut buffer) => length?,
            _ = link.wait_for(|link| link.resets != resets) => return Ok(()),
        };
        let state =
            *link.wait_for(|link| !link.is_cut || link.resets != resets).await.map_err(gone)?;
        if length == 0 || state.resets != resets {
            return Ok(());
        }
        if !state.delay.is_zero() {
            tokio::time::sleep(state.delay).await;
        }
        output.write_all(&buffer[..length]).await?;
    }
}

/// The inode of the socket with this local address.
fn inode_of(address: SocketAddr) -> Option<u64> {
    let SocketAddr::V4(address) = address else { return None };
    let ip = u32::from_ne_bytes(address.ip().octets());
    let local = format!("{ip:08X}:{:04X}", address.port());
    let table = std::fs::read_to_string("/proc/net/tcp").ok()?;
    let line = table.lines().find(|line| line.split_whitespace().nth(1) == Some(&local))?;
    line.split_whitespace().nth(9)?.parse().ok().filter(|inode| *inode != 0)
}

/// Whether a process holds such a file.
fn holds(pid: u32, target: &str) -> bool {
    let Ok(files) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    files
        .flatten()
        .any(|file| std::fs::read_link(file.path()).is_ok_and(|link| link == Path::new(target)))
}
