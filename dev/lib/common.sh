# Shared by the scripts in dev/: messages, the cache, and a few helpers. Sourced, never run.
# shellcheck shell=bash

REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
CACHE=${WATTLOCK_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/wattlock}

say() { printf '%s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# Seconds since boot with two digits: never jumps, unlike the wall clock.
uptime_seconds() { cut -d' ' -f1 /proc/uptime; }
seconds_since() { awk -v a="$1" -v b="$(uptime_seconds)" 'BEGIN { printf "%.1f", b - a }'; }

# progress LABEL CMD...: runs CMD quietly; says every 30 s that it still runs; shows the end of its output if it fails.
progress() {
    local label=$1 started log pid next=30 waited=0
    shift
    started=$(uptime_seconds)
    log=$(mktemp)
    say "$label ..."
    "$@" >"$log" 2>&1 &
    pid=$!
    while kill -0 "$pid" 2>/dev/null; do
        sleep 0.5
        waited=$((waited + 1))
        if ((waited / 2 >= next)); then
            say "  still at it after $next s: $(tail -n 1 "$log" | cut -c1-100)"
            next=$((next + 30))
        fi
    done
    if ! wait "$pid"; then
        tail -n 30 "$log" >&2
        rm -f "$log"
        say "error: failed: $label (after $(seconds_since "$started") s; its last lines are above)"
        return 1
    fi
    rm -f "$log"
    say "  done in $(seconds_since "$started") s"
}

# hash_of FILE...: one short hash over names and contents, the names relative to the repository.
hash_of() {
    (cd "$REPOSITORY" && printf '%s\0' "$@" | sort -z | xargs -0 sha256sum) | sha256sum | cut -c1-16
}

# Docker and kind are used where both really work. A docker command without a daemon does not count.
kind_mode() {
    if [[ -z ${WATTLOCK_KIND_MODE:-} ]]; then
        WATTLOCK_KIND_MODE=no
        if command -v kind >/dev/null && command -v docker >/dev/null && timeout 10 docker info >/dev/null 2>&1; then
            WATTLOCK_KIND_MODE=yes
        fi
        export WATTLOCK_KIND_MODE
    fi
    [[ $WATTLOCK_KIND_MODE == yes ]]
}

require_local_cluster_host() {
    local instead='Or install docker and kind: where both work, the same commands use them.'
    [[ $(uname -s) == Linux ]] || die "the local cluster needs Linux. $instead"
    [[ $(id -u) == 0 ]] || die "the local cluster needs root (it makes namespaces, bridges and cgroups). Run it with sudo. $instead"
}
