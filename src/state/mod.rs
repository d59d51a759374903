//! What a member holds, and what requests do to it. Pure: no clock, no thread, no
//! randomness, no file, no socket; equal logs lead to equal states on all members.
//!
//! * [`machine`]: the state machine, and the only function that changes it.
//! * [`check`]: what is wrong with a request, as etcd says it, before it is proposed.
//! * [`txn`]: carrying out puts, deletes, ranges and transactions.
//! * [`members`]: who belongs to the cluster.
//! * [`reconfig`]: whether a change of the members is safe now.
//! * [`rolling`]: one number that tells members apart that applied differently.

pub mod check;
pub mod machine;
pub mod members;
pub mod reconfig;
pub mod rolling;
pub mod txn;

#[cfg(test)]
pub(crate) use machine::TRUSTS_STALE_LEADERS;
pub use machine::{
    AuthRow, AuthTable, Cut, Dirty, Effects, LeaseChange, Outcome, Response, Restored, StateMachine,
};
