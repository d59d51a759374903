# `just check` never writes to the sources; `just fix` does.

# What CI runs.
check: fmt lint doc deny test

# Formatting is as rustfmt.toml says.
fmt:
    cargo fmt --all --check

# Lints are those of Cargo.toml and clippy.toml, and none is only a warning.
lint:
    cargo clippy --workspace --all-targets -- -D warnings

# Links of the documentation lead somewhere.
doc:
    RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps

# Licences, advisories and sources of dependencies, as deny.toml says.
deny:
    cargo deny check

# All tests.
test:
    cargo test --workspace

# Puts right what a program can.
fix:
    cargo fmt --all
    cargo clippy --workspace --all-targets --fix --allow-dirty --allow-staged
    KVORUM_UPDATE_DOCS=1 cargo test --lib config
    KVORUM_REGENERATE=1 cargo test --test proto
    cargo update --workspace --manifest-path tests/third-party/Cargo.toml
    cargo fmt --manifest-path tests/chaos/Cargo.toml

# Side by side with etcd; takes minutes. `just bench --rounds 1` is quicker.
bench *flags: contestants
    target/release/kvorum-bench compare {{flags}}

# Throughput of three members of each, as a table.
cluster *flags: contestants
    target/release/kvorum-bench cluster {{flags}}

# Leaders killed under load: how long nothing can be written. Takes ten minutes.
failover *flags: contestants
    target/release/kvorum-bench failover {{flags}}

# Members restarted in turns under load from etcd's Go client: which requests fail.
rolling *flags: contestants
    target/release/kvorum-bench rolling {{flags}}

# A member that was left 1 GiB behind catches up: how long, and what it costs the leader.
snapshot-catchup *flags: contestants
    target/release/kvorum-bench snapshot-catchup {{flags}}

# Keys that come and go: disk and memory. Takes half an hour; --writes 1000000 takes minutes.
sliding-window *flags: contestants
    target/release/kvorum-bench sliding-window {{flags}}

# Defragmentation of 1 GiB under load.
defragment *flags: contestants
    target/release/kvorum-bench defragment {{flags}}

# etcd and kvorum, as they are measured.
contestants: judges
    cargo build --release --workspace

# etcd, etcdctl and etcdutl, those of older minors too, and a user of etcd's client: to compare with.
judges:
    tests/judge/build.sh target/judge v3.5 v3.6

# Breaks a cluster of kvorum on purpose, and checks it; docs/chaos.md has the flags.
chaos *flags:
    cargo build --release
    cargo run --manifest-path tests/chaos/Cargo.toml --target-dir target/chaos -- --server target/release/kvorum {{flags}}

# Whether the checks of chaos find what is wrong, and nothing wrong with etcd.
chaos-test: judges
    cargo test --manifest-path tests/chaos/Cargo.toml --target-dir target/chaos
