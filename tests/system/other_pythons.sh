#!/bin/sh
# Try this checkout on another Python, in the Debian that has it:
# other_pythons.sh SUITE [PYTHON [FOLDER]], such as `trixie` (Python 3.13) or `sid python3.15`.
#
# debootstrap makes the Debian, and a chroot in namespaces of its own is entered. There the package
# is installed as README.md says, the quick tests run, and two people pair by the commands of
# README.md, with warnings as errors. Three to six minutes, as root. A FOLDER keeps the Debian for
# the next time.
#
# `--make SUITE PYTHON FOLDER` stops before the tests. `--few SUITE PYTHON FOLDER` then runs those
# in which Pythons differ, and the pairing. .ci/run does both while other tests run.
# The exit status is 77 where no Debian can be made.
set -eu
umask 022

checkout=$(cd "$(dirname "$0")/../.." && pwd)
longest_s=2400
# What the quick tests import. Not all of '.[test]' has wheels for the newest Python.
packages='pytest pytest-xdist hypothesis h11 boto3 prometheus-client pyyaml'
# Imports, files, sockets and programs, with warnings as errors.
few='test_relay.py tests/relay/test_command_line.py tests/relay/test_http.py
    tests/relay/test_udp.py tests/library/test_operating_system.py tests/library/test_store.py
    tests/library/test_messages.py tests/library/test_sdp.py'

fail() {
    echo "other_pythons.sh: $1" >&2
    exit "${2:-1}"
}

# Make a Debian from the mirror that apt uses here. The archive may be a snapshot, and old.
make_root() {
    # shellcheck disable=SC2016
    format='$(REPO_URI) $(COMPONENT)'
    mirror=$(apt-get indextargets --format "$format" 'Created-By: Packages' |
        sed -n '/debian\/\{0,1\} main$/s/ main$//p' | head -n 1)
    [ "$mirror" ] || fail 'apt knows no mirror of Debian here' 77
    eval "$(apt-config shell http_proxy Acquire::http::Proxy https_proxy Acquire::https::Proxy)"
    [ -z "${http_proxy:-}" ] || export http_proxy
    [ -z "${https_proxy:-}" ] || export https_proxy
    debootstrap --variant=minbase --include=ca-certificates,python3-venv "$suite" "$1.part" \
        "$mirror" >"$folder/debootstrap.log" 2>&1 ||
        fail "debootstrap: $(tail -n 3 "$folder/debootstrap.log")" 77
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
step=$step
python=$python
packages='$packages'
few='$few'
WORDS
    cat >>"$root/root/trial.sh" <<'WORDS'
cd /root/checkout

install() {
    command -v "$python" >/dev/null || {
        apt-get -o Acquire::Check-Valid-Until=false update -qq
        apt-get install -y -qq --no-install-recommends "$python-venv" >/dev/null 2>&1
    }
    rm -rf .venv
    # The command of README.md, word for word but for the name of this Python.
    sh -c "$(grep -F "'.[cli]'" README.md | sed "s/^python3 /$python /")"
    # shellcheck disable=SC2086
    .venv/bin/pip install -q $packages
}

if [ "$step" != few ]; then
    install 2>/root/errors || {
        cat /root/errors >&2
        exit 1
    }
fi
[ "$step" != make ] || exit 0
.venv/bin/python -c 'import platform, sqlite3, sys
print("Python", platform.python_version(), "SQLite", sqlite3.sqlite_version)'
if [ "$step" = few ]; then
    # shellcheck disable=SC2086
    .venv/bin/python -m pytest -q -m "not slow" $few
else
    .venv/bin/python -m pytest -q -m "not slow and not sockets"
fi
.venv/bin/python tests/system/two_people.py
WORDS
}

try() {
    root=$folder/root
    if [ "$kept" ]; then
        root=$kept
    fi
    [ -d "$root" ] || make_root "$root"
    # The few tests run in what is there.
    [ "$step" = few ] || furnish
    write_trial
    # /dev is that of this machine, and /tmp nobody's.
    mount -t proc proc "$root/proc" || fail 'nothing can be mounted here' 77
    mount --rbind /dev "$root/dev"
    mount -t tmpfs tmpfs "$root/tmp"
    set -a
    # shellcheck source=/dev/null
    . "$root/root/environment"
    set +a
    HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 \
        chroot "$root" sh /root/trial.sh </dev/null
    echo "other_pythons.sh: $suite, $python, $step: all is well"
}

if [ "${1:-}" = --within ]; then
    folder=$2 step=$3 suite=$4 python=$5 kept=$6
    try
    exit 0
fi
step=all
case ${1:-} in
--make | --few)
    step=${1#--}
    shift
    [ "${3:-}" ] || fail "--$step needs a suite, a Python and a folder"
    ;;
esac
[ "${1:-}" ] || fail 'name a suite of Debian, such as trixie'
[ "$(id -u)" = 0 ] || fail 'only root can do this' 77
command -v debootstrap >/dev/null || fail 'apt-get install debootstrap' 77
unshare --mount --pid --fork true || fail 'no namespaces can be made here' 77
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
    sh "$0" --within "$folder" "$step" "$1" "${2:-python3}" "${3:-}" &
running=$!
wait "$running"
