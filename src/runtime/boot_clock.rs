//! A clock that goes on while the machine is suspended.
//!
//! [`std::time::Instant`] stands still meanwhile, on Linux. Where others have gone on (another
//! leader was elected, and leases have run out) a member that wakes up would take what it
//! knew before for fresh.

#[cfg(test)]
use std::sync::Arc;
#[cfg(test)]
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// See the module documentation.
#[derive(Debug, Clone, Default)]
pub enum BootClock {
    /// The system's.
    #[default]
    System,
    /// Microseconds that somebody else counts.
    #[cfg(test)]
    Simulated(Arc<AtomicU64>),
}

impl BootClock {
    /// The time since some moment that is the same for this whole process.
    pub fn now(&self) -> Duration {
        match self {
            BootClock::System => system(),
            #[cfg(test)]
            BootClock::Simulated(micros) => Duration::from_micros(micros.load(Ordering::Relaxed)),
        }
    }
}

#[cfg(any(target_os = "linux", target_os = "android"))]
fn system() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let secs = u64::try_from(now.tv_sec).unwrap_or(0);
    Duration::new(secs, u32::try_from(now.tv_nsec).unwrap_or(0))
}

/// Where there is no such clock, the one there is.
#[cfg(not(any(target_os = "linux", target_os = "android")))]
fn system() -> Duration {
    use std::sync::LazyLock;
    use std::time::Instant;
    static BEGAN: LazyLock<Instant> = LazyLock::new(Instant::now);
    BEGAN.elapsed()
}
