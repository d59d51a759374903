//! `--feature-gates`: etcd's switches for behaviour that is not yet its default.
//!
//! `A=true,B=false`; `AllAlpha` and `AllBeta` decide every gate of that stage which
//! is not named itself, in whatever order they are written.

use std::collections::BTreeMap;
use std::fmt;

/// How settled a gate's behaviour is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Off unless asked for.
    Alpha,
    /// On unless switched off.
    Beta,
}

impl Stage {
    /// `ALPHA` or `BETA`, as etcd's metric and help spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Stage::Alpha => "ALPHA",
            Stage::Beta => "BETA",
        }
    }
}

macro_rules! gates {
    ($($(#[doc = $doc:literal])+ $gate:ident $stage:ident $default:literal;)*) => {
        /// A gate of the etcd release named in [`crate::version`].
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Gate { $($(#[doc = $doc])+ $gate,)* }

        impl Gate {
            /// Every gate, by name.
            pub const ALL: &'static [Gate] = &[$(Gate::$gate,)*];

            /// The name as the flag spells it.
            pub fn name(self) -> &'static str {
                match self { $(Gate::$gate => stringify!($gate),)* }
            }

            /// How settled it is.
            pub fn stage(self) -> Stage {
                match self { $(Gate::$gate => Stage::$stage,)* }
            }

            /// Whether it is on when nothing is said.
            pub fn default_state(self) -> bool {
                match self { $(Gate::$gate => $default,)* }
            }
        }
    };
}

gates! {
    /// Every alpha gate not named itself.
    AllAlpha Alpha false;
    /// Every beta gate not named itself.
    AllBeta Beta false;
    /// The leader compares hashes of compacted data with its followers.
    CompactHashCheck Alpha false;
    /// Keepalives of leases do not wait for the applied index.
    FastLeaseKeepAlive Beta true;
    /// Compare data with the peers before serving.
    InitialCorruptCheck Alpha false;
    /// The leader tells the members the remaining time of long leases.
    LeaseCheckpoint Alpha false;
    /// The remaining time of leases is stored; needs `LeaseCheckpoint`.
    LeaseCheckpointPersist Alpha false;
    /// Some requests pass others under overload.
    PriorityRequest Alpha false;
    /// Dial peers from the address that is advertised.
    SetMemberLocalAddr Alpha false;
    /// Refuse requests while defragmenting.
    StopGRPCServiceOnDefrag Alpha false;
    /// A bbolt optimisation.
    TxnModeWriteWithSharedBuffer Beta true;
}

impl Gate {
    /// Why switching it changes nothing here; `None` of those that do.
    pub(super) fn idle(self) -> Option<&'static str> {
        match self {
            Gate::AllAlpha | Gate::AllBeta => None,
            Gate::CompactHashCheck | Gate::InitialCorruptCheck => None,
            _ => Some("what the gate switches in etcd is always on here, or does not exist"),
        }
    }

    fn named(name: &str) -> Option<Gate> {
        Gate::ALL.iter().copied().find(|gate| gate.name() == name)
    }
}

/// The gates as set; those not named have their default.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FeatureGates {
    named: BTreeMap<Gate, bool>,
}

impl FeatureGates {
    /// Whether a gate is on.
    pub fn enabled(&self, gate: Gate) -> bool {
        let stage_wide = match gate.stage() {
            Stage::Alpha => Gate::AllAlpha,
            Stage::Beta => Gate::AllBeta,
        };
        self.named
            .get(&gate)
            .or_else(|| self.named.get(&stage_wide))
            .copied()
            .unwrap_or(gate.default_state())
    }

    /// Switches a gate on or off.
    pub fn set(&mut self, gate: Gate, on: bool) {
        self.named.insert(gate, on);
    }

    /// Takes over `A=true,B=false`, keeping what was set before; all or nothing.
    pub(super) fn merge(&mut self, text: &str) -> Result<(), String> {
        let mut merged = self.clone();
        for item in text.split(',').filter(|item| !item.is_empty()) {
            let (name, value) = match item.split_once('=') {
                Some((name, value)) => (name.trim(), value.trim()),
                None => return Err(format!("missing bool value for {}", item.trim())),
            };
            let on = super::value::parse_bool(value).ok_or_else(|| {
                format!(
                    "invalid value of {name}={value}, err: strconv.ParseBool: parsing {value:?}: invalid syntax"
                )
            })?;
            let gate =
                Gate::named(name).ok_or_else(|| format!("unrecognized feature gate: {name}"))?;
            merged.named.insert(gate, on);
        }
        *self = merged;
        Ok(())
    }
}

impl fmt::Display for FeatureGates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (gate, on)) in self.named.iter().enumerate() {
            let comma = if i == 0 { "" } else { "," };
            write!(f, "{comma}{}={on}", gate.name())?;
        }
        Ok(())
    }
}
