//! The generated code in `src/pb/` is checked in, so that building kvorum needs
//! neither protoc nor a build script. This test regenerates it from `proto/`
//! and fails when what is checked in is stale; `KVORUM_REGENERATE=1 cargo test
//! --test proto` rewrites it.

#![expect(clippy::expect_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use prost::Message as _;
use prost_types::field_descriptor_proto::Type;

const FILES: &[&str] = &[
    "mvccpb/kv.proto",
    "authpb/auth.proto",
    "etcdserverpb/rpc.proto",
    "v3electionpb/v3election.proto",
    "v3lockpb/v3lock.proto",
    "leasepb/lease.proto",
    "grpc/health/v1/health.proto",
    "kvorumpb/command.proto",
    "kvorumpb/peer.proto",
];

/// Packages in these files.
const PACKAGES: usize = 8;

/// Fields whose messages the server never decodes: it keeps the encoded bytes
/// and copies them into the reply. On the wire `bytes` and a message are the
/// same.
const KEPT_ENCODED: &[(&str, &str)] = &[
    ("RangeResponse", "kvs"),
    ("PutResponse", "prev_kv"),
    ("DeleteRangeResponse", "prev_kvs"),
    ("WatchResponse", "events"),
];

fn generate() -> BTreeMap<PathBuf, Vec<u8>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("proto");
    let mut descriptors = protox::compile(FILES, [&root]).expect("proto/ compiles");
    let mut generated = BTreeMap::new();
    generated.insert(PathBuf::from("descriptor.bin"), descriptors.encode_to_vec());

    for file in &mut descriptors.file {
        for message in &mut file.message_type {
            let name = message.name().to_owned();
            for field in &mut message.field {
                if KEPT_ENCODED.contains(&(&name, field.name())) {
                    field.type_name = None;
                    field.set_type(Type::Bytes);
                }
            }
        }
    }
    let out = tempfile::tempdir().expect("a temporary directory");
    tonic_prost_build::configure()
        .bytes(".")
        .out_dir(out.path())
        .emit_rerun_if_changed(false)
        .compile_fds(descriptors)
        .expect("code generation succeeds");
    for entry in std::fs::read_dir(out.path()).expect("the output directory is readable") {
        let path = entry.expect("the entry is readable").path();
        let name = PathBuf::from(path.file_name().expect("a generated file has a name"));
        generated.insert(name, std::fs::read(&path).expect("a generated file is readable"));
    }
    generated
}

#[test]
fn checked_in_code_is_what_proto_generates() {
    let checked_in = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/pb");
    let regenerate = std::env::var_os("KVORUM_REGENERATE").is_some();
    let generated = generate();
    assert!(generated.len() > PACKAGES, "one file for each package, and the descriptor");
    for (name, bytes) in generated {
        let path = checked_in.join(&name);
        if regenerate {
            std::fs::write(&path, &bytes).expect("src/pb is writable");
        }
        let current = std::fs::read(&path).unwrap_or_default();
        assert!(
            current == bytes,
            "src/pb/{} is stale: run KVORUM_REGENERATE=1 cargo test --test proto",
            name.display()
        );
    }
}
