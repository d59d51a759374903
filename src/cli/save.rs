//! `kvorum snapshot save <file>`: a server's snapshot into a file, as `etcdctl snapshot save`.
//!
//! What arrives goes to `<file>.part`. When it is complete and has the SHA-256 that it ends with,
//! it is synced and takes its name: so there is a whole file of that name, or none. It is locked
//! meanwhile: another save to the same file is refused. A server of etcd's is as good as kvorum's.
//!
//! Flags, their variables (`ETCDCTL_ENDPOINTS` for `--endpoints`), texts and exit codes are
//! etcdctl's. The system's root certificates are not used: for an `https` endpoint a CA file is
//! to be named. On a terminal the progress is shown.

use std::fs::{self, File, OpenOptions};
use std::io::{self, IsTerminal as _, Write};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kvorum::api::connector::connector_within;
use kvorum::api::tls::client::{ClientTls, ClientTlsSettings};
use kvorum::backup::Digest;
use kvorum::config::parse_duration;
use kvorum::pb::etcdserverpb::auth_client::AuthClient;
use kvorum::pb::etcdserverpb::maintenance_client::MaintenanceClient;
use kvorum::pb::etcdserverpb::{AuthenticateRequest, SnapshotRequest};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::{Arguments, EXIT_SERVER, Failure, Flag, WRITE_OUT};

/// The progress is shown again after this.
const PROGRESS_EVERY: Duration = Duration::from_millis(200);

/// The flags.
pub(super) const FLAGS: &[Flag] = &[
    Flag { name: "endpoints", kind: "string", default: "127.0.0.1:2379", help: "The server, one" },
    Flag {
        name: "cacert",
        kind: "string",
        default: "",
        help: "Verify its certificate by this CA bundle",
    },
    Flag { name: "cert", kind: "string", default: "", help: "Show this certificate" },
    Flag { name: "key", kind: "string", default: "", help: "The key of that certificate" },
    Flag {
        name: "insecure-skip-tls-verify",
        kind: "",
        default: "",
        help: "Do not verify its certificate",
    },
    Flag { name: "user", kind: "string", default: "", help: "name[:password]" },
    Flag { name: "password", kind: "string", default: "", help: "The password of --user" },
    Flag {
        name: "dial-timeout",
        kind: "duration",
        default: "2s",
        help: "How long connecting may take",
    },
    Flag {
        name: "command-timeout",
        kind: "duration",
        default: "0s",
        help: "How long all of it may take; 0s: as long as it takes",
    },
    // etcdctl has these for all commands.
    WRITE_OUT,
    Flag { name: "debug", kind: "", default: "", help: NO_EFFECT },
    Flag { name: "hex", kind: "", default: "", help: NO_EFFECT },
    Flag { name: "insecure-transport", kind: "", default: "", help: NO_EFFECT },
    Flag { name: "keepalive-time", kind: "duration", default: "2s", help: NO_EFFECT },
    Flag { name: "keepalive-timeout", kind: "duration", default: "6s", help: NO_EFFECT },
];

const NO_EFFECT: &str = "Taken because etcdctl takes it; has no effect here";

/// What is asked for.
#[derive(Debug, Clone, PartialEq)]
struct Options {
    file: PathBuf,
    endpoints: Vec<String>,
    cacert: Option<PathBuf>,
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
    skip_verify: bool,
    user: Option<(String, String)>,
    dial_timeout: Duration,
    command_timeout: Option<Duration>,
}

/// Carries the command out. Blocks.
pub(super) fn run(arguments: &Arguments) -> Result<String, Failure> {
    let failed = |message| Failure { message, exit_code: EXIT_SERVER };
    let options = Options::from(arguments)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| failed(format!("cannot start: {error}")))?;
    let version = runtime.block_on(options.save()).map_err(failed)?;
    let mut said = format!("Snapshot saved at {}\n", options.file.display());
    if !version.is_empty() {
        said.push_str(&format!("Server version {version}\n"));
    }
    Ok(said)
}

