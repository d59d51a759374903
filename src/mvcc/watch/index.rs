//! Which watchers a key concerns.
//!
//! A watcher of one key sits in a hash map under that key. Watchers of ranges sit in
//! an interval tree: a balanced (AVL) search tree of distinct ranges, ordered by start,
//! in which every node also knows the furthest end below it:
//!
//! ```text
//!                  [d, k)  furthest k
//!                 /                  \
//!   [a, f)  furthest f        [e, g)  furthest g
//! ```
//!
//! A subtree whose furthest end is not after the key, and everything that starts after
//! the key, is passed over, so a look-up costs O(log ranges) per range found.
//! Watchers of equal ranges, as every client of a Kubernetes prefix makes them, share a
//! node and cost one step.
//!
//! Watchers come out in an order that depends on the ranges and slots held only:
//! the hash map is never iterated.

use std::cmp::Ordering;
use std::collections::HashMap;

use bytes::Bytes;

use super::super::{KeyRange, RangeEnd};

/// The place of a watcher in the registry.
pub(super) type Slot = usize;

/// A set of watchers, found by key.
#[derive(Debug, Default)]
pub(super) struct Index {
    keys: HashMap<Bytes, Slots>,
    ranges: Tree,
}

impl Index {
    /// Adds `slot`, which watches `range`.
    pub(super) fn insert(&mut self, range: &KeyRange, slot: Slot) {
        match End::of(range) {
            None => self.keys.entry(range.start.clone()).or_default().add(slot),
            Some(end) => {
                self.ranges = Some(insert(self.ranges.take(), &range.start, &end, slot));
            }
        }
    }

    /// Takes out `slot`, which was added with this very `range`.
    pub(super) fn remove(&mut self, range: &KeyRange, slot: Slot) {
        match End::of(range) {
            None => {
                if let Some(slots) = self.keys.get_mut(&range.start) {
                    slots.take(slot);
                    if slots.0.is_empty() {
                        self.keys.remove(&range.start);
                    }
                }
            }
            Some(end) => self.ranges = remove(self.ranges.take(), &range.start, &end, slot),
        }
    }

    /// Calls `visit` once for every watcher whose range holds `key`.
    pub(super) fn visit(&self, key: &[u8], visit: &mut impl FnMut(Slot)) {
        if let Some(slots) = self.keys.get(key) {
            slots.0.iter().copied().for_each(&mut *visit);
        }
        stab(&self.ranges, key, visit);
    }
}

/// Ascending slots. Watchers come and go seldom and are walked for every change.
#[derive(Debug, Default)]
struct Slots(Vec<Slot>);

impl Slots {
    fn add(&mut self, slot: Slot) {
        if let Err(at) = self.0.binary_search(&slot) {
            self.0.insert(at, slot);
        }
    }

    fn take(&mut self, slot: Slot) {
        if let Ok(at) = self.0.binary_search(&slot) {
            self.0.remove(at);
        }
    }
}

/// Where a range of more than one key ends; ordered: the open end is after all others.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum End {
    Before(Bytes),
    Open,
}

impl End {
    /// The end of `range`; `None` for a single key.
    fn of(range: &KeyRange) -> Option<End> {
        match &range.end {
            RangeEnd::Single => None,
            RangeEnd::Before(end) => Some(End::Before(end.clone())),
            RangeEnd::Open => Some(End::Open),
        }
    }

    fn is_after(&self, key: &[u8]) -> bool {
        match self {
            End::Before(end) => key < end.as_ref(),
            End::Open => true,
        }
    }
}

type Tree = Option<Box<Node>>;

#[derive(Debug)]
struct Node {
    start: Bytes,
    end: End,
    /// Those who watch exactly this range.
    slots: Slots,
    /// The furthest end in this subtree.
    furthest: End,
    height: u32,
    left: Tree,
    right: Tree,
}

impl Node {
    fn leaf(start: Bytes, end: End, slot: Slot) -> Box<Node> {
        let furthest = end.clone();
        let slots = Slots(vec![slot]);
        Box::new(Node { start, end, slots, furthest, height: 1, left: None, right: None })
    }

    /// What lies below has changed: takes the height and the furthest end anew.
    fn refresh(&mut self) {
        self.height = 1 + height(&self.left).max(height(&self.right));
        let below = [&self.left, &self.right].into_iter().flatten().map(|node| &node.furthest);
        let furthest = below.fold(&self.end, Ord::max);
        self.furthest = furthest.clone();
    }

    fn compare(&self, start: &Bytes, end: &End) -> Ordering {
        (start, end).cmp(&(&self.start, &self.end))
    }
}

fn height(tree: &Tree) -> u32 {
    tree.as_ref().map_or(0, |node| node.height)
}

fn insert(tree: Tree, start: &Bytes, end: &End, slot: Slot) -> Box<Node> {
    let Some(mut node) = tree else {
        return Node::leaf(start.clone(), end.clone(), slot);
    };
    match node.compare(start, end) {
        Ordering::Less => node.left = Some(insert(node.left.take(), start, end, slot)),
        Ordering::Greater => node.right = Some(insert(node.right.take(), start, end, slot)),
        Ordering::Equal => node.slots.add(slot),
    }
    balance(node)
}

