#!/bin/sh
# Builds the judges (etcd, etcdctl, etcdutl at the versions go.mod pins, and the
# user of etcd's client in client/) into the directory given, by default
# target/judge. What is there already and was built from the same go.mod and
# sources is left alone. Needs Go and, the first time, the Go module proxy.
#
# After the directory, the minors of etcd that are wanted as well, each of which
# has a go.mod of its own here: `build.sh target/judge v3.5 v3.6` builds these
# into target/judge/v3.5 and target/judge/v3.6.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
out=${1:-$here/../../target/judge}
[ $# -eq 0 ] || shift
mkdir -p "$out"
out=$(cd "$out" && pwd)
PATH=$PATH:/usr/local/go/bin

# As etcd's own releases are built: static, without cgo.
export CGO_ENABLED=0 GOFLAGS=-buildvcs=false

# etcd, etcdctl and etcdutl by the go.mod of the present directory, into $1.
build() {
    if ! { [ -x "$1/etcd" ] && [ -x "$1/etcdctl" ] && [ -x "$1/etcdutl" ] && cmp -s go.sum "$1/go.sum"; }; then
        mkdir -p "$1"
        rm -f "$1/go.sum" "$1/client.go"
        go build -mod=readonly -trimpath -o "$1/etcd" go.etcd.io/etcd/server/v3
        go build -mod=readonly -trimpath -o "$1/etcdctl" go.etcd.io/etcd/etcdctl/v3
        go build -mod=readonly -trimpath -o "$1/etcdutl" go.etcd.io/etcd/etcdutl/v3
        cp go.sum "$1/go.sum"
    fi
}

cd "$here"
build "$out"
if ! { [ -x "$out/client" ] && cmp -s client/main.go "$out/client.go"; }; then
    go build -mod=readonly -trimpath -o "$out/client" ./client
    cp client/main.go "$out/client.go"
fi
for minor in "$@"; do
    cd "$here/$minor"
    build "$out/$minor"
done
