#!/bin/sh
# Build the container of deploy/Containerfile, and try what docs/hosting.md, "As a container",
# promises of it: container_test.sh [BASE], or `make container-test`.
#
# BASE is an image that podman can fetch. Without one mmdebstrap makes a base of Debian's packages,
# and pip's packages are fetched before, so that no registry of containers is needed.
set -eu
umask 022

checkout=$(cd "$(dirname "$0")/.." && pwd)
python=/opt/connectoid/bin/python
state=/var/lib/connectoid-relay
# Those of podman are more than some machines grant.
limits='--ulimit nofile=1024:1024 --ulimit nproc=1024:1024'
mailbox=A6qHyiK-iwU3jrHHHvMgrXRuHTtii6ebmFn3QeCCVCo4VQLyXb9VKWw6VF44cnYKtw

fail() {
    echo "container_test.sh: $1" >&2
    exit 1
}

skip() {
    echo "container_test.sh: skipped: $1"
    exit 0
}

# Images and containers of our own, in a folder; systemd is not needed.
pod() {
    podman --root "$folder/store" --runroot "$folder/run" --storage-driver "$driver" \
        --cgroup-manager cgroupfs --runtime runc --log-level fatal "$@"
}

# Make a base of what the build needs, and of nothing else.
make_base() {
    mmdebstrap --quiet --variant=extract --include=python3-venv,dash,coreutils \
        bookworm "$folder/base.tar"
    pod import --quiet "$folder/base.tar" localhost/base >/dev/null
    rm "$folder/base.tar"
    # shellcheck disable=SC2086
    told=$(pod run --rm --network none $limits localhost/base python3 -V 2>&1) ||
        skip "containers do not run here: $told"
    python3 -m pip download -qq --only-binary :all: --python-version 3.11 \
        --dest "$folder/wheels" 'cryptography>=47'
    printf '[global]\nno-index = true\nfind-links = /srv/wheels\n' >"$folder/pip.conf"
}

# A chroot is enough isolation to build in, and can be had in a container too.
build() {
    BUILDAH_ISOLATION=chroot pod build --quiet --format docker \
        -f "$checkout/deploy/Containerfile" -t localhost/relay "$@" "$checkout" >/dev/null
}

free_port() {
    python3 -c '
import socket
s = socket.socket()
s.bind(("127.0.0.1", 0))
print(s.getsockname()[1])'
}

# Start a relay as the page says, and with nothing at /bin/sh.
start() {
    # shellcheck disable=SC2086
    pod run --detach --name relay --read-only --cap-drop all --security-opt no-new-privileges \
        $limits --network host \
        --health-interval disable --log-driver k8s-file \
        --volume "messages:$state" --volume /dev/null:/bin/sh:ro \
        --env CONNECTOID_HOST=127.0.0.1 --env "CONNECTOID_PORT=$port" \
        --env CONNECTOID_MAX_CONNECTIONS=100 localhost/relay >/dev/null
    tries=0
    until curl -s "http://127.0.0.1:$port/health" | grep -q '"ok": true'; do
        tries=$((tries + 1))
        [ "$tries" -lt 200 ] || fail "it does not answer: $(pod logs relay 2>&1)"
        sleep 0.2
    done
}

# Stop it as an engine does, and see that it stops by itself.
stop() {
    pod stop --time 60 relay >/dev/null 2>&1
    code=$(pod inspect --format '{{.State.ExitCode}}' relay)
    [ "$code" = 0 ] || fail "it ended with $code: $(pod logs relay 2>&1)"
    pod rm relay >/dev/null 2>&1
}

inside() { pod exec relay "$python" "$@"; }

try() {
    start
    curl -s "http://127.0.0.1:$port/" -d '{"pub": "'$mailbox'", "action": "send", "data": "QUJD"}' |
        grep -q '"ok": true' || fail 'it takes no message'
    pod healthcheck run relay >/dev/null 2>&1 || fail 'the health check fails'
    [ "$(inside -c 'import os; print(os.getuid(), os.getgid())')" = '65532 65532' ] ||
        fail 'it runs as somebody else'
    # podman itself gives it an empty /tmp and /run.
    for path in /opt/connectoid/x /etc/x /x; do
        ! inside -c "open('$path', 'w')" 2>/dev/null || fail "it can write to $path"
    done
    inside -c "import os; assert os.stat('$state/connectoid.db').st_mode & 0o777 == 0o600" ||
        fail 'others can read the messages'
    stop
    # What it had is in the volume.
    start
    inside /opt/connectoid/connectoid_admin.py stats --json | grep -q '"messages": 1' ||
        fail 'the message is gone'
    stop
    # shellcheck disable=SC2086
    told=$(pod run --rm --network none --cap-drop all $limits --env CONNECTOID_PORT=none \
        localhost/relay 2>&1) &&
        fail 'it starts with a wrong variable'
    case $told in
        *"variable CONNECTOID_PORT: 'none'"*) ;;
        *) fail "of a wrong variable it says: $told" ;;
    esac
}

clean_up() {
    trap '' HUP INT TERM
    pod rm --all --force >/dev/null 2>&1 || true
    # Layers belong to the users of the container.
    rm -rf --one-file-system "$folder"
}

[ "$(id -u)" = 0 ] || skip 'only root can do this'
command -v podman >/dev/null || skip 'apt-get install podman runc'
command -v runc >/dev/null || skip 'apt-get install runc'
[ "${1:-}" ] || command -v mmdebstrap >/dev/null ||
    skip 'apt-get install mmdebstrap, or name a base'
folder=$(mktemp -d)
# One overlay cannot lie on another; whole copies can, and take their time.
driver=overlay
[ "$(stat -f -c %T "$folder")" != overlayfs ] || driver=vfs
trap clean_up EXIT
trap 'exit 1' HUP INT TERM
port=$(free_port)
if [ "${1:-}" ]; then
    build --build-arg "BASE=$1"
else
    make_base
    build --build-arg BASE=localhost/base \
        --volume "$folder/pip.conf:/etc/pip.conf:ro" --volume "$folder/wheels:/srv/wheels:ro"
fi
try
echo 'container_test.sh: the relay is well in its container'
