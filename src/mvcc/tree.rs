//! An ordered map that can count: a B+-tree whose inner nodes know how many *live*
//! values each of their subtrees holds.
//!
//! ```text
//!                    [ "f" | "p" ]                inner: separators, and per child
//!                   live 2 | 3 | 1                its live values and the node
//!                  /       |       \
//!         a† b c          f g m      p q†         leaves: keys and values in key order
//!
//! live keys below "g":  2 (left of "f") + 1 ("f" in its leaf)  = 3
//! ```
//!
//! A dead value († above) stays in the map and can be found and walked; it is only not
//! counted. So the number of live keys in any range costs two descents, and a walk over
//! live keys steps over a dead subtree without entering it.
//!
//! Invariants:
//! - all leaves have the same depth; no node but an empty root leaf is empty;
//! - separator `i` is greater than every key of child `i` and not greater than any of
//!   child `i + 1`. It need not be a key of the map any more;
//! - `live[i]` is exactly the number of live values below child `i`.
//!
//! Removal drops a node once it is empty and merges nothing. Only compaction removes,
//! and a tree of sparse nodes costs memory (at most a node's fixed overhead for each
//! key) but no depth: the height grows by insertions alone. The keys that come and go in
//! great numbers are neighbours in time and name, so their leaves empty entirely; a
//! restart builds the tree packed.
//!
//! What it does not do: concurrency (its owner locks), and choosing what is dead.

use super::keys::Keys;

/// Whether a value counts.
pub(super) trait Counted {
    fn is_live(&self) -> bool;
}

/// Most keys in a leaf. Beyond, the memory moved by an insertion costs more than the
/// shallower tree saves.
const LEAF_KEYS_MAX: usize = 64;
/// Most children of an inner node.
const INNER_CHILDREN_MAX: usize = 64;
/// How full the nodes of a bulk-built tree are: some room, so that the first insertions
/// after a restart do not all split.
const BULK_FILL: usize = 56;
/// Room added to a full node, in keys: doubling would leave nodes half empty for good.
const NODE_GROWTH: usize = 8;

/// The map. `V` is the value kept for each key.
pub(super) struct Tree<V> {
    root: Node<V>,
    live: usize,
}

enum Node<V> {
    Leaf(Leaf<V>),
    Inner(Inner<V>),
}

/// Keys apart from values: a search touches the keys alone.
struct Leaf<V> {
    keys: Keys,
    values: Vec<V>,
}

struct Inner<V> {
    /// One fewer than children.
    separators: Keys,
    /// One per child.
    live: Vec<usize>,
    children: Vec<Node<V>>,
}

/// The right half of a node that was split, for its parent to take in.
struct Split<V> {
    separator: Box<[u8]>,
    live: usize,
    node: Node<V>,
}

/// What an insertion did to a subtree.
struct Upsert<V, R> {
    result: R,
    /// By how much the live values of the subtree, split-off half included, changed.
    live_delta: isize,
    split: Option<Split<V>>,
}

impl<V: Counted> Tree<V> {
    pub(super) fn new() -> Tree<V> {
        Tree { root: Node::empty(), live: 0 }
    }

    /// The map of `entries`, which must come in strictly ascending key order.
    pub(super) fn from_sorted(entries: impl IntoIterator<Item = (Box<[u8]>, V)>) -> Tree<V> {
        let mut entries = entries.into_iter();
        let mut level: Vec<Split<V>> = Vec::new();
        loop {
            let (keys, mut values): (Vec<_>, Vec<_>) = entries.by_ref().take(BULK_FILL).unzip();
            values.shrink_to_fit();
            let leaf = Leaf { keys: Keys::from_sorted(keys), values };
            let Some(separator) = leaf.keys.first().map(Box::from) else { break };
            level.push(Split { separator, live: leaf.live(), node: Node::Leaf(leaf) });
        }
        while level.len() > 1 {
            let mut nodes = level.into_iter();
            let mut above = Vec::new();
            while let Some(first) = nodes.next() {
                let (mut separators, mut live) = (Vec::new(), vec![first.live]);
                let mut children = vec![first.node];
                for next in nodes.by_ref().take(BULK_FILL - 1) {
                    separators.push(next.separator);
                    live.push(next.live);
                    children.push(next.node);
                }
                let inner = Inner { separators: Keys::from_sorted(separators), live, children };
                above.push(Split {
                    separator: first.separator,
                    live: inner.live.iter().sum(),
                    node: Node::Inner(inner),
                });
            }
            level = above;
        }
        match level.pop() {
            Some(root) => Tree { root: root.node, live: root.live },
            None => Tree::new(),
        }
    }