fn remove(tree: Tree, start: &Bytes, end: &End, slot: Slot) -> Tree {
    let mut node = tree?;
    match node.compare(start, end) {
        Ordering::Less => node.left = remove(node.left.take(), start, end, slot),
        Ordering::Greater => node.right = remove(node.right.take(), start, end, slot),
        Ordering::Equal => {
            node.slots.take(slot);
            if node.slots.0.is_empty() {
                return join(node.left.take(), node.right.take());
            }
        }
    }
    Some(balance(node))
}

/// One tree of two that were neighbours below one node.
fn join(left: Tree, right: Tree) -> Tree {
    let Some(right) = right else { return left };
    let (mut least, rest) = take_least(right);
    least.left = left;
    least.right = rest;
    Some(balance(least))
}

fn take_least(mut node: Box<Node>) -> (Box<Node>, Tree) {
    match node.left.take() {
        None => {
            let rest = node.right.take();
            (node, rest)
        }
        Some(left) => {
            let (least, rest) = take_least(left);
            node.left = rest;
            (least, Some(balance(node)))
        }
    }
}

/// Makes the heights below `node`, which differ by two at most, differ by one at most.
fn balance(mut node: Box<Node>) -> Box<Node> {
    node.refresh();
    let (left, right) = (height(&node.left), height(&node.right));
    if left > right + 1 {
        node.left = node.left.map(|left| {
            if height(&left.left) < height(&left.right) { rotate_left(left) } else { left }
        });
        rotate_right(node)
    } else if right > left + 1 {
        node.right = node.right.map(|right| {
            if height(&right.right) < height(&right.left) { rotate_right(right) } else { right }
        });
        rotate_left(node)
    } else {
        node
    }
}

/// Lifts the left child above `node`.
fn rotate_right(mut node: Box<Node>) -> Box<Node> {
    let Some(mut left) = node.left.take() else { return node };
    node.left = left.right.take();
    node.refresh();
    left.right = Some(node);
    left.refresh();
    left
}

/// Lifts the right child above `node`.
fn rotate_left(mut node: Box<Node>) -> Box<Node> {
    let Some(mut right) = node.right.take() else { return node };
    node.right = right.left.take();
    node.refresh();
    right.left = Some(node);
    right.refresh();
    right
}

fn stab(tree: &Tree, key: &[u8], visit: &mut impl FnMut(Slot)) {
    let Some(node) = tree else { return };
    if !node.furthest.is_after(key) {
        return;
    }
    stab(&node.left, key, visit);
    if node.start.as_ref() <= key {
        if node.end.is_after(key) {
            node.slots.0.iter().copied().for_each(&mut *visit);
        }
        stab(&node.right, key, visit);
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::Random;
    use super::*;

    fn key(random: &mut Random) -> Bytes {
        let letters = (0..1 + random.below(3)).map(|_| b'a' + random.below(4) as u8);
        letters.collect::<Vec<u8>>().into()
    }

    fn range(random: &mut Random) -> KeyRange {
        let start = key(random);
        let end = match random.below(4) {
            0 => Bytes::new(),
            1 => Bytes::from_static(b"\0"),
            _ => key(random),
        };
        KeyRange::from_wire(start, end)
    }

    /// Checks order, balance and furthest ends, and returns the height.
    fn check(tree: &Tree) -> u32 {
        let Some(node) = tree else { return 0 };
        let (left, right) = (check(&node.left), check(&node.right));
        assert!(left.abs_diff(right) <= 1, "a node with heights {left} and {right} below");
        assert_eq!(node.height, 1 + left.max(right));
        let mut furthest = node.end.clone();
        if let Some(left) = &node.left {
            assert!((&left.start, &left.end) < (&node.start, &node.end));
            furthest = furthest.max(left.furthest.clone());
        }
        if let Some(right) = &node.right {
            assert!((&right.start, &right.end) > (&node.start, &node.end));
            furthest = furthest.max(right.furthest.clone());
        }
        assert_eq!(node.furthest, furthest);
        node.height
    }

    #[test]
    fn finds_what_a_walk_over_all_ranges_finds() {
        for seed in 0..20 {
            println!("seed {seed}");
            let mut random = Random::new(seed);
            let mut index = Index::default();
            let mut model: Vec<(Slot, KeyRange)> = Vec::new();
            for slot in 0..600 {
                if !model.is_empty() && random.below(5) < 2 {
                    let (slot, range) = model.swap_remove(random.below(model.len()));
                    index.remove(&range, slot);
                } else {
                    let range = range(&mut random);
                    index.insert(&range, slot);
                    model.push((slot, range));
                }
                check(&index.ranges);
                let key = key(&mut random);
                let mut found = Vec::new();
                index.visit(&key, &mut |slot| found.push(slot));
                found.sort_unstable();
                let holding = model.iter().filter(|(_, range)| range.contains(&key));
                let mut expected: Vec<Slot> = holding.map(|(slot, _)| *slot).collect();
                expected.sort_unstable();
                assert_eq!(found, expected, "key {key:?}");
            }
            for (slot, range) in model {
                index.remove(&range, slot);
            }
            assert!(index.keys.is_empty() && index.ranges.is_none(), "nothing is left behind");
        }
    }

    #[test]
    fn ascending_ranges_do_not_make_a_list() {
        let mut index = Index::default();
        for slot in 0..4096_usize {
            let start = Bytes::from(format!("{slot:08}"));
            let end = Bytes::from(format!("{:08}", slot + 1));
            index.insert(&KeyRange::from_wire(start, end), slot);
        }
        assert!(check(&index.ranges) <= 18, "1.44 * log2(4096)");
    }
}