impl Options {
    fn from(given: &Arguments) -> Result<Options, Failure> {
        let file = given.only("snapshot save expects one argument <filename>")?;
        let text = |name| Some(given.get(name)).filter(|value| !value.is_empty());
        let path = |name| text(name).map(PathBuf::from);
        let duration = |name| {
            parse_duration(given.get(name))
                .map_err(|error| Failure::new(format!("invalid argument for --{name}: {error}")))
        };
        let user = match (text("user"), text("password")) {
            (None, _) => None,
            (Some(user), Some(password)) => Some((user, password)),
            (Some(user), None) => Some(user.split_once(':').ok_or_else(|| {
                let message = "--user is given without a password: write --user name:password, \
                               or --password";
                Failure::new(message)
            })?),
        };
        Ok(Options {
            file: PathBuf::from(file),
            endpoints: given.get("endpoints").split(',').map(|url| url.trim().to_owned()).collect(),
            cacert: path("cacert"),
            cert: path("cert"),
            key: path("key"),
            skip_verify: given.is_set("insecure-skip-tls-verify"),
            user: user.map(|(name, password)| (name.to_owned(), password.to_owned())),
            dial_timeout: duration("dial-timeout")?,
            command_timeout: Some(duration("command-timeout")?).filter(|limit| !limit.is_zero()),
        })
    }

    /// The endpoint with its scheme: without one it is `https` if there is anything about TLS.
    fn url(&self) -> Result<String, String> {
        let [endpoint] = self.endpoints.as_slice() else {
            let all = self.endpoints.join(" ");
            return Err(format!(
                "snapshot must be requested to one selected node, not multiple [{all}]"
            ));
        };
        let is_secure = self.cacert.is_some() || self.cert.is_some() || self.skip_verify;
        let url = match endpoint.contains("://") {
            true => endpoint.clone(),
            false if is_secure => format!("https://{endpoint}"),
            false => format!("http://{endpoint}"),
        };
        let needs_ca = url.starts_with("https:") || url.starts_with("unixs:");
        if needs_ca && self.cacert.is_none() && !self.skip_verify {
            return Err(format!(
                "{url} cannot be verified: name the CA that signed its certificate with --cacert"
            ));
        }
        Ok(url)
    }

    /// Saves, and returns the server's version.
    async fn save(&self) -> Result<String, String> {
        let saved = self.save_within_any_time();
        match self.command_timeout {
            None => saved.await,
            Some(timeout) => tokio::time::timeout(timeout, saved)
                .await
                .unwrap_or_else(|_| Err("context deadline exceeded".to_owned())),
        }
    }

    async fn save_within_any_time(&self) -> Result<String, String> {
        let url = self.url()?;
        let settings = ClientTlsSettings {
            cert_file: self.cert.clone(),
            key_file: self.key.clone(),
            trusted_ca_file: self.cacert.clone(),
            is_command: true,
            skip_verify: self.skip_verify,
            ..ClientTlsSettings::default()
        };
        let tls = match url.starts_with("https:") || url.starts_with("unixs:") {
            true => Some(ClientTls::load(settings).map_err(|error| error.to_string())?),
            false => None,
        };
        let connector = connector_within(self.dial_timeout, tls);
        let channel = connector(&url).map_err(|error| error.to_string())?;
        let unanswered = |status: tonic::Status| match std::error::Error::source(&status) {
            None => status.message().to_owned(),
            Some(mut cause) => {
                while let Some(below) = cause.source() {
                    cause = below;
                }
                format!("cannot reach {url}: {cause}; is it the right one of --endpoints?")
            }
        };
        let mut request = tonic::Request::new(SnapshotRequest {});
        if let Some((name, password)) = &self.user {
            let (name, password) = (name.clone(), password.clone());
            let login = AuthenticateRequest { name, password };
            match AuthClient::new(channel.clone()).authenticate(login).await {
                Ok(answer) => {
                    let token = answer.into_inner().token.parse();
                    let token = token.map_err(|_| "the server gave no usable token".to_owned())?;
                    request.metadata_mut().insert("token", token);
                }
                // Then it is asked without, as etcdctl does.
                Err(status) if status.message().ends_with("authentication is not enabled") => {}
                Err(status) => return Err(unanswered(status)),
            }
        }
        let mut client = MaintenanceClient::new(channel).max_decoding_message_size(usize::MAX);
        let mut stream = client.snapshot(request).await.map_err(unanswered)?.into_inner();
        let is_other = fs::metadata(&self.file).is_ok_and(|found| !found.is_file());
        if is_other {
            let file = self.file.display();
            return Err(format!("{file} is no file: name one to be made, or to be replaced"));
        }
        let mut part = Part::create(&self.file)?;
        let mut progress = Progress::new();
        let mut version = String::new();
        while let Some(response) = stream.message().await.map_err(unanswered)? {
            part.add(&response.blob)?;
            progress.show(part.written_bytes, response.remaining_bytes);
            version = response.version;
        }
        progress.end();
        part.finish(&self.file)?;
        Ok(version)
    }
}

