#!/bin/bash
# Makes certificates, tokens and kubeconfigs of one cluster.  pki.sh STATE CONTEXT-NAME NODES
# Elliptic-curve keys: made in milliseconds, where RSA would cost a second each.
set -euo pipefail
state=$1 context=$2 nodes=$3
mkdir -m 700 -p "$state/pki" "$state/kubeconfigs"
cd "$state/pki"

key() { openssl ecparam -name prime256v1 -genkey -noout -out "$1" 2>/dev/null; }

key sa.key && openssl ec -in sa.key -pubout -out sa.pub 2>/dev/null
key ca.key && openssl req -x509 -new -key ca.key -subj "/CN=$context" -days 3650 -out ca.crt
key api.key && openssl req -new -key api.key -subj /CN=kube-apiserver |
    openssl x509 -req -CA ca.crt -CAkey ca.key -CAcreateserial -days 3650 -out api.crt -extfile <(echo \
        'subjectAltName=DNS:localhost,DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,IP:127.0.0.1,IP:10.96.0.1,IP:10.250.0.1') 2>/dev/null

# user NAME USER GROUP: a token and a kubeconfig. The leading letter keeps YAML from reading a token such as 34e12 as a number.
user() {
    local token
    token=t$(openssl rand -hex 16)
    echo "$token,$2,$2,\"$3\"" >>tokens.csv
    cat >"../kubeconfigs/$1" <<YAML
apiVersion: v1
kind: Config
clusters: [{name: $context, cluster: {server: "https://10.250.0.1:6443", certificate-authority-data: $(base64 -w0 ca.crt)}}]
users: [{name: $1, user: {token: "$token"}}]
contexts: [{name: $context, context: {cluster: $context, user: $1}}]
current-context: $context
YAML
    chmod 600 "../kubeconfigs/$1"
}
user admin wattlock-admin system:masters
user kube-controller-manager system:kube-controller-manager ''
user kube-scheduler system:kube-scheduler ''
user kube-proxy system:kube-proxy ''
for ((i = 0; i < nodes; i++)); do user "node$i" "system:node:node$i" system:nodes; done
ln -s kubeconfigs/admin ../kubeconfig
