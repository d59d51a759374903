//! The sources of kvorum as words, for the tests of the rules of the house.
//!
//! A file is read by Rust's own lexer, so comments and the insides of strings are
//! never taken for code. It becomes a flat list of [`Word`]s, each of which knows its
//! line and whether it stands in test code:
//!
//! ```text
//! use crate::log::Mark; // a comment     use · crate · :: · log · :: · Mark · ;
//! ```

#![allow(dead_code, reason = "every test binary uses a part of this")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};

use proc_macro2::{Delimiter, TokenStream, TokenTree};

/// The directory that holds `Cargo.toml`.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// One file of Rust.
pub(crate) struct Source {
    /// From the root, with `/`: `src/mvcc/tree.rs`.
    pub(crate) path: String,
    pub(crate) text: String,
}

/// A name, a punctuation mark (`::` is one), a bracket, or a literal (`""`).
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Word {
    pub(crate) text: String,
    /// Counted from 1.
    pub(crate) line: usize,
    /// In a test or in a module of tests.
    pub(crate) in_test: bool,
    /// How many modules of the file it stands in.
    nesting: usize,
}

impl Source {
    pub(crate) fn new(path: &str, text: &str) -> Source {
        Source { path: path.to_owned(), text: text.to_owned() }
    }

    /// Whether all of it is test code, by its name.
    pub(crate) fn is_test(&self) -> bool {
        self.path.ends_with("tests.rs") || self.path.starts_with("tests/")
    }

    /// The room of a file of the library: the module below the crate's root.
    pub(crate) fn room(&self) -> &str {
        let below = self.path.strip_prefix("src/").unwrap_or(&self.path);
        let room = below.split('/').next().unwrap_or(below);
        room.strip_suffix(".rs").unwrap_or(room)
    }

    /// The file's code.
    pub(crate) fn words(&self) -> Vec<Word> {
        let tokens: TokenStream =
            self.text.parse().unwrap_or_else(|error| panic!("{}: {error}", self.path));
        let mut words = Vec::new();
        flatten(tokens, self.is_test(), 0, &mut words);
        words
    }

    /// The rooms that the file names, by `crate::…` or by as many `super::` as lead to
    /// the crate's root, with the lines on which it does.
    pub(crate) fn named_rooms(&self) -> Vec<(usize, String)> {
        let words = self.words();
        let text = |at: usize| words.get(at).map_or("", |word| word.text.as_str());
        let depth = self.depth();
        let mut found = Vec::new();
        for (at, word) in words.iter().enumerate() {
            if at > 0 && text(at - 1) == "::" {
                continue;
            }
            let mut next = at;
            match word.text.as_str() {
                "crate" if text(at + 1) == "::" => next += 2,
                "super" => {
                    let mut supers = 0;
                    while text(next) == "super" && text(next + 1) == "::" {
                        supers += 1;
                        next += 2;
                    }
                    if supers != depth + word.nesting {
                        continue;
                    }
                }
                _ => continue,
            }
            if text(next) != "{" {
                found.push((word.line, text(next).to_owned()));
                continue;
            }
            // use crate::{a, b::{c, d}};
            let mut open = 0;
            for (at, word) in words.iter().enumerate().skip(next) {
                match word.text.as_str() {
                    "{" => open += 1,
                    "}" => open -= 1,
                    name if open == 1 && ["{", ","].contains(&text(at - 1)) => {
                        found.push((word.line, name.to_owned()));
                    }
                    _ => {}
                }
                if open == 0 {
                    break;
                }
            }
        }
        found
    }

    /// The crates and local names with which paths begin, tests apart: `sled` in
    /// `sled::Db`.
    pub(crate) fn path_heads(&self) -> Vec<(usize, String)> {
        let words = self.words();
        let is_path = |word: Option<&Word>| word.is_some_and(|word| word.text == "::");
        let heads = words.iter().enumerate().filter(|(at, word)| {
            let first = *at == 0 || !is_path(words.get(at - 1));
            let name = word.text.starts_with(|c: char| c.is_alphabetic() || c == '_');
            first && name && !word.in_test && is_path(words.get(at + 1))
        });
        heads.map(|(_, word)| (word.line, word.text.clone())).collect()
    }

    /// How many modules lie between the crate's root and the file's own.
    fn depth(&self) -> usize {
        let below = self.path.strip_prefix("src/").unwrap_or(&self.path);
        let parts = below.split('/').count();
        if below.ends_with("/mod.rs") { parts - 1 } else { parts }
    }
}

fn flatten(tokens: TokenStream, in_test: bool, nesting: usize, words: &mut Vec<Word>) {
    let mut item_is_test = false;
    // The two words before: `mod name {` opens a module.
    let mut before = [String::new(), String::new()];
    for token in tokens {
        let in_test = in_test || item_is_test;
        let line = token.span().start().line;
        let text = match &token {
            TokenTree::Group(group) => {
                let (open, close) = match group.delimiter() {
                    Delimiter::Brace => ("{", "}"),
                    Delimiter::Bracket => ("[", "]"),
                    Delimiter::Parenthesis => ("(", ")"),
                    Delimiter::None => ("", ""),
                };
                let module = before[0] == "mod" && open == "{";
                let word =
                    |text: &str, line| Word { text: text.to_owned(), line, in_test, nesting };
                words.push(word(open, line));
                flatten(group.stream(), in_test, nesting + usize::from(module), words);
                words.push(word(close, group.span_close().start().line));
                let attribute = before[1] == "#" && open == "[";
                if attribute {
                    let written = group.stream().to_string().replace(' ', "");
                    item_is_test |= ["cfg(test)", "test"].contains(&written.as_str());
                } else if open == "{" {
                    item_is_test = false;
                }
                String::new()
            }
            TokenTree::Literal(_) => "\"\"".to_owned(),
            TokenTree::Ident(name) => name.to_string(),
            TokenTree::Punct(mark) => mark.to_string(),
        };
        if text == ":" && before[1] == ":" {
            if let Some(last) = words.last_mut() {
                last.text = "::".to_owned();
            }
            before = [String::new(), "::".to_owned()];
            continue;
        }
        if !text.is_empty() {
            words.push(Word { text: text.clone(), line, in_test, nesting });
        }
        if text == ";" {
            item_is_test = false;
        }
        let [_, last] = before;
        before = [last, text];
    }
}

/// The files of the library and the program, but for generated code.
pub(crate) fn library() -> Vec<Source> {
    let found: Vec<Source> =
        below("src").into_iter().filter(|source| !source.path.starts_with("src/pb/")).collect();
    assert!(found.len() > 50, "the sources are not where they are looked for");
    found
}

/// The Rust files below a directory, by name.
pub(crate) fn below(directory: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    let mut directories = vec![root().join(directory)];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path: PathBuf = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(root()).unwrap().to_str().unwrap();
                sources.push(Source::new(name, &fs::read_to_string(&path).unwrap()));
            }
        }
    }
    sources.sort_by(|a, b| a.path.cmp(&b.path));
    sources
}
