#!/bin/sh
# Builds the judges (etcd, etcdctl, etcdutl at the versions go.mod pins, and the
# user of etcd's client in client/) into the directory given, by default
# target/judge. What is there already and was built from the same go.mod and
# sources is left alone. Needs Go and, the first time, the Go module proxy.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
out=${1:-$here/../../target/judge}
mkdir -p "$out"
out=$(cd "$out" && pwd)
PATH=$PATH:/usr/local/go/bin

cd "$here"
# As etcd's own releases are built: static, without cgo.
export CGO_ENABLED=0 GOFLAGS=-buildvcs=false
if ! { [ -x "$out/etcd" ] && [ -x "$out/etcdctl" ] && [ -x "$out/etcdutl" ] && cmp -s go.sum "$out/go.sum"; }; then
    rm -f "$out/go.sum" "$out/client.go"
    go build -mod=readonly -trimpath -o "$out/etcd" go.etcd.io/etcd/server/v3
    go build -mod=readonly -trimpath -o "$out/etcdctl" go.etcd.io/etcd/etcdctl/v3
    go build -mod=readonly -trimpath -o "$out/etcdutl" go.etcd.io/etcd/etcdutl/v3
    cp go.sum "$out/go.sum"
fi
if ! { [ -x "$out/client" ] && cmp -s client/main.go "$out/client.go"; }; then
    go build -mod=readonly -trimpath -o "$out/client" ./client
    cp client/main.go "$out/client.go"
fi
