//! The state machine: what a committed request does to the data.
//!
//! Pure: the outcome depends on the state and the request alone, so that every
//! member arrives at the same data. There is no clock, no randomness, no thread and
//! no file in here.

pub mod check;
pub mod txn;
