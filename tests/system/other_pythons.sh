#!/bin/sh
# Try this checkout on another Python, in the Debian that has it:
# other_pythons.sh SUITE [PYTHON [FOLDER]], such as `trixie` (Python 3.13) or `sid python3.15`.
#
# debootstrap makes the Debian, and a chroot in namespaces of its own is entered. There the package
# is installed with pip, the quick tests run, and two people pair by the commands of README.md,
# with warnings as errors. Three to six minutes, as root. A FOLDER keeps the Debian for the next
# time.
set -eu
umask 022

checkout=$(cd "$(dirname "$0")/../.." && pwd)
longest_s=2400
# What the quick tests import. Not all of '.[test]' has wheels for the newest Python.
packages='pytest pytest-xdist hypothesis h11 boto3 prometheus-client pyyaml'

fail() {
    echo "other_pythons.sh: $1" >&2
    exit 1
}

# Make a Debian from the mirror that apt uses here. The archive may be a snapshot, and old.
make_root() {
    # shellcheck disable=SC2016
    format='$(REPO_URI) $(COMPONENT)'
    mirror=$(apt-get indextargets --format "$format" 'Created-By: Packages' |
        sed -n '/debian\/\{0,1\} main$/s/ main$//p' | head -n 1)
    [ "$mirror" ] || fail 'apt knows no mirror of Debian here'
    eval "$(apt-config shell http_proxy Acquire::http::Proxy https_proxy Acquire::https::Proxy)"
    [ -z "${http_proxy:-}" ] || export http_proxy
    [ -z "${https_proxy:-}" ] || export https_proxy
    debootstrap --variant=minbase --include=ca-certificates,python3-venv "$suite" "$1.part" \
        "$mirror" >"$folder/debootstrap.log" 2>&1 ||
        fail "debootstrap: $(tail -n 3 "$folder/debootstrap.log")"
    mv "$1.part" "$1"
}

# Copy this machine's settings of apt, pip and TLS, and what the repository keeps.
furnish() {
    for file in /etc/apt/apt.conf /etc/apt/apt.conf.d /etc/apt/auth.conf.d /etc/pip.conf \
        /etc/ssl/certs /usr/local/share/ca-certificates /etc/resolv.conf /etc/hosts \
        "${PIP_CERT:-}"; do
        if [ -e "$file" ]; then
            mkdir -p "$root$(dirname "$file")"
            # cp fails at links to nowhere, and copies the rest.
            cp -aL "$file" "$root$(dirname "$file")/" 2>/dev/null || true
        fi
    done
    # These would delete the packages that apt has fetched.
    rm -f "$root/etc/apt/apt.conf.d/"docker*
    rm -rf "$root/root/checkout"
    mkdir -p "$root/root/checkout"
    (cd "$checkout" && tar -cf - --exclude=.git --exclude=.venv --exclude=node_modules .) |
        tar -C "$root/root/checkout" -xf -
    # A folder of packages is here and not there.
    env | grep -iE '^(PIP_|[A-Z]+_PROXY)' | grep -v -e '^PIP_FIND_LINKS=' -e "'" |
        sed "s/=\(.*\)/='\1'/" >"$root/root/environment" || true
}

# What runs within: install, test, pair.
write_trial() {
    cat >"$root/root/trial.sh" <<WORDS
set -eu
python=$python
packages='$packages'
WORDS
    cat >>"$root/root/trial.sh" <<'WORDS'
cd /root/checkout
command -v "$python" >/dev/null || {
    apt-get -o Acquire::Check-Valid-Until=false update -qq
    apt-get install -y -qq --no-install-recommends "$python-venv" >/dev/null 2>&1
}
rm -rf .venv
"$python" -m venv .venv
# shellcheck disable=SC2086
.venv/bin/pip install -q '.[cli]' $packages
.venv/bin/python -c 'import platform, sqlite3, sys
print("Python", platform.python_version(), "SQLite", sqlite3.sqlite_version)'
.venv/bin/python -m pytest -q -m "not slow and not sockets"
.venv/bin/python tests/system/two_people.py
WORDS
}

try() {
    root=$folder/root
    if [ "$kept" ]; then
        root=$kept
    fi
    [ -d "$root" ] || make_root "$root"
    furnish
    write_trial
    # /dev is that of this machine, and /tmp nobody's.
    mount -t proc proc "$root/proc"
    mount --rbind /dev "$root/dev"
    mount -t tmpfs tmpfs "$root/tmp"
    set -a
    # shellcheck source=/dev/null
    . "$root/root/environment"
    set +a
    HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 \
        chroot "$root" sh /root/trial.sh </dev/null
    echo "other_pythons.sh: $suite, $python: all is well"
}

[ "$(id -u)" = 0 ] || fail 'only root can do this'
if [ "${1:-}" = --within ]; then
    folder=$2 suite=$3 python=$4 kept=$5
    try
    exit 0
fi
[ "${1:-}" ] || fail 'name a suite of Debian, such as trixie'
command -v debootstrap >/dev/null || fail 'apt-get install debootstrap'
folder=$(mktemp -d)
running=''
clean_up() {
    trap '' HUP INT TERM
    [ -z "$running" ] || kill -9 "-$running" 2>/dev/null || true
    rm -rf --one-file-system "$folder"
}
trap clean_up EXIT
trap 'exit 1' HUP INT TERM
setsid setpriv --pdeathsig KILL unshare --mount --pid --fork --kill-child --mount-proc \
    timeout --kill-after=5 "$longest_s" \
    sh "$0" --within "$folder" "$1" "${2:-python3}" "${3:-}" &
running=$!
wait "$running"
