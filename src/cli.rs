//! What the program does besides serving: `kvorum snapshot …`, as etcdctl and etcdutl do it.
//!
//! * [`save`]: a server's state into a file.

pub(crate) mod save;
