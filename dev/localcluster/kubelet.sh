#!/bin/bash
# Starts a node's kubelet in the background, from inside the node's namespaces. A file of its own because
# "dev/cluster start-kubelet" uses it too.   kubelet.sh STATE PROGRAMS INDEX
set -euo pipefail
state=$1 programs=$2 index=$3
node=$state/node$index
# The default --root-dir stays: device plugins and agents look for the kubelet's sockets under /var/lib/kubelet.
setsid "$programs/kubelet" --config="$node/kubelet.yaml" --kubeconfig="$state/kubeconfigs/node$index" \
    --hostname-override="node$index" --node-ip="10.250.0.$((index + 1))" --node-labels=nvidia.com/gpu.present=true \
    --cert-dir="$node/kubelet-certificates" >>"$state/logs/kubelet-node$index.log" 2>&1 </dev/null &
echo $! >"$node/kubelet.pid"
