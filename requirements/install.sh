#!/usr/bin/env bash
# Makes .venv with exactly the packages of lock.txt. Checks first, changes afterwards, and does nothing when nothing changed.
# PYTHON: the Python to use (default: python3.11, python3.12 or python3, the first that fits).
# PIP_FIND_LINKS, PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_CERT and proxy variables count if they are set.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
  echo "airloom: $1" >&2
  echo "  -> $2" >&2
  exit 1
}

# Checks

fits() { "$1" -c 'import sys; raise SystemExit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }

stamp=.venv/airloom-installed
# The folder counts too: programs in .venv hold its absolute path, so a moved project is installed anew.
want="$(pwd) $(cat requirements/lock.txt pyproject.toml requirements/install.sh | sha256sum | cut -d' ' -f1)"
if [[ -f $stamp && "$(<"$stamp")" == "$want" ]] && .venv/bin/python -c '' 2>/dev/null; then
  exit 0
fi

python=""
for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3; do
  if command -v "$candidate" >/dev/null && fits "$candidate"; then
    python="$candidate"
    break
  fi
  if [[ -n ${PYTHON:-} ]]; then
    fail "PYTHON=$PYTHON is not Python 3.11 or 3.12 ($({ "$PYTHON" --version || echo "not found"; } 2>/dev/null))" "name another one in PYTHON"
  fi
done
if [[ -z $python ]]; then
  fail "Python 3.11 or 3.12 is needed; found $({ python3 --version || echo none; } 2>/dev/null)" \
    "Debian 12: apt-get install python3 python3-venv; or name one: make install PYTHON=/path/to/python3.11"
fi
command -v git >/dev/null || fail "git is needed and was not found" "Debian: apt-get install git"
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
  fail "$("$python" --version) has no venv" "Debian: apt-get install python3-venv"

# Changes

echo "Installing into .venv with $("$python" --version) ..."
# A .venv that was made elsewhere, half made, or by another Python is made anew; else only what differs is installed.
if ! fits .venv/bin/python || [[ ! -f .venv/airloom-folder || "$(<.venv/airloom-folder)" != "$(pwd)" ]]; then
  "$python" -m venv --clear .venv
  pwd >.venv/airloom-folder
fi
rm -f "$stamp"
export PIP_DISABLE_PIP_VERSION_CHECK=1
.venv/bin/python -m pip install -q "uv==$UV_VERSION"

# What uv doesn't read of pip's settings.
export SSL_CERT_FILE="${SSL_CERT_FILE:-${PIP_CERT:-${REQUESTS_CA_BUNDLE:-/dev/null}}}"
[[ $SSL_CERT_FILE != /dev/null ]] || unset SSL_CERT_FILE
index="$(.venv/bin/python -m pip config get global.index-url 2>/dev/null || true)"
[[ -z ${PIP_INDEX_URL:-$index} ]] || export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-${PIP_INDEX_URL:-$index}}"
[[ -z ${PIP_EXTRA_INDEX_URL:-} ]] || export UV_INDEX="${UV_INDEX:-$PIP_EXTRA_INDEX_URL}"
export UV_HTTP_TIMEOUT="${UV_HTTP_TIMEOUT:-180}" UV_LINK_MODE="${UV_LINK_MODE:-copy}" VIRTUAL_ENV="$PWD/.venv"

.venv/bin/uv pip install -q ${PIP_FIND_LINKS:+--find-links "$PIP_FIND_LINKS"} -r requirements/lock.txt
.venv/bin/uv pip install -q --no-deps -e .
printf '%s\n' "$want" >"$stamp"
echo "Installed: $(.venv/bin/uv pip list -q 2>/dev/null | tail -n +3 | wc -l) packages"
