//! The imperative shell: threads, clocks and queues around the pure rooms.
//!
//! ```text
//!                 ┌────────────────────── engine ──────────────────────┐
//!        propose, │ read_barrier            read (shared lock)         │ watch
//!                 ▼                              ▼                     ▼
//!   raft thread ──▶ log thread             StateMachine ◀─┐        watch hub
//!     ▲  │              │ fsync                           │ writes     ▲
//!     │  │◀─────────────┘                                 │            │ feed
//!     │  └──committed──────────────────────────────▶ apply thread ─────┘
//!     │                                                   │ cut
//!     │                                            checkpoint thread ──▶ store
//!     ▼
//!   outbox, forwarder ──▶ other members
//! ```
//!
//! An image from another member goes from the raft thread to the checkpoint thread, and from
//! there to the apply thread and the log thread: see [`checkpoint_thread`]'s `install`.
//!
//! Every mutable thing has one owner: the node is the raft thread's, the log the log
//! thread's, the state the apply thread's (others read it under a shared lock), the
//! store the checkpoint thread's, the watchers the hub's.
//!
//! Threads are told to stop front to back: raft, then log and apply, then checkpoint.
//! What one of them cannot survive it reports to [`fault`], and the server stops.

pub mod apply_thread;
pub mod auto_compact;
pub mod boot_clock;
pub mod checkpoint_thread;
pub mod claim;
pub mod current;
pub mod fault;
pub mod force;
pub mod forwarder;
pub mod gauges;
pub mod hashes;
pub mod heal;
pub mod held;
pub mod history;
pub mod image;
pub mod import;
pub mod join;
pub mod leases;
pub mod log_thread;
pub mod outbox;
pub mod pins;
pub mod proposer;
pub mod published;
pub mod raft_thread;
pub mod records;
pub mod recover;
pub mod restore;
pub mod rolling_hashes;
pub mod roster;
pub mod save;
pub mod space;
pub mod stage;
pub mod timing;
pub mod waiters;
pub mod watch_hub;
