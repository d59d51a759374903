//! bbolt's file format: how etcd keeps its data, and what a snapshot file is.
//!
//! A file is a B+tree of pages, which refer to each other by number:
//!
//! ```text
//!  page 0, 1      2           3 …                                             the last
//! ┌──────┬──────┬──────────┬──────┬──────┬─────────┬────────┬──────┬─────┬──────────────┐
//! │ meta │ meta │ freelist │ leaf │ leaf │ … more  │ branch │ leaf │  …  │ root's leaf: │
//! │      │      │ (empty)  │      │      │ of the  │        │      │     │ the buckets  │
//! └──┬───┴──────┴──────────┴──────┴──────┴─ leaf ──┴────────┴──────┴─────┴──────▲───────┘
//!    └───────────────────────── the newer one counts ───────────────────────────┘
//! ```
//!
//! The root's leaves hold a row for each *bucket*, a map with a name; the row's value says at
//! which page the bucket's own tree begins. All numbers are little-endian.
//!
//! * [`format`]: pages, metas and elements as bytes.
//! * [`read`]: rows from a file, and what is wrong with it.
//! * [`write`]: a file from sorted rows, in one go, front to back.
//!
//! Nothing here knows what etcd keeps in its buckets: that is `backup`.

pub mod format;
pub mod read;
pub mod write;
