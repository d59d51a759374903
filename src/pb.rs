//! Messages and services generated from `proto/`; `tests/proto.rs` says how.
//!
//! Replies that carry stored records (`RangeResponse::kvs`, `WatchResponse::events`,
//! the `prev_kv` fields) hold them encoded, as `bytes`: what is stored is what is
//! sent. `decode` them as [`mvccpb::KeyValue`] or [`mvccpb::Event`] to look inside.

#![allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    clippy::allow_attributes_without_reason,
    reason = "generated code; the wire is documented by etcd"
)]

/// Users, roles and permissions.
pub mod authpb {
    include!("pb/authpb.rs");
}
/// etcd's services: KV, Watch, Lease, Cluster, Maintenance, Auth.
pub mod etcdserverpb {
    include!("pb/etcdserverpb.rs");
}
/// The log command and the records that are kvorum's own.
pub mod kvorumpb {
    include!("pb/kvorumpb.rs");
}
/// Leases as a checkpoint and a snapshot file store them.
pub mod leasepb {
    include!("pb/leasepb.rs");
}
/// Keys and events.
pub mod mvccpb {
    include!("pb/mvccpb.rs");
}
/// The Election service.
pub mod v3electionpb {
    include!("pb/v3electionpb.rs");
}
/// The Lock service.
pub mod v3lockpb {
    include!("pb/v3lockpb.rs");
}
/// gRPC's health checking protocol.
pub mod health {
    include!("pb/grpc.health.v1.rs");
}

/// Every message and service of `proto/` as an encoded `FileDescriptorSet`, with
/// record fields as messages: for the JSON gateway.
pub const DESCRIPTORS: &[u8] = include_bytes!("pb/descriptor.bin");
