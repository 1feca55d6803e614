# How this machine reaches its package registries (index, certificates, proxies), for uv and for builds inside
# containers, which see neither pip.conf nor the environment. Sourced, never run.
# shellcheck shell=bash

# pip_setting NAME: the value pip uses for a setting, from its files or its environment; empty when not set.
pip_setting() {
    # Asked once: pip takes half a second to answer.
    [[ -n ${pip_settings+set} ]] || pip_settings=$(python3 -m pip config list 2>/dev/null || true)
    sed -n "s/^[^=]*\.$1='\(.*\)'\$/\1/p" <<<"$pip_settings" | head -n 1
}

# The file with the certificate authorities this machine trusts.
ca_bundle() {
    local candidate
    for candidate in "${SSL_CERT_FILE:-}" "${PIP_CERT:-}" "$(pip_setting cert)" /etc/ssl/certs/ca-certificates.crt; do
        if [[ -n $candidate && -f $candidate ]]; then
            realpath "$candidate"
            return
        fi
    done
}

# uv reads none of pip's settings, so a mirror that only pip.conf names is passed on here.
export_uv_settings() {
    local index bundle
    [[ -z ${WATTLOCK_UV_SETTINGS_DONE:-} ]] || return 0
    export WATTLOCK_UV_SETTINGS_DONE=1
    pip_setting index-url >/dev/null # in this shell, so that the answer is kept
    index=$(pip_setting index-url)
    if [[ -n $index && -z ${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-} ]]; then
        export UV_DEFAULT_INDEX=$index
    fi
    if [[ -n ${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-} ]]; then
        export UV_FROZEN=1 # another index than the lock's would make uv rewrite uv.lock
    fi
    bundle=$(ca_bundle)
    if [[ -n $bundle && -z ${SSL_CERT_FILE:-} ]]; then
        export SSL_CERT_FILE=$bundle
    fi
    # uv would otherwise fetch interpreters from a site that is no package registry.
    export UV_PYTHON_DOWNLOADS=${UV_PYTHON_DOWNLOADS:-never}
}

# write_build_settings DIR: writes the same settings as files that a build mounts over /etc (see dev/images).
write_build_settings() {
    local dir=$1 index
    index=${UV_DEFAULT_INDEX:-${UV_INDEX_URL:-$(pip_setting index-url)}}
    mkdir -p "$dir"
    {
        echo '[global]'
        [[ -z $index ]] || echo "index-url = $index"
        echo 'cert = /etc/ssl/certs/ca-certificates.crt'
        echo 'timeout = 60'
    } >"$dir/pip.conf"
    {
        echo 'system-certs = true'
        [[ -z $index ]] || printf '[[index]]\nurl = "%s"\ndefault = true\n' "$index"
    } >"$dir/uv.toml"
    apt-config dump 2>/dev/null | grep -E '^Acquire::(http|https|ftp|Check|Retries|ForceIPv)' >"$dir/apt.conf" || true
    cp "$(ca_bundle)" "$dir/ca.crt"
}

# The Debian suite that this machine itself uses, and its mirrors as lines of sources.list: the suite, its updates, its
# security fixes, whatever of them the machine has.
debian_suite() { (. /etc/os-release && echo "${VERSION_CODENAME:-bookworm}"); }
debian_mirror() { debian_sources "$(debian_suite)" | awk -v suite="$(debian_suite)" '$3 == suite { print $2; exit }'; }
debian_sources() {
    apt-get indextargets --no-release-info --format '$(CREATED_BY) $(RELEASE) $(REPO_URI)' 2>/dev/null |
        awk -v suite="$1" '$1 == "Packages" && ($2 == suite || $2 == suite "-updates" || $2 == suite "-security") &&
            !seen[$2]++ { print "deb", $3, $2, "main" }'
}
