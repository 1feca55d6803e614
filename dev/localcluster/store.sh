#!/bin/bash
# Imports image archives into a containerd store that no cluster uses yet.   store.sh FOLDER ARCHIVE...
# Unpacking our images costs a dozen seconds of processor time. Done once here, each node of each cluster then takes the
# store by hard links in a second (node.sh). Run by dev/images in mount and process namespaces of its own.
set -euo pipefail
folder=$1
shift
mkdir -p "$folder/root"
mount --make-rslave /
mount -t tmpfs tmpfs /run
cat >/run/containerd.toml <<TOML
version = 2
root = "$folder/root"
state = "/run/containerd-state"
oom_score = 0
[grpc]
  address = "/run/containerd.sock"
[plugins."io.containerd.internal.v1.opt"]
  path = "/run/containerd-opt"
[plugins."io.containerd.grpc.v1.cri".cni]
  conf_dir = "/run/cni"  # it would make the default one, below /etc
TOML
containerd -c /run/containerd.toml >"$folder/log" 2>&1 &
ctr=(timeout 300 ctr --address /run/containerd.sock --namespace k8s.io)
for _ in {1..100}; do
    "${ctr[@]}" version >/dev/null 2>&1 && break
    sleep 0.1
done
for archive in "$@"; do
    "${ctr[@]}" images import "$archive" || { tail -n 20 "$folder/log"; exit 1; }
done
# The part that serves the kubelet adds a second name, the digest, to each image; a moment later, so wait for it.
for _ in {1..100}; do
    (($("${ctr[@]}" images ls -q | grep -c '^sha256:') >= $#)) && break
    sleep 0.1
done
kill -TERM %1
wait
