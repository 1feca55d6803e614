# The verbs of dev/cluster where there is no docker: plain processes of root in namespaces of their own.
# Sourced by dev/cluster with $name and $nodes set.
# shellcheck shell=bash disable=SC2154

here=$REPOSITORY/dev/localcluster
states=${XDG_STATE_HOME:-/var/lib}/wattlock-dev
state=$states/$name
. "$here/mountpoints.sh"

# Process ids of "unshare" (the outermost process of a cluster) and of its child, process 1 inside.
# The command line is compared, because a process id in a left-over file may belong to something else by now.
outer_pid() {
    local pid
    pid=$(cat "$1/pid" 2>/dev/null) && [[ -n $pid ]] || return 1
    { tr '\0' ' ' <"/proc/$pid/cmdline"; } 2>/dev/null | grep -q "^unshare .* $1 " || return 1
    echo "$pid"
}
inner_pid() {
    local outer
    outer=$(outer_pid "$1") && pgrep -P "$outer" | head -n 1 | grep .
}
running() { [[ -e $state/ready ]] && inner_pid "$state" >/dev/null; }
require_running() { running || die "cluster $name does not run: start it with: dev/cluster up --name $name"; }
component_log_tail() {
    local log=$state/logs/${1%%:*}.log
    [[ ! -e $log ]] || { say "--- end of $log"; tail -n 15 "$log" | cut -c1-300 >&2; }
}

# One "up" or "down" of a cluster at a time. The folder itself is locked, so no lock file stays behind.
lock_states() {
    mkdir -p "$states"
    exec 8<"$states"
    flock -w 300 8 || die "another dev/cluster up or down has not finished for 5 minutes: end it, then try again"
}

