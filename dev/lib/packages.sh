# Debian packages that the scripts need. Sourced, never run.
# shellcheck shell=bash

# For every script: Python with venv and pip (uv and Go come from PyPI), compiler (pause, simulated driver), small tools.
BASIC_PACKAGES=(ca-certificates curl git python3 python3-pip python3-venv gcc libc6-dev procps util-linux make)
# For the local cluster and the image builds; not needed with docker and kind.
CLUSTER_PACKAGES=(containerd runc buildah containernetworking-plugins conntrack iptables nftables ipset iproute2 kmod
    openssl jq rsync debootstrap debian-archive-keyring)

# install_packages NAME...: installs what is missing, with one apt-get update; silent when all is there.
install_packages() {
    local missing=() name installed
    installed=$(dpkg-query -W -f '${db:Status-Status} ${Package}\n' "$@" 2>/dev/null || true)
    for name in "$@"; do
        grep -qx "installed $name" <<<"$installed" || missing+=("$name")
    done
    ((${#missing[@]})) || return 0
    command -v apt-get >/dev/null ||
        die "missing programs, and no apt-get to install them. On Debian they are the packages: ${missing[*]}. Or use docker and kind."
    [[ $(id -u) == 0 ]] || die "run as root, or first: sudo apt-get install --no-install-recommends ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    # Five minutes is enough for a slow mirror; a dead one must not hang the set-up.
    progress "updating the list of Debian packages" timeout 300 apt-get update -q || return 1
    progress "installing Debian packages: ${missing[*]}" \
        timeout 900 apt-get install -q -y --no-install-recommends "${missing[@]}"
}
