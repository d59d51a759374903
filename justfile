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
bench *flags: judges
    cargo build --release --workspace
    target/release/kvorum-bench compare --etcd target/judge/etcd --kvorum target/release/kvorum --dir target/bench {{flags}}

# etcd, etcdctl and etcdutl, to compare with.
judges:
    tests/judge/build.sh

# Breaks a cluster of kvorum on purpose, and checks it; docs/chaos.md has the flags.
chaos *flags:
    cargo build --release
    cargo run --manifest-path tests/chaos/Cargo.toml --target-dir target/chaos -- --server target/release/kvorum {{flags}}

# Whether the checks of chaos find what is wrong, and nothing wrong with etcd.
chaos-test: judges
    cargo test --manifest-path tests/chaos/Cargo.toml --target-dir target/chaos