    /// How many live values the map holds.
    pub(super) fn live(&self) -> usize {
        self.live
    }

    pub(super) fn get(&self, key: &[u8]) -> Option<&V> {
        let mut node = &self.root;
        loop {
            match node {
                Node::Leaf(leaf) => return leaf.values.get(leaf.find(key).ok()?),
                Node::Inner(inner) => node = inner.children.get(inner.child_of(key))?,
            }
        }
    }

    /// Lets `change` alter the value of `key`, or make one: it gets the value if there is
    /// one, and the value it returns is inserted if there was none (and dropped if there
    /// was). One descent.
    pub(super) fn upsert<R>(
        &mut self,
        key: &[u8],
        change: impl FnOnce(Option<&mut V>) -> (Option<V>, R),
    ) -> R {
        let Upsert { result, live_delta, split } = self.root.upsert(key, change);
        self.live = self.live.saturating_add_signed(live_delta);
        if let Some(right) = split {
            let left = std::mem::replace(&mut self.root, Node::empty());
            self.root = Node::Inner(Inner {
                separators: Keys::from_sorted(vec![right.separator]),
                live: vec![self.live - right.live, right.live],
                children: vec![left, right.node],
            });
        }
        result
    }

    /// Lets `change` alter the value of `key`, if it has one.
    pub(super) fn update<R>(&mut self, key: &[u8], change: impl FnOnce(&mut V) -> R) -> Option<R> {
        self.upsert(key, |value| (None, value.map(change)))
    }

    pub(super) fn remove(&mut self, key: &[u8]) -> Option<V> {
        let value = self.root.remove(key)?;
        self.live -= usize::from(value.is_live());
        // A root with one child says nothing its child does not; one without is no tree.
        while let Node::Inner(inner) = &mut self.root {
            if inner.children.len() > 1 {
                break;
            }
            self.root = inner.children.pop().unwrap_or_else(Node::empty);
        }
        Some(value)
    }

    /// How many live values have keys in `[start, end)`; without `end`, `>= start`.
    pub(super) fn count(&self, start: &[u8], end: Option<&[u8]>) -> usize {
        end.map_or(self.live, |end| self.live_below(end)).saturating_sub(self.live_below(start))
    }

    /// How many live values have a key less than `key`.
    fn live_below(&self, key: &[u8]) -> usize {
        let mut below = 0;
        let mut node = &self.root;
        loop {
            match node {
                Node::Leaf(leaf) => {
                    let (Ok(position) | Err(position)) = leaf.find(key);
                    let before = leaf.values.iter().take(position);
                    return below + before.filter(|value| value.is_live()).count();
                }
                Node::Inner(inner) => {
                    let child = inner.child_of(key);
                    below += inner.live.iter().take(child).sum::<usize>();
                    let Some(next) = inner.children.get(child) else { return below };
                    node = next;
                }
            }
        }
    }

    /// The entries with keys `>= key`, ascending; with `live_only`, those that are live.
    pub(super) fn iter_from(&self, key: &[u8], live_only: bool) -> Iter<'_, V> {
        let mut iter = Iter { above: Vec::new(), leaf: None, live_only };
        let mut node = &self.root;
        loop {
            match node {
                Node::Leaf(leaf) => {
                    let (Ok(position) | Err(position)) = leaf.find(key);
                    iter.leaf = Some((leaf, position));
                    return iter;
                }
                Node::Inner(inner) => {
                    let child = inner.child_of(key);
                    iter.above.push((inner, child + 1));
                    let Some(next) = inner.children.get(child) else { return iter };
                    node = next;
                }
            }
        }
    }
}

impl<V: Counted> Node<V> {
    fn empty() -> Node<V> {
        Node::Leaf(Leaf::empty())
    }

    fn is_empty(&self) -> bool {
        match self {
            Node::Leaf(leaf) => leaf.keys.is_empty(),
            Node::Inner(inner) => inner.children.is_empty(),
        }
    }

    fn upsert<R>(
        &mut self,
        key: &[u8],
        change: impl FnOnce(Option<&mut V>) -> (Option<V>, R),
    ) -> Upsert<V, R> {
        match self {
            Node::Leaf(leaf) => leaf.upsert(key, change),
            Node::Inner(inner) => inner.upsert(key, change),
        }
    }

