//! The sorted keys of one tree node, made quick to search.
//!
//! Keys live in allocations of their own, and each one a search looks at is a cache miss.
//! So a node also keeps, in one array, the *head* of each key: the first eight bytes after
//! the prefix that all keys of the node share, as a number that sorts as they do:
//!
//! ```text
//! prefix "/registry/pods/"      heads: default/  kube-sys  kube-sys  prod/api
//! ```
//!
//! A search looks at heads, and at whole keys only where heads are equal. Shorter rests
//! are padded with zeros, so equal heads do not mean equal keys.

use std::cmp::Ordering;

/// Keys in strictly ascending order.
pub(super) struct Keys {
    keys: Vec<Box<[u8]>>,
    /// For each key, its head.
    heads: Vec<u64>,
    /// How many first bytes all keys share; it may be fewer than they really do.
    prefix_len: usize,
}

/// The eight bytes of `key` after `prefix_len`.
fn head(key: &[u8], prefix_len: usize) -> u64 {
    let rest = key.get(prefix_len..).unwrap_or_default();
    if let Some(whole) = rest.first_chunk() {
        return u64::from_be_bytes(*whole);
    }
    let mut padded = [0; 8];
    padded.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
    u64::from_be_bytes(padded)
}

fn common_prefix_len(left: &[u8], right: &[u8]) -> usize {
    left.iter().zip(right).take_while(|(left, right)| left == right).count()
}

impl Keys {
    pub(super) fn new() -> Keys {
        Keys { keys: Vec::new(), heads: Vec::new(), prefix_len: 0 }
    }

    /// The keys of `keys`, which must be in strictly ascending order.
    pub(super) fn from_sorted(mut keys: Vec<Box<[u8]>>) -> Keys {
        keys.shrink_to_fit();
        let mut keys = Keys { keys, heads: Vec::new(), prefix_len: 0 };
        keys.find_prefix();
        keys
    }

    pub(super) fn len(&self) -> usize {
        self.keys.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    pub(super) fn get(&self, position: usize) -> Option<&[u8]> {
        self.keys.get(position).map(AsRef::as_ref)
    }

    pub(super) fn first(&self) -> Option<&[u8]> {
        self.get(0)
    }

    /// Where `key` is, or where it would have to be inserted.
    pub(super) fn find(&self, key: &[u8]) -> Result<usize, usize> {
        let head = head(key, self.prefix_len);
        let start = self.heads.partition_point(|other| *other < head);
        // Most searches end here, having looked at one key: even the prefix is only
        // compared when that was not it.
        if self.heads.get(start) == Some(&head) && self.get(start) == Some(key) {
            return Ok(start);
        }
        let prefix = self.first().and_then(|first| first.get(..self.prefix_len));
        match key.get(..self.prefix_len).unwrap_or(key).cmp(prefix.unwrap_or_default()) {
            Ordering::Less => return Err(0),
            Ordering::Greater => return Err(self.keys.len()),
            Ordering::Equal => {}
        }
        let equal = self.heads.iter().skip(start).take_while(|other| **other == head).count();
        let candidates = self.keys.get(start..start + equal).unwrap_or_default();
        match candidates.binary_search_by(|other| other.as_ref().cmp(key)) {
            Ok(position) => Ok(start + position),
            Err(position) => Err(start + position),
        }
    }

    /// Inserts `key` at `position`, which `find` has returned for it. Grows by `growth`
    /// keys when there is no room.
    pub(super) fn insert(&mut self, position: usize, key: Box<[u8]>, growth: usize) {
        if self.keys.len() == self.keys.capacity() {
            self.keys.reserve_exact(growth);
            self.heads.reserve_exact(growth);
        }
        let first = self.keys.first().unwrap_or(&key);
        let prefix_len = common_prefix_len(first, &key).min(self.prefix_len);
        self.heads.insert(position, head(&key, prefix_len));
        self.keys.insert(position, key);
        if prefix_len < self.prefix_len {
            self.prefix_len = prefix_len;
            self.find_heads();
        }
    }

    /// Removes the key at `position`, which must exist.
    pub(super) fn remove(&mut self, position: usize, spare: usize) {
        self.keys.remove(position);
        self.heads.remove(position);
        if self.keys.len() * 2 < self.keys.capacity() {
            self.keys.shrink_to(self.keys.len() + spare);
            self.heads.shrink_to(self.heads.len() + spare);
        }
    }

    pub(super) fn pop(&mut self) -> Option<Box<[u8]>> {
        self.heads.pop();
        self.keys.pop()
    }

    /// Splits off the keys from position `at` on.
    pub(super) fn split_off(&mut self, at: usize) -> Keys {
        let right = Keys::from_sorted(self.keys.split_off(at));
        self.keys.shrink_to_fit();
        self.find_prefix();
        right
    }

    /// Sets the prefix to all that the keys share: what the first and the last share.
    fn find_prefix(&mut self) {
        let (Some(first), Some(last)) = (self.keys.first(), self.keys.last()) else {
            return;
        };
        self.prefix_len = common_prefix_len(first, last);
        self.find_heads();
    }

    fn find_heads(&mut self) {
        let heads = self.keys.iter().map(|key| head(key, self.prefix_len));
        self.heads.clear();
        self.heads.extend(heads);
    }
}

#[cfg(test)]
impl Keys {
    /// Panics unless the keys ascend and the heads are theirs.
    pub(super) fn check(&self) {
        assert!(self.keys.is_sorted_by(|left, right| left < right));
        let prefix = self.keys.first().map(|first| &first[..self.prefix_len]);
        assert!(self.keys.iter().all(|key| Some(&key[..self.prefix_len]) == prefix));
        let heads: Vec<_> = self.keys.iter().map(|key| head(key, self.prefix_len)).collect();
        assert_eq!(self.heads, heads);
    }
}