cluster_up() {
    local running_nodes started programs store archive
    require_local_cluster_host
    started=$(uptime_seconds)
    install_packages "${BASIC_PACKAGES[@]}" "${CLUSTER_PACKAGES[@]}" || exit 1
    lock_states
    if running; then
        running_nodes=$(cat "$state/nodes")
        [[ $running_nodes == "$nodes" ]] ||
            die "cluster $name runs already with $running_nodes nodes, not $nodes: stop it first with: dev/cluster down --name $name"
        say "cluster $name runs already"
        return
    fi
    [[ ! -e $state ]] || { say "clearing away what an interrupted or failed cluster $name left"; destroy; mkdir -p "$states"; }
    ((${#state} <= 70)) || die "the path $state is too long for the sockets below it: set XDG_STATE_HOME to a shorter folder"
    programs=$("$REPOSITORY/dev/programs/build") || exit 1

    # On Debian's own kernels these are modules; inside a network namespace nothing would load them.
    modprobe -qa overlay br_netfilter nf_conntrack 2>/dev/null || true
    mkdir -p "$state/logs" "$state/images"
    chmod 700 "$state"
    for ((i = 0; i < nodes; i++)); do mkdir -p "$state/node$i"; done
    mkdir -p "${MOUNT_POINTS[@]}"
    echo "$nodes" >"$state/nodes"
    ln -s "$programs" "$state/programs"
    "$here/pki.sh" "$state" "wattlock-$name" "$nodes"
    if ((nodes > 0)); then
        store=$("$REPOSITORY/dev/images" --store)
        ln -s "$store" "$state/store"
        while read -r archive; do ln -s "$(realpath "$archive")" "$state/images/$(basename "$archive")"; done < <("$REPOSITORY/dev/images" --list)
    fi

    say "starting cluster $name with $nodes nodes ..."
    trap 'say "interrupted: stopping cluster $name"; destroy; exit 130' INT TERM
    # The process writes its own id before it becomes "unshare": whenever this script is killed, "down" finds it.
    setsid bash -c 'echo $$ >"$1/pid"; exec unshare --net --mount --pid --fork --kill-child=SIGKILL --mount-proc "$0" "$@"' \
        "$here/init.sh" "$state" "$programs" "$name" "$nodes" >"$state/logs/init.log" 2>&1 </dev/null 8<&- &
    disown # or bash would report the end of a process that "destroy" killed on purpose
    if ! wait_until_ready; then
        say "cluster $name did not start; stopped again"
        destroy
        exit 1
    fi
    touch "$state/ready"
    trap - INT TERM
    say "cluster $name is ready after $(seconds_since "$started") s. Try: dev/cluster kubectl --name $name get pods -A"
    if ((nodes > 0)) && ! compgen -G "$state/images/*" >/dev/null; then
        say "  no images of Wattlock are built yet: dev/images builds them, dev/cluster load imports them"
    fi
}

# Waits for the API server, the nodes and the default ServiceAccount (often the last to appear).
wait_until_ready() {
    local deadline what='the namespaces' problem
    deadline=$(($(date +%s) + ${WATTLOCK_UP_TIMEOUT_SECONDS:-120}))
    while (($(date +%s) < deadline)); do
        if [[ -s $state/failed ]]; then
            problem=$(head -n 1 "$state/failed")
            component_log_tail "$problem"
            say "error: $problem"
            return 1
        fi
        sleep 0.2
        inner_pid "$state" >/dev/null || continue
        what='the API server'
        [[ -e $state/apiserver-ready ]] || continue
        what='the default ServiceAccount'
        cluster_run kubectl --request-timeout=5s get serviceaccount default >/dev/null 2>&1 || continue
        what='the nodes to be Ready'
        (($(cluster_run kubectl --request-timeout=5s get nodes --no-headers 2>/dev/null | grep -cw Ready) == nodes)) || continue
        [[ ! -s $state/failed ]] || continue
        return 0
    done
    for log in "$state"/logs/*.log; do
        say "--- end of $log"
        tail -n 5 "$log" | cut -c1-300 >&2
    done
    say "error: waited ${WATTLOCK_UP_TIMEOUT_SECONDS:-120} s in vain for $what. On a slow machine give more: WATTLOCK_UP_TIMEOUT_SECONDS=300"
    return 1
}

# Stops the cluster and removes every trace. Works from any half-made state.
destroy() {
    local - pid group try other
    set +e # every step is tried, whatever the ones before it found
    # Killing process 1 makes the kernel kill all others and drop their mounts and networks.
    pid=$(inner_pid "$state") && kill -KILL "$pid" 2>/dev/null
    pid=$(outer_pid "$state") && kill -KILL "$pid" 2>/dev/null
    for ((try = 0; try < 100; try++)); do
        outer_pid "$state" >/dev/null || break
        sleep 0.1
    done
    # Control groups can go only when their last process has.
    for ((try = 0; try < 100; try++)); do
        for group in /sys/fs/cgroup/*/wattlock-"$name"-node? /sys/fs/cgroup/wattlock-"$name"-node?; do
            [[ ! -d $group ]] || find "$group" -depth -type d -exec rmdir {} + 2>/dev/null
        done
        compgen -G "/sys/fs/cgroup/*/wattlock-$name-node?" >/dev/null || compgen -G "/sys/fs/cgroup/wattlock-$name-node?" >/dev/null || break
        sleep 0.1
    done
    # A mount that is still busy for a moment would make rm fail half-way.
    for ((try = 0; try < 5; try++)); do
        rm -rf --one-file-system "$state" 2>/dev/null && break
        sleep 0.5
    done
    [[ ! -e $state ]] || die "could not remove $state: see what still uses it with: fuser -vm $state"
    # The mount points are shared by all clusters, and removing one takes the mount away from those that still run.
    for other in "$states"/*/; do
        outer_pid "${other%/}" >/dev/null && return
    done
    rmdir "${MOUNT_POINTS[@]}" 2>/dev/null
    rmdir "$states" 2>/dev/null
    return 0
}

cluster_down() {
    local started
    require_local_cluster_host
    started=$(uptime_seconds)
    if [[ ! -e $state ]]; then
        say "cluster $name does not run"
        return
    fi
    lock_states
    destroy
    say "cluster $name is gone after $(seconds_since "$started") s"
}

cluster_status() {
    if ! running; then
        say "cluster $name does not run"
        exit 1
    fi
    say "cluster $name, $(cat "$state/nodes") nodes, KUBECONFIG $state/kubeconfig, logs in $state/logs"
    [[ ! -s $state/failed ]] || { say "stopped since the start (dev/cluster logs tells why):"; cat "$state/failed" >&2; }
    cluster_run kubectl get nodes,pods -A -o wide
}

# Only the network namespace is entered: files and the working directory are the machine's own.
cluster_run() {
    local inner
    inner=$(inner_pid "$state") || die "cluster $name does not run: start it with: dev/cluster up --name $name"
    # No way out of the cluster's network: proxies cannot work, and uv must take what is installed.
    env -u http_proxy -u https_proxy -u HTTP_PROXY -u HTTPS_PROXY -u ALL_PROXY -u all_proxy \
        KUBECONFIG="$state/kubeconfig" KUBECACHEDIR="$state/cache" HELM_CACHE_HOME="$state/cache" WATTLOCK_CLUSTER="$name" UV_OFFLINE=1 UV_NO_SYNC=1 \
        PATH="$state/programs:$PATH" \
        nsenter --target "$inner" --net -- "$@"
}

cluster_load() {
    local archive remembered i pid pids=()
    require_running
    for archive in "$@"; do
        [[ -f $archive ]] || die "there is no image archive $archive"
        # What is in the cluster is remembered by link: dev/images gives changed images a new file.
        remembered=$state/images/$(basename "$archive")
        archive=$(realpath "$archive")
        if [[ $archive == "$CACHE"/* && $(realpath "$remembered" 2>/dev/null) == "$archive" ]]; then
            say "$(basename "$remembered") is there already"
            continue
        fi
        for ((i = 0; i < $(cat "$state/nodes"); i++)); do
            cluster_node_exec "node$i" timeout 300 ctr --address "$state/node$i/containerd.sock" --namespace k8s.io images import "$archive" &
            pids+=($!)
        done
        for pid in "${pids[@]}"; do wait "$pid" || die "could not import $archive; dev/cluster logs containerd-node0 may tell why"; done
        pids=()
        ln -sfn "$archive" "$remembered"
    done
}

cluster_logs() {
    [[ -d $state/logs ]] || die "cluster $name does not run, so it has no logs"
    if [[ -z $1 ]]; then
        (cd "$state/logs" && ls -- *.log) | sed 's/\.log$//'
    else
        [[ -e $state/logs/$1.log ]] || die "there is no component $1; those with a log: $(cluster_logs '' | tr '\n' ' ')"
        cat "$state/logs/$1.log"
    fi
}

# Twice, because the node's process id is one of the cluster's own process namespace.
cluster_node_exec() {
    local node=$1 inner
    shift
    inner=$(inner_pid "$state") || die "cluster $name does not run: start it with: dev/cluster up --name $name"
    [[ -e $state/$node/pid ]] || die "cluster $name has no node $node"
    nsenter --target "$inner" --mount --pid -- nsenter --target "$(cat "$state/$node/pid")" --mount --net -- "$@"
}

cluster_stop_kubelet() {
    require_running
    cluster_node_exec "$1" kill -KILL "$(cat "$state/$1/kubelet.pid")" 2>/dev/null || die "the kubelet of $1 does not run"
    for _ in {1..50}; do
        cluster_node_exec "$1" kill -0 "$(cat "$state/$1/kubelet.pid")" 2>/dev/null || return 0
        sleep 0.1
    done
    die "the kubelet of $1 is still there after SIGKILL; dev/cluster node-exec $1 -- ps -ef tells more"
}

cluster_start_kubelet() {
    require_running
    ! cluster_node_exec "$1" kill -0 "$(cat "$state/$1/kubelet.pid")" 2>/dev/null || die "the kubelet of $1 runs already"
    # The shell in between ends at once: the kubelet then belongs to process 1 of the cluster.
    cluster_node_exec "$1" "$here/kubelet.sh" "$state" "$(realpath "$state/programs")" "${1#node}"
}
