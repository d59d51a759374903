//! Flags: `--name value`, `--name=value`, and switches without a value.

use std::collections::BTreeMap;

/// What was on the command line and has not been asked for yet.
pub struct Args {
    words: Vec<String>,
    flags: BTreeMap<String, String>,
}

impl Args {
    /// Reads `arguments`; `switches` take no value.
    pub fn parse(
        arguments: impl Iterator<Item = String>,
        switches: &[&str],
    ) -> Result<Args, String> {
        let mut args = Args { words: Vec::new(), flags: BTreeMap::new() };
        let mut arguments = arguments;
        while let Some(argument) = arguments.next() {
            let Some(flag) = argument.strip_prefix("--") else {
                args.words.push(argument);
                continue;
            };
            let (name, value) = match flag.split_once('=') {
                Some((name, value)) => (name.to_owned(), value.to_owned()),
                None if switches.contains(&flag) => (flag.to_owned(), "true".to_owned()),
                None => {
                    let value = arguments.next();
                    (flag.to_owned(), value.ok_or_else(|| format!("--{flag} needs a value"))?)
                }
            };
            args.flags.insert(name, value);
        }
        Ok(args)
    }

    /// The first word.
    pub fn command(&mut self) -> Option<String> {
        (!self.words.is_empty()).then(|| self.words.remove(0))
    }

    /// Whether a switch is on.
    pub fn flag(&mut self, name: &str) -> bool {
        self.flags.remove(name).is_some_and(|value| value == "true")
    }

    /// A flag's text.
    pub fn text(&mut self, name: &str, default: &str) -> String {
        self.flags.remove(name).unwrap_or_else(|| default.to_owned())
    }

    /// A flag's number.
    pub fn number(&mut self, name: &str, default: usize) -> Result<usize, String> {
        Ok(self.optional(name)?.map_or(default, |number| number as usize))
    }

    /// A flag's number, if it is given.
    pub fn optional(&mut self, name: &str) -> Result<Option<u64>, String> {
        let Some(text) = self.flags.remove(name) else { return Ok(None) };
        text.parse().map(Some).map_err(|_| format!("--{name} is {text:?}, not a number"))
    }

    /// A flag's number, perhaps with a fraction.
    pub fn real(&mut self, name: &str, default: f64) -> Result<f64, String> {
        let Some(text) = self.flags.remove(name) else { return Ok(default) };
        text.parse().map_err(|_| format!("--{name} is {text:?}, not a number"))
    }

    /// Refuses what nobody asked for.
    pub fn finish(self) -> Result<(), String> {
        match (self.words.first(), self.flags.keys().next()) {
            (Some(word), _) => Err(format!("what is {word:?}?")),
            (None, Some(flag)) => Err(format!("there is no flag --{flag} here")),
            (None, None) => Ok(()),
        }
    }
}
