# The verbs of dev/cluster where docker and kind work. Sourced by dev/cluster with $name and $nodes set.
# Each kind node has a file system of its own, so hostPaths are one per node already.
# shellcheck shell=bash disable=SC2154

kind_name=wattlock-$name
kubeconfig=${XDG_STATE_HOME:-$HOME/.local/state}/wattlock-dev/$name.kubeconfig

for program in kubectl helm; do
    command -v $program >/dev/null || die "docker and kind work here, but $program is not on the PATH: install it"
done

running() { timeout 30 kind get clusters 2>/dev/null | grep -qx "$kind_name"; }
require_running() { running || die "cluster $name does not run: start it with: dev/cluster up --name $name"; }
# Also takes our own names for the nodes: node0 is kind's first worker, node1 its second.
container_of() {
    case $1 in
        node0) echo "$kind_name-worker" ;;
        node1) echo "$kind_name-worker2" ;;
        *) echo "$1" ;;
    esac
}

cluster_up() {
    local i archives
    if running; then
        say "cluster $name runs already"
        return
    fi
    mkdir -p "$(dirname "$kubeconfig")"
    if ! {
        printf 'kind: Cluster\napiVersion: kind.x-k8s.io/v1alpha4\nnodes:\n- role: control-plane\n'
        for ((i = 0; i < nodes; i++)); do printf -- '- role: worker\n  labels: {nvidia.com/gpu.present: "true"}\n'; done
    } | timeout 600 kind create cluster --name "$kind_name" --kubeconfig "$kubeconfig" --wait 180s --config - >&2; then
        timeout 120 kind delete cluster --name "$kind_name" >&2 || true
        die "kind could not create the cluster; its messages are above"
    fi
    mapfile -t archives < <("$REPOSITORY/dev/images" --list)
    ((nodes == 0 || ${#archives[@]} == 0)) || cluster_load "${archives[@]}"
}

cluster_down() {
    timeout 120 kind delete cluster --name "$kind_name" --kubeconfig "$kubeconfig" >&2
    rm -f "$kubeconfig"
}

cluster_status() {
    require_running
    cluster_run kubectl get nodes,pods -A -o wide
}

# On the machine's own network: unlike in the cluster without docker, pod and Service addresses are not reached from here.
cluster_run() {
    [[ -e $kubeconfig ]] || die "cluster $name does not run: start it with: dev/cluster up --name $name"
    env KUBECONFIG="$kubeconfig" WATTLOCK_CLUSTER="$name" "$@"
}

cluster_load() {
    local archive
    require_running
    for archive in "$@"; do
        timeout 300 kind load image-archive "$archive" --name "$kind_name" >&2
    done
}

cluster_logs() {
    require_running
    if [[ -z $1 ]]; then
        kind get nodes --name "$kind_name" 2>/dev/null | sed 's/^/kubelet of /'
        say "show one with: dev/cluster logs NODE; the control plane's are pods: dev/cluster kubectl -n kube-system logs ..."
    else
        docker exec "$(container_of "$1")" journalctl --no-pager -u kubelet
    fi
}

cluster_node_exec() {
    local node=$1 terminal=()
    shift
    [[ ! -t 0 ]] || terminal=(-t)
    docker exec -i "${terminal[@]}" "$(container_of "$node")" "$@"
}
cluster_stop_kubelet() { docker exec "$(container_of "$1")" systemctl kill --signal=KILL kubelet && docker exec "$(container_of "$1")" systemctl stop kubelet; }
cluster_start_kubelet() { docker exec "$(container_of "$1")" systemctl start kubelet; }
