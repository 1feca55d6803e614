# Folders of the machine over which every node mounts its own. "dev/cluster down" removes them when they are empty.
# shellcheck shell=bash disable=SC2034
MOUNT_POINTS=(
    /var/lib/kubelet
    /var/lib/cni
    /var/log/containers             # the kubelet links every container's log here, wherever the logs are
    /var/lib/wattlock               # the agent's journal
    /var/lib/wattlock-simulator     # the simulated driver
)
