#!/bin/bash
# One node, in a mount namespace of its own (node 1 also in its own network namespace): containerd, kubelet, kube-proxy.
#   node.sh STATE PROGRAMS NAME INDEX
set -euo pipefail
state=$1 programs=$2 name=$3 index=$4
here=$(dirname "$(realpath "$0")")
node=$state/node$index
group=wattlock-$name-node$index
. "$here/mountpoints.sh"
trap 'echo "node$index: line $LINENO failed: $BASH_COMMAND" >>"$state/failed"' ERR
echo $$ >"$node/pid"

# Every folder that a hostPath names is one per node, or the two nodes on this one kernel would share it.
for point in "${MOUNT_POINTS[@]}"; do
    mkdir -p "$node/host$point"
    mount --bind "$node/host$point" "$point"
done
mount --make-rshared /var/lib/kubelet # pod volumes are mounted below it and must reach the containers
# The filter that lets bridged packages reach iptables is set per network namespace; absent where it is not built in.
sysctl -qw net.bridge.bridge-nf-call-iptables=1 2>/dev/null || true

# Two kubelets on one kernel need a cgroup each. Version 2 has one tree, version 1 one tree for each controller.
if [[ -e /sys/fs/cgroup/cgroup.controllers ]]; then
    mkdir -p "/sys/fs/cgroup/$group"
    for controller in $(</sys/fs/cgroup/cgroup.controllers); do
        echo "+$controller" >/sys/fs/cgroup/cgroup.subtree_control || true
        echo "+$controller" >"/sys/fs/cgroup/$group/cgroup.subtree_control" || true
    done 2>/dev/null
else
    for tree in /sys/fs/cgroup/*/; do
        [[ ! -e $tree/cgroup.procs ]] || mkdir -p "$tree/$group"
    done
    for file in cpuset.cpus cpuset.mems; do # empty in a new group, and then no process may enter it
        cat "/sys/fs/cgroup/cpuset/$file" >"/sys/fs/cgroup/cpuset/$group/$file"
    done
fi

mkdir -p "$node/cni" "$node/containerd"
cat >"$node/containerd.toml" <<TOML
version = 2
root = "$node/containerd/root"
state = "$node/containerd/state"
oom_score = 0  # lowering it needs CAP_SYS_RESOURCE, which root lacks on some machines
[grpc]
  address = "$node/containerd.sock"
[plugins."io.containerd.internal.v1.opt"]
  path = "$node/containerd/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/pause:3.10"
  restrict_oom_score_adj = true
  disable_apparmor = true
  stream_server_address = "127.0.0.1"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "$node/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
TOML
cat >"$node/kubelet.yaml" <<YAML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: 0.0.0.0  # the API server reaches it here for logs and exec
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}  # fine only because nothing outside reaches this network
authorization: {mode: AlwaysAllow}
cgroupDriver: cgroupfs  # systemd may not be there
cgroupRoot: /$group
failCgroupV1: false
failSwapOn: false
oomScoreAdj: 0
containerRuntimeEndpoint: unix://$node/containerd.sock
resolvConf: ""
clusterDomain: cluster.local
clusterDNS: [10.96.0.10]  # nobody serves there; the kubelet only wants an address
hairpinMode: hairpin-veth
serializeImagePulls: false
imageGCHighThresholdPercent: 100  # a collected image could not be pulled again
evictionHard: {memory.available: 100Mi, nodefs.available: "1%", imagefs.available: "1%"}
podLogsDir: $node/podlogs
volumePluginDir: $node/volumeplugins
syncFrequency: 5s
crashLoopBackOff: {maxContainerRestartPeriod: 2s}  # tests kill containers again and again
nodeStatusReportFrequency: 10s
YAML
cat >"$node/kube-proxy.yaml" <<YAML
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: iptables
hostnameOverride: node$index
clientConnection: {kubeconfig: $state/kubeconfigs/kube-proxy}
clusterCIDR: 10.244.0.0/16
conntrack: {maxPerCore: 0, min: 0}  # these limits are read-only inside a network namespace
YAML
cat >"$node/cni/10-bridge.conflist" <<JSON
{"cniVersion": "1.0.0", "name": "pods", "plugins": [
  {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true, "hairpinMode": true,
   "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.244.$index.0/24"}]],
            "routes": [{"dst": "0.0.0.0/0"}], "dataDir": "$node/cni-addresses"}},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}
JSON

component() {
    local component=$1
    shift
    (
        "$@" >>"$state/logs/$component-node$index.log" 2>&1 || true
        echo "$component-node$index: stopped" >>"$state/failed"
    ) &
}

# The node's image store: hard links to the one that dev/images made, for nothing ever writes to an unpacked layer; copies
# only where the cache is on another file system. The databases are written to, so each node gets its own.
if ! cp -al "$state/store/." "$node/containerd/root" 2>/dev/null; then
    rm -rf "$node/containerd/root"
    cp -a "$state/store/." "$node/containerd/root"
fi
find "$node/containerd/root" -name '*.db' -exec cp -a {} {}.own \; -exec mv {}.own {} \;

component containerd containerd -c "$node/containerd.toml"
ctr=(ctr --address "$node/containerd.sock" --namespace k8s.io)
until "${ctr[@]}" version >/dev/null 2>&1; do sleep 0.1; done
until [[ -e $state/apiserver-ready ]]; do sleep 0.1; done
"$here/kubelet.sh" "$state" "$programs" "$index"
component kube-proxy "$programs/kube-proxy" --config="$node/kube-proxy.yaml"
while true; do sleep 3600 & wait $! || true; done
