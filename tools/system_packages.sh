#!/bin/sh
# Installs Debian packages: system_packages.sh [PROGRAM:PACKAGE ...] those of programs that are missing; without
# arguments those that the environment needs: mooncake links against libibverbs and libnuma, and Debian has what `venv`
# needs of its Python ($PYTHON) in a package of its own.
set -eu
PATH=$PATH:/usr/sbin:/sbin
missing=""
if [ $# = 0 ]; then
    for pair in libibverbs.so.1:libibverbs1 libnuma.so.1:libnuma1; do
        ldconfig -p | grep -q "${pair%%:*}" || missing="$missing ${pair##*:}"
    done
    python=${PYTHON:-python3}
    [ -x "${VENV:-.venv}/bin/pip" ] || "$python" -c "import ensurepip" 2>/dev/null || missing="$missing $(basename "$python")-venv"
fi
for pair in "$@"; do
    command -v "${pair%%:*}" >/dev/null || missing="$missing ${pair##*:}"
done
[ -z "$missing" ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq
    # shellcheck disable=SC2086  # a list of package names
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing
else
    echo "Missing system packages. Type:  sudo apt-get install$missing   and run make again." >&2
    exit 1
fi