    fn remove(&mut self, key: &[u8]) -> Option<V> {
        match self {
            Node::Leaf(leaf) => leaf.remove(key),
            Node::Inner(inner) => inner.remove(key),
        }
    }
}

impl<V: Counted> Leaf<V> {
    fn empty() -> Leaf<V> {
        Leaf { keys: Keys::new(), values: Vec::new() }
    }

    fn live(&self) -> usize {
        self.values.iter().filter(|value| value.is_live()).count()
    }

    /// Where `key` is, or where it would have to be inserted.
    fn find(&self, key: &[u8]) -> Result<usize, usize> {
        self.keys.find(key)
    }

    fn upsert<R>(
        &mut self,
        key: &[u8],
        change: impl FnOnce(Option<&mut V>) -> (Option<V>, R),
    ) -> Upsert<V, R> {
        match self.find(key) {
            Ok(position) => {
                let mut value = self.values.get_mut(position);
                let was_live = value.as_ref().is_some_and(|value| value.is_live());
                let (_, result) = change(value.as_deref_mut());
                let is_live = value.is_some_and(|value| value.is_live());
                let live_delta = isize::from(is_live) - isize::from(was_live);
                Upsert { result, live_delta, split: None }
            }
            Err(position) => {
                let (value, result) = change(None);
                let Some(value) = value else {
                    return Upsert { result, live_delta: 0, split: None };
                };
                let live_delta = isize::from(value.is_live());
                if self.values.len() == self.values.capacity() {
                    self.values.reserve_exact(NODE_GROWTH);
                }
                self.keys.insert(position, key.into(), NODE_GROWTH);
                self.values.insert(position, value);
                let split =
                    if self.keys.len() > LEAF_KEYS_MAX { self.split(position) } else { None };
                Upsert { result, live_delta, split }
            }
        }
    }

    /// Splits off the right half, or, when the last insertion was at the very end, that
    /// one entry: keys that arrive in ascending order then leave full leaves behind.
    fn split(&mut self, inserted: usize) -> Option<Split<V>> {
        let at = split_point(self.keys.len(), inserted);
        let right = Leaf { keys: self.keys.split_off(at), values: self.values.split_off(at) };
        self.values.shrink_to_fit();
        let separator = Box::from(right.keys.first()?);
        Some(Split { separator, live: right.live(), node: Node::Leaf(right) })
    }

    fn remove(&mut self, key: &[u8]) -> Option<V> {
        let position = self.find(key).ok()?;
        self.keys.remove(position, NODE_GROWTH);
        let value = self.values.remove(position);
        if self.values.len() * 2 < self.values.capacity() {
            self.values.shrink_to(self.values.len() + NODE_GROWTH);
        }
        Some(value)
    }
}

impl<V: Counted> Inner<V> {
    /// The child that holds `key`, if any does.
    fn child_of(&self, key: &[u8]) -> usize {
        // A key that equals a separator is right of it.
        self.separators.find(key).map_or_else(|position| position, |position| position + 1)
    }

    #[expect(
        clippy::indexing_slicing,
        reason = "child_of gives at most separators.len(), and live and children have one more"
    )]
    fn upsert<R>(
        &mut self,
        key: &[u8],
        change: impl FnOnce(Option<&mut V>) -> (Option<V>, R),
    ) -> Upsert<V, R> {
        let child = self.child_of(key);
        let below = self.children[child].upsert(key, change);
        let live = self.live[child].saturating_add_signed(below.live_delta);
        self.live[child] = live;
        let mut split = None;
        if let Some(right) = below.split {
            self.live[child] = live - right.live;
            self.separators.insert(child, right.separator, NODE_GROWTH);
            self.live.insert(child + 1, right.live);
            self.children.insert(child + 1, right.node);
            if self.children.len() > INNER_CHILDREN_MAX {
                split = self.split(child + 1);
            }
        }
        Upsert { result: below.result, live_delta: below.live_delta, split }
    }

    /// As [`Leaf::split`]. The separator between the halves moves up.
    fn split(&mut self, inserted: usize) -> Option<Split<V>> {
        let at = split_point(self.children.len(), inserted);
        let right = Inner {
            separators: self.separators.split_off(at),
            live: self.live.split_off(at),
            children: self.children.split_off(at),
        };
        let separator = self.separators.pop()?;
        Some(Split { separator, live: right.live.iter().sum(), node: Node::Inner(right) })
    }

    #[expect(
        clippy::indexing_slicing,
        reason = "child_of gives at most separators.len(), and live and children have one more"
    )]
    fn remove(&mut self, key: &[u8]) -> Option<V> {
        let child = self.child_of(key);
        let value = self.children[child].remove(key)?;
        self.live[child] -= usize::from(value.is_live());
        if self.children[child].is_empty() {
            self.live.remove(child);
            self.children.remove(child);
            // The neighbour takes over the range of the child that went.
            if !self.separators.is_empty() {
                self.separators.remove(child.saturating_sub(1), NODE_GROWTH);
            }
        }
        Some(value)
    }
}

