//! Tells systemd that the server is ready, for units with `Type=notify`.

use std::ffi::OsStr;
use std::io;
use std::os::unix::net::UnixDatagram;

/// Sends `state` (such as `READY=1`) to the socket that `NOTIFY_SOCKET` names: a path, or
/// a name in the abstract namespace behind an `@`.
pub(crate) fn notify(socket: &OsStr, state: &str) -> io::Result<()> {
    let sender = UnixDatagram::unbound()?;
    #[cfg(target_os = "linux")]
    {
        use std::os::linux::net::SocketAddrExt as _;
        use std::os::unix::ffi::OsStrExt as _;
        if let Some(name) = socket.as_bytes().strip_prefix(b"@") {
            let address = std::os::unix::net::SocketAddr::from_abstract_name(name)?;
            return sender.send_to_addr(state.as_bytes(), &address).map(drop);
        }
    }
    sender.send_to(state.as_bytes(), socket).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn received(socket: &UnixDatagram) -> String {
        let mut buffer = [0; 64];
        let length = socket.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    }

    #[test]
    fn both_kinds_of_socket_are_told() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        notify(path.as_os_str(), "READY=1").unwrap();
        assert_eq!(received(&socket), "READY=1");
        #[cfg(target_os = "linux")]
        {
            use std::os::linux::net::SocketAddrExt as _;
            let name = path.to_str().unwrap().as_bytes();
            let address = std::os::unix::net::SocketAddr::from_abstract_name(name).unwrap();
            let socket = UnixDatagram::bind_addr(&address).unwrap();
            notify(OsStr::new(&format!("@{}", path.display())), "READY=1").unwrap();
            assert_eq!(received(&socket), "READY=1");
        }
    }

    #[test]
    fn a_missing_socket_is_an_error() {
        assert!(notify(OsStr::new("/no/such/socket"), "READY=1").is_err());
    }
}