/// A file that is not complete; removed when it is dropped before that.
struct Part {
    path: PathBuf,
    file: Option<File>,
    written_bytes: u64,
    /// Of all but the last blob, which may be the digest.
    digest: Digest,
    last: Vec<u8>,
}

/// Opens a file, empty, that nobody else writes to; `None` if somebody does.
fn open_alone(path: &Path) -> io::Result<Option<File>> {
    let file =
        OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => return Ok(None),
        locked => locked?,
    }
    // The one who had it may have renamed it since it was opened.
    let is_there = fs::metadata(path).is_ok_and(|found| {
        file.metadata()
            .is_ok_and(|opened| (opened.dev(), opened.ino()) == (found.dev(), found.ino()))
    });
    if !is_there {
        return Ok(None);
    }
    file.set_len(0)?;
    Ok(Some(file))
}

impl Part {
    fn create(target: &Path) -> Result<Part, String> {
        let mut path = target.as_os_str().to_owned();
        path.push(".part");
        let path = PathBuf::from(path);
        let file = open_alone(&path);
        let file = file.map_err(|error| format!("could not open {}: {error}", path.display()))?;
        let file = file.ok_or_else(|| {
            let path = path.display();
            format!("{path} is being written by another save: wait for it, or name another file")
        })?;
        let (digest, last) = (Digest::new(), Vec::new());
        Ok(Part { path, file: Some(file), written_bytes: 0, digest, last })
    }

    fn failed(&self, error: &io::Error) -> String {
        format!("cannot write {}: {error}", self.path.display())
    }

    fn add(&mut self, blob: &[u8]) -> Result<(), String> {
        let mut file = self.file.as_ref();
        let written = file.as_mut().map_or(Ok(()), |file| file.write_all(blob));
        written.map_err(|error| self.failed(&error))?;
        self.written_bytes += blob.len() as u64;
        self.digest.add(&self.last);
        self.last.clear();
        self.last.extend_from_slice(blob);
        Ok(())
    }

