#!/usr/bin/env bash
# Makes airloom/standin-python:bookworm, a plain Debian 12 with Python 3.11, where no image can be pulled.
# Takes the place of AIRLOOM_PYTHON_IMAGE. Needs root, debootstrap, and an engine; does nothing when it is there.
set -euo pipefail

name="${1:-airloom/standin-python:bookworm}"
mirror="${AIRLOOM_DEBIAN_MIRROR:-http://deb.debian.org/debian}"

if docker image inspect "$name" >/dev/null 2>&1; then
  echo "$name is there"
  exit 0
fi
((EUID == 0)) || { echo "debootstrap needs root; run this as root, or: docker pull python:3.11-slim-bookworm" >&2; exit 1; }

folder="$(mktemp -d)"
trap 'rm -rf --one-file-system "$folder"' EXIT
echo "making $name from $mirror"
debootstrap --variant=minbase --include=ca-certificates,python3,python3-pip,python3-venv bookworm "$folder" "$mirror" \
  >"$folder.log" 2>&1 || { tail -n 20 "$folder.log" >&2; exit 1; }
rm -f "$folder.log"
rm -rf "$folder"/var/cache/apt/archives/*.deb
tar -C "$folder" -c . | docker import --change 'CMD ["python3"]' - "$name"