/// Where to split a node of `len` parts of which the one at `inserted` came last. At
/// least one part goes to either side.
fn split_point(len: usize, inserted: usize) -> usize {
    if inserted + 1 == len { len - 1 } else { len / 2 }
}

/// A walk in key order. Made by [`Tree::iter_from`].
pub(super) struct Iter<'a, V> {
    /// The path from the root: each inner node and the child to enter next.
    above: Vec<(&'a Inner<V>, usize)>,
    /// The current leaf and the position to yield next.
    leaf: Option<(&'a Leaf<V>, usize)>,
    live_only: bool,
}

impl<'a, V: Counted> Iterator for Iter<'a, V> {
    type Item = (&'a [u8], &'a V);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some((leaf, position)) = &mut self.leaf {
                while let (Some(key), Some(value)) =
                    (leaf.keys.get(*position), leaf.values.get(*position))
                {
                    *position += 1;
                    if !self.live_only || value.is_live() {
                        return Some((key, value));
                    }
                }
                self.leaf = None;
            }
            let (inner, next) = self.above.last_mut()?;
            let (Some(child), Some(live)) = (inner.children.get(*next), inner.live.get(*next))
            else {
                self.above.pop();
                continue;
            };
            *next += 1;
            if self.live_only && *live == 0 {
                continue;
            }
            match child {
                Node::Leaf(leaf) => self.leaf = Some((leaf, 0)),
                Node::Inner(inner) => self.above.push((inner, 0)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    impl Counted for (bool, u32) {
        fn is_live(&self) -> bool {
            self.0
        }
    }

    #[derive(Debug, Clone)]
    enum Op {
        Upsert(u16, bool, u32),
        Update(u16, bool),
        Remove(u16),
        /// Removes this many keys from here on.
        RemoveRun(u16, u16),
        /// Inserts this many keys from here on.
        InsertRun(u16, u16),
    }

    fn ops() -> impl Strategy<Value = Vec<Op>> {
        let key = 0u16..6000;
        let op = prop_oneof![
            4 => (key.clone(), any::<bool>(), any::<u32>()).prop_map(|(k, l, v)| Op::Upsert(k, l, v)),
            2 => (key.clone(), any::<bool>()).prop_map(|(k, l)| Op::Update(k, l)),
            2 => key.clone().prop_map(Op::Remove),
            1 => (key.clone(), 0u16..3000).prop_map(|(k, n)| Op::RemoveRun(k, n)),
            1 => (key, 0u16..3000).prop_map(|(k, n)| Op::InsertRun(k, n)),
        ];
        proptest::collection::vec(op, 0..40)
    }

    /// Different lengths, shared prefixes, order unlike that of the numbers.
    fn key(n: u16) -> Vec<u8> {
        format!("{:x}/{}", n % 17, n).into_bytes()
    }

    type Model = BTreeMap<Vec<u8>, (bool, u32)>;

    fn check_same(tree: &Tree<(bool, u32)>, model: &Model, probes: &[u16]) {
        check_nodes(&tree.root);
        let all: Vec<_> = tree.iter_from(b"", false).map(|(k, v)| (k.to_vec(), *v)).collect();
        assert_eq!(all, model.clone().into_iter().collect::<Vec<_>>());
        assert_eq!(tree.live(), model.values().filter(|v| v.0).count());
        for pair in probes.windows(2) {
            let (start, end) = (key(pair[0]), key(pair[1]));
            assert_eq!(tree.get(&start), model.get(&start));
            let live: Vec<_> =
                tree.iter_from(&start, true).take(5).map(|(k, _)| k.to_vec()).collect();
            let expected: Vec<_> = model
                .range(start.clone()..)
                .filter(|(_, v)| v.0)
                .take(5)
                .map(|(k, _)| k.clone())
                .collect();
            assert_eq!(live, expected);
            let open = model.range(start.clone()..).filter(|(_, v)| v.0).count();
            assert_eq!(tree.count(&start, None), open);
            let until = if start < end {
                model.range(start.clone()..end.clone()).filter(|(_, v)| v.0).count()
            } else {
                0
            };
            assert_eq!(tree.count(&start, Some(&end)), until);
        }
    }

    /// The invariants at the head of the file; returns depth and live values.
    fn check_nodes(node: &Node<(bool, u32)>) -> (usize, usize) {
        match node {
            Node::Leaf(leaf) => {
                assert_eq!(leaf.keys.len(), leaf.values.len());
                assert!(leaf.keys.len() <= LEAF_KEYS_MAX);
                leaf.keys.check();
                (1, leaf.live())
            }
            Node::Inner(inner) => {
                assert!(!inner.children.is_empty());
                assert!(inner.children.len() <= INNER_CHILDREN_MAX);
                assert_eq!(inner.separators.len() + 1, inner.children.len());
                inner.separators.check();
                let below: Vec<_> = inner.children.iter().map(check_nodes).collect();
                assert!(inner.children.iter().all(|child| !child.is_empty()));
                assert!(below.iter().all(|(depth, _)| *depth == below[0].0), "unequal depth");
                assert_eq!(inner.live, below.iter().map(|(_, live)| *live).collect::<Vec<_>>());
                (below[0].0 + 1, inner.live.iter().sum())
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn behaves_like_a_map(ops in ops(), probes in proptest::collection::vec(0u16..6000, 8)) {
            let mut tree = Tree::new();
            let mut model = Model::new();
            for op in ops {
                match op {
                    Op::Upsert(n, live, value) => {
                        let key = key(n);
                        let found = tree.upsert(&key, |old| match old {
                            Some(old) => {
                                *old = (live, value);
                                (None, true)
                            }
                            None => (Some((live, value)), false),
                        });
                        assert_eq!(found, model.insert(key, (live, value)).is_some());
                    }
                    Op::Update(n, live) => {
                        let updated = tree.update(&key(n), |value| {
                            value.0 = live;
                            value.1
                        });
                        let expected = model.get_mut(&key(n)).map(|value| {
                            value.0 = live;
                            value.1
                        });
                        assert_eq!(updated, expected);
                    }
                    Op::Remove(n) => assert_eq!(tree.remove(&key(n)), model.remove(&key(n))),
                    Op::RemoveRun(n, count) => {
                        for n in n..n + count {
                            assert_eq!(tree.remove(&key(n)), model.remove(&key(n)));
                        }
                    }
                    Op::InsertRun(n, count) => {
                        for n in n..n + count {
                            let value = (n % 3 != 0, u32::from(n));
                            tree.upsert(&key(n), |old| match old {
                                Some(old) => {
                                    *old = value;
                                    (None, ())
                                }
                                None => (Some(value), ()),
                            });
                            model.insert(key(n), value);
                        }
                    }
                }
            }
            check_same(&tree, &model, &probes);
            let entries = model.iter().map(|(k, v)| (k.clone().into_boxed_slice(), *v));
            check_same(&Tree::from_sorted(entries), &model, &probes);
        }
    }

    #[test]
    fn ascending_keys_fill_their_leaves() {
        let mut tree = Tree::new();
        for n in 0u32..10_000 {
            tree.upsert(&n.to_be_bytes(), |_| (Some((true, n)), ()));
        }
        let mut leaves = 0;
        let mut nodes = vec![&tree.root];
        while let Some(node) = nodes.pop() {
            match node {
                Node::Leaf(_) => leaves += 1,
                Node::Inner(inner) => nodes.extend(&inner.children),
            }
        }
        assert_eq!(leaves, 10_000_usize.div_ceil(LEAF_KEYS_MAX));
    }

    #[test]
    fn emptied_tree_is_a_single_leaf() {
        let mut tree = Tree::new();
        for n in 0u32..10_000 {
            tree.upsert(&n.to_le_bytes(), |_| (Some((n % 2 == 0, n)), ()));
        }
        for n in 0u32..10_000 {
            assert_eq!(tree.remove(&n.to_le_bytes()), Some((n % 2 == 0, n)));
        }
        assert_eq!(tree.live(), 0);
        assert!(matches!(&tree.root, Node::Leaf(leaf) if leaf.keys.is_empty()));
        assert_eq!(tree.iter_from(b"", false).count(), 0);
    }
}