    /// It is complete: it gets its name.
    fn finish(mut self, target: &Path) -> Result<(), String> {
        if std::mem::take(&mut self.digest).finish() != self.last.as_slice() {
            return Err(format!(
                "sha256 checksum not found or wrong [bytes: {}]: what arrived is not all, or was \
                 damaged on its way; save again",
                self.written_bytes
            ));
        }
        let synced = self.file.as_ref().map_or(Ok(()), File::sync_all);
        synced.map_err(|error| self.failed(&error))?;
        let renamed = fs::rename(&self.path, target);
        renamed.map_err(|error| {
            format!("could not rename {} to {}: {error}", self.path.display(), target.display())
        })?;
        self.file = None;
        // The name is on the disk, too, when its directory is.
        let parent = target.parent().filter(|parent| !parent.as_os_str().is_empty());
        let parent = parent.unwrap_or(Path::new("."));
        let synced = File::open(parent).and_then(|directory| directory.sync_all());
        synced.map_err(|error| format!("cannot sync {}: {error}", parent.display()))
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if self.file.is_some() {
            // What is left of it is of no use, and in nobody's way.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// A line on the terminal, if there is one.
struct Progress {
    is_shown: bool,
    last: Option<Instant>,
}

impl Progress {
    fn new() -> Progress {
        Progress { is_shown: io::stderr().is_terminal(), last: None }
    }

    fn show(&mut self, written_bytes: u64, remaining_bytes: u64) {
        if !self.is_shown || self.last.is_some_and(|last| last.elapsed() < PROGRESS_EVERY) {
            return;
        }
        self.last = Some(Instant::now());
        let total = written_bytes.saturating_add(remaining_bytes);
        let percent = written_bytes.saturating_mul(100) / total.max(1);
        let (written, total) = (written_bytes >> 20, total >> 20);
        let _ = write!(io::stderr(), "\r{written} of {total} MiB, {percent} %  ");
    }

    fn end(&self) {
        if self.last.is_some() {
            let _ = writeln!(io::stderr());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &str) -> Result<Options, Failure> {
        let command = crate::cli::COMMANDS.iter().find(|command| command.name == "save").unwrap();
        let variable = |name: &str| (name == "ETCDCTL_DIAL_TIMEOUT").then(|| "7s".to_owned());
        let arguments = arguments.split_whitespace().map(Into::into);
        Options::from(&crate::cli::parse(command, arguments, &variable)?.unwrap())
    }

    #[test]
    fn flags_are_etcdctls() {
        let line = "db --endpoints=https://a:1 --cacert ca --cert c --key k --user=u:p:w --command-timeout 1m";
        let options = parse(line).unwrap();
        assert_eq!(options.file, Path::new("db"));
        assert_eq!(options.url().unwrap(), "https://a:1");
        assert_eq!(options.user, Some(("u".to_owned(), "p:w".to_owned())));
        assert_eq!(options.dial_timeout, Duration::from_secs(7));
        assert_eq!(options.command_timeout, Some(Duration::from_secs(60)));
        assert_eq!(parse("--dial-timeout=1s db").unwrap().dial_timeout, Duration::from_secs(1));
        assert_eq!(parse("db").unwrap().url().unwrap(), "http://127.0.0.1:2379");
        let insecure = parse("db --endpoints h:1 --insecure-skip-tls-verify").unwrap();
        assert_eq!(insecure.url().unwrap(), "https://h:1");
    }

    #[test]
    fn mistakes_are_named() {
        let refused = |line: &str| {
            let Failure { message, exit_code } = parse(line).unwrap_err();
            (message.lines().next().unwrap_or_default().to_owned(), exit_code)
        };
        assert_eq!(refused(""), ("snapshot save expects one argument <filename>".to_owned(), 128));
        assert_eq!(refused("a b").1, 128);
        assert_eq!(refused("a --bogus"), ("unknown flag: --bogus".to_owned(), 1));
        assert_eq!(refused("a --cert"), ("flag needs an argument: --cert".to_owned(), 1));
        assert!(refused("a --dial-timeout 7").0.contains("missing unit"));
        assert!(refused("a --user root").0.contains("--password"));
        let url = |line: &str| parse(line).unwrap().url().unwrap_err();
        assert_eq!(
            url("a --endpoints h:1,h:2"),
            "snapshot must be requested to one selected node, not multiple [h:1 h:2]"
        );
        assert!(url("a --endpoints https://h:1").contains("--cacert"));
    }

    #[test]
    fn a_file_has_its_name_when_it_is_whole_or_not_at_all() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("db");
        let left = || fs::read_dir(directory.path()).unwrap().count();
        for blobs in [&[][..], &[&b"data"[..]], &[b"data", &[7; 32]]] {
            let mut part = Part::create(&target).unwrap();
            blobs.iter().for_each(|blob| part.add(blob).unwrap());
            assert!(part.finish(&target).unwrap_err().contains("sha256"));
            assert_eq!(left(), 0);
        }
        let mut digest = Digest::new();
        digest.add(b"data");
        let mut part = Part::create(&target).unwrap();
        let other = Part::create(&target).err().unwrap();
        assert!(other.contains("another save"), "{other}");
        part.add(b"da").unwrap();
        part.add(b"ta").unwrap();
        part.add(&digest.finish()).unwrap();
        part.finish(&target).unwrap();
        assert_eq!((left(), fs::read(&target).unwrap().len()), (1, 36));
    }
}
