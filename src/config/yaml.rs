//! A configuration file as a list of leaves, each with the path of its key:
//!
//! ```text
//! name: n1                         name                                  n1
//! client-transport-security:       client-transport-security.cert-file   /etc/x.crt
//!   cert-file: /etc/x.crt
//! ```

use serde_yaml_ng::Value as Yaml;

use super::flag;

/// The leaves of a file, in the order of the file.
pub(super) fn leaves(text: &str) -> Result<Vec<(String, Yaml)>, String> {
    let root: Yaml =
        serde_yaml_ng::from_str(text).map_err(|error| format!("the file is not YAML: {error}"))?;
    let mut leaves = Vec::new();
    match root {
        Yaml::Null => {}
        Yaml::Mapping(_) => walk("", root, &mut leaves)?,
        _ => return Err("the file does not consist of `key: value` lines".to_owned()),
    }
    Ok(leaves)
}

/// Recursion ends: the reader of YAML refuses a document nested deeper than 128.
fn walk(path: &str, value: Yaml, leaves: &mut Vec<(String, Yaml)>) -> Result<(), String> {
    let Yaml::Mapping(mapping) = value else {
        leaves.push((path.to_owned(), value));
        return Ok(());
    };
    for (key, value) in mapping {
        let Some(key) = key.as_str() else {
            return Err(format!(
                "a key{} is not a text",
                if path.is_empty() { String::new() } else { format!(" of {path}") }
            ));
        };
        let path = if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
        walk(&path, value, leaves)?;
    }
    Ok(())
}

/// Whether keys stand below this one.
pub(super) fn is_section(key: &str) -> bool {
    flag::all()
        .filter_map(|flag| flag.yaml_path())
        .any(|path| path.strip_prefix(key).is_some_and(|rest| rest.starts_with('.')))
}

/// A leaf as the command line would have it, for messages and old names.
pub(super) fn scalar_text(value: &Yaml) -> String {
    match value {
        Yaml::String(text) => text.clone(),
        Yaml::Bool(on) => on.to_string(),
        Yaml::Number(number) => number.to_string(),
        Yaml::Sequence(items) => items.iter().map(scalar_text).collect::<Vec<_>>().join(","),
        _ => String::new(),
    }
}
