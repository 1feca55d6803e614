#!/bin/bash
# Process 1 of a cluster's own network, mount and process namespaces: network, control plane, nodes. Started by dev/cluster.
#   init.sh STATE PROGRAMS NAME NODES
# When it ends, the kernel ends everything that runs in the cluster; there is nothing else to stop.
set -euo pipefail
state=$1 programs=$2 name=$3 nodes=$4
here=$(dirname "$(realpath "$0")")
cd /
exec </dev/null

# dev/cluster up watches this file, and shows it with the end of the named log.
failed() { echo "$1" >>"$state/failed"; }
trap 'failed "init: line $LINENO failed: $BASH_COMMAND"' ERR

component() {
    local component=$1
    shift
    (
        "$@" >"$state/logs/$component.log" 2>&1 || true
        failed "$component: stopped"
    ) &
}

# What a static pod is elsewhere comes back when it ends: tests kill the API server. One that never came up says so.
component_kept() {
    local component=$1
    shift
    (
        while "$@" >>"$state/logs/$component.log" 2>&1 || true; do
            [[ -e $state/apiserver-ready ]] || { failed "$component: stopped"; break; }
            echo "--- $component ended; started again" >>"$state/logs/$component.log"
            sleep 0.5
        done
    ) &
}

mount --make-rslave /
mount -t tmpfs tmpfs /run # containerd, runc and CNI keep their sockets and namespaces under /run
mkdir -p /run/netns /run/lock

# The cluster's network: a bridge is node 0's address (link type "dummy" is missing in some kernels), node 1 hangs on it
# with a network namespace of its own. There is no way out: images are imported, never pulled.
sysctl -qw net.ipv4.ip_forward=1
ip link set lo up
ip link add node0 type bridge
ip addr add 10.250.0.1/24 dev node0
ip link set node0 up
ip route add default via 10.250.0.1 # without any route the kernel refuses ClusterIPs before kube-proxy can rewrite them
if ((nodes > 1)); then
    ip netns add node1
    ip link add node1 type veth peer name eth0 netns node1
    ip link set node1 master node0 up
    ip -n node1 link set lo up
    ip -n node1 link set eth0 up
    ip -n node1 addr add 10.250.0.2/24 dev eth0
    ip -n node1 route add default via 10.250.0.1
    # Not "ip netns exec": it mounts a fresh /sys, which hides the cgroups.
    nsenter --net=/run/netns/node1 sysctl -qw net.ipv4.ip_forward=1
    ip route add 10.244.1.0/24 via 10.250.0.2
    ip -n node1 route add 10.244.0.0/24 via 10.250.0.1
fi

# Nodes import their images while the control plane starts.
for ((i = 0; i < nodes; i++)); do
    network=/proc/1/ns/net
    ((i == 0)) || network=/run/netns/node$i
    component "node$i" nsenter --net="$network" unshare --mount --propagation slave "$here/node.sh" "$state" "$programs" "$name" "$i"
done

mkdir -m 700 "$state/etcd"
# Losing data in a power cut is fine here, waiting for the disk is not.
component etcd "$programs/etcd" --data-dir "$state/etcd" --unsafe-no-fsync \
    --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 --listen-peer-urls http://127.0.0.1:2380

component_kept kube-apiserver "$programs/kube-apiserver" --etcd-servers=http://127.0.0.1:2379 \
    --bind-address=0.0.0.0 --advertise-address=10.250.0.1 --secure-port=6443 \
    --tls-cert-file="$state/pki/api.crt" --tls-private-key-file="$state/pki/api.key" --token-auth-file="$state/pki/tokens.csv" \
    --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction --allow-privileged=true \
    --service-cluster-ip-range=10.96.0.0/16 --service-account-issuer=https://kubernetes.default.svc \
    --service-account-key-file="$state/pki/sa.pub" --service-account-signing-key-file="$state/pki/sa.key" \
    --kubelet-preferred-address-types=InternalIP

until curl -fs --max-time 5 --cacert "$state/pki/ca.crt" https://127.0.0.1:6443/readyz >/dev/null; do sleep 0.1; done
touch "$state/apiserver-ready"

as() { printf -- '--%skubeconfig=%s\n' '' "$state/kubeconfigs/$1" authentication- "$state/kubeconfigs/$1" authorization- "$state/kubeconfigs/$1"; }
# Without --use-service-account-credentials its own role may not create ReplicaSets: Deployments stay at 0 and nothing says why.
mapfile -t credentials < <(as kube-controller-manager)
component kube-controller-manager "$programs/kube-controller-manager" "${credentials[@]}" --use-service-account-credentials \
    --service-account-private-key-file="$state/pki/sa.key" --root-ca-file="$state/pki/ca.crt" --leader-elect=false --bind-address=127.0.0.1 \
    --flex-volume-plugin-dir="$state/volumeplugins"
if ((nodes > 0)); then
    mapfile -t credentials < <(as kube-scheduler)
    component kube-scheduler "$programs/kube-scheduler" "${credentials[@]}" --leader-elect=false --bind-address=127.0.0.1
fi
# Stays process 1 for good, also when a component died, so that "logs" and "status" still answer. Bash reaps orphans meanwhile.
while true; do sleep 3600 & wait $! || true; done
