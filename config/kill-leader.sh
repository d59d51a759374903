#!/bin/sh
# Kills the leader of the cluster that one-machine-1.yml to -3.yml make, and writes on:
# to see what that is like. Needs etcdctl.
set -eu
export ETCDCTL_ENDPOINTS=127.0.0.1:2379,127.0.0.1:22379,127.0.0.1:32379
# endpoint, id, versions and sizes, whether it leads, whether it only listens, ...
leader=$(etcdctl endpoint status | awk -F ', ' '/, true, false, /{ print $1; exit }')
case $leader in
*:2379) member=1 ;;
*:22379) member=2 ;;
*:32379) member=3 ;;
*) echo "no leader found: are the three running?" >&2 && exit 1 ;;
esac
echo "killing member $member, the leader"
pkill -KILL -f "[c]onfig-file=config/one-machine-$member.yml"
export ETCDCTL_ENDPOINTS=$(echo "$ETCDCTL_ENDPOINTS" | tr , '\n' | grep -vx "$leader" | paste -sd ,)
time etcdctl put greeting "still here, without member $member"
etcdctl get greeting
