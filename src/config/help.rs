//! `--help`, made from the table of flags.

use super::flag::{self, Config, Group};

/// What a mistake on the command line is followed by.
pub(super) fn usage() -> String {
    "Usage:

  kvorum [flags]
    Start a server.

  kvorum snapshot save|status|restore
    Save a server's snapshot, look at one, or restore one, as etcdctl and etcdutl do.

  kvorum --version
    Show the version of etcd whose behaviour this is, and of kvorum.

  kvorum -h | --help
    Show the help information about the flags.

  kvorum --config-file
    Path to the configuration file, in YAML. When it is given, every other flag and environment variable is ignored.
    Durations are integer nanoseconds (600000000000 for 10m) or texts such as \"10m\".

Every flag has an environment variable: ETCD_ and the flag in capitals, with _ for -.
"
    .to_owned()
}

/// The flags by group, each on a line of its own with its default.
pub(super) fn flags() -> String {
    let mut defaults = Config::default();
    let mut text = String::new();
    for group in Group::ALL {
        text.push_str(group.title());
        text.push_str(":\n");
        for flag in flag::all().filter(|flag| flag.group == group) {
            text.push_str(&format!("  --{} '{}'\n", flag.name, shown_default(flag, &mut defaults)));
            for line in flag.help {
                text.push_str(&format!("    {}\n", line.trim()));
            }
            if flag.name == "feature-gates" {
                for line in flag::gate_lines() {
                    text.push_str(&format!("    {line}\n"));
                }
            }
            match flag.effect {
                flag::Effect::Works => {}
                flag::Effect::Nothing(why) => {
                    text.push_str(&format!("    Has no effect here: {why}.\n"))
                }
                flag::Effect::Refused(why) => {
                    text.push_str(&format!("    Refused unless it is the default: {why}.\n"))
                }
            }
        }
        text.push('\n');
    }
    text.push_str("CAUTIOUS with unsafe flags! They may break the guarantees given by the consensus protocol!\n");
    text
}

/// A flag's default as help and documentation show it.
pub(super) fn shown_default(flag: &flag::Flag, defaults: &mut Config) -> String {
    match flag.name {
        "data-dir" => "${name}.etcd".to_owned(),
        "version" => "false".to_owned(),
        _ => flag.text(defaults),
    }
}
