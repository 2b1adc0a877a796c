#!/bin/sh
# Try install.sh in a clean Debian 12 made by debootstrap, as `make install-test` does: with
# systemd, booted by systemd-nspawn, or where that is not to be had in a chroot, in which
# nothing is started by itself (`--chroot` asks for that). With a FOLDER a fresh Debian is kept
# there for the next time: install_test.sh [--chroot] [FOLDER]
set -eu
umask 022

checkout=$(cd "$(dirname "$0")/.." && pwd)
longest_s=900 # two to four minutes are usual

fail() {
    echo "install_test.sh: $1" >&2
    exit 1
}

# The mirror from which apt has its Debian here.
make_root() {
    # shellcheck disable=SC2016
    mirror=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' |
        sed -n 's/ bookworm main$//p' | head -n 1)
    [ "$mirror" ] || fail 'apt knows no Debian 12 (bookworm, main) here'
    echo "install_test.sh: debootstrap; a minute or two"
    eval "$(apt-config shell http_proxy Acquire::http::Proxy https_proxy Acquire::https::Proxy)"
    [ -z "${http_proxy:-}" ] || export http_proxy
    [ -z "${https_proxy:-}" ] || export https_proxy
    rm -rf "$1.part"
    debootstrap --variant=minbase --include=ca-certificates,curl,python3,systemd,systemd-sysv bookworm "$1.part" \
        "$mirror" >"$folder/debootstrap.log" 2>&1 || fail "debootstrap: $(tail -n 3 "$folder/debootstrap.log")"
    mv "$1.part" "$1"
}

# What apt, pip and TLS are told here of proxies, mirrors and authorities, they are told there.
tell_where_packages_are() {
    for file in /etc/apt/apt.conf /etc/apt/apt.conf.d /etc/apt/auth.conf /etc/apt/auth.conf.d /etc/pip.conf \
        /etc/ssl/certs /usr/local/share/ca-certificates /etc/resolv.conf /etc/hosts "${PIP_CERT:-}"; do
        if [ -e "$file" ]; then
            mkdir -p "$root$(dirname "$file")"
            cp -aL "$file" "$root$(dirname "$file")/" 2>/dev/null || true # links to nowhere
        fi
    done
    # But for folders, which are here and not there. Quoted as both systemd and a shell read it.
    env | grep -iE '^(PIP_|[A-Z]+_PROXY)' | grep -v -e '^PIP_FIND_LINKS=' -e "'" | sed "s/=\(.*\)/='\1'/" \
        >"$root/root/environment" || true
    rm -f "$root/etc/apt/apt.conf.d/"docker* # which would delete what apt has fetched
}

copy_checkout() {
    mkdir -p "$root/root/checkout"
    (cd "$checkout" && tar -cf - connectoid_relay.py connectoid_admin.py systemd deploy) | tar -C "$root/root/checkout" -xf -
    echo "PORT=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')" \
        >>"$root/root/environment"
}

# The test is a service of the machine, which ends with it. The network is ours: pip needs it.
boot() {
    command -v systemd-nspawn >/dev/null || return 1
    cat >"$root/etc/systemd/system/install-test.service" <<'WORDS'
[Unit]
After=multi-user.target

[Service]
Type=oneshot
EnvironmentFile=/root/environment
Environment=HOME=/root
ExecStart=/bin/sh -c 'sh /root/checkout/deploy/install_test_inside.sh >/root/log 2>&1; echo $$? >/root/status'
ExecStopPost=systemctl poweroff --no-block

[Install]
WantedBy=default.target
WORDS
    mkdir -p "$root/etc/systemd/system/default.target.wants"
    ln -sf /etc/systemd/system/install-test.service "$root/etc/systemd/system/default.target.wants/"
    systemd-nspawn --quiet --register=no --keep-unit --console=pipe --resolv-conf=off --timezone=off \
        --directory="$root" --boot >"$folder/console.log" 2>&1 </dev/null || true
    [ -f "$root/root/log" ] # else it has not come to the test
}

enter() {
    echo "install_test.sh: in a chroot, without systemd"
    set -a
    # shellcheck source=/dev/null
    . "$root/root/environment"
    set +a
    status=0
    HOME=/root chroot "$root" sh /root/checkout/deploy/install_test_inside.sh >"$root/root/log" 2>&1 </dev/null || status=$?
    echo "$status" >"$root/root/status"
}

try() {
    root=$folder/root
    if [ -z "$kept" ]; then make_root "$root"; else
        [ -d "$kept" ] || make_root "$kept"
        cp -a "$kept" "$root"
    fi
    tell_where_packages_are
    copy_checkout
    if [ "$boots" ] && ! boot; then
        echo "install_test.sh: systemd-nspawn (package systemd-container) cannot boot here"
        tail -n 3 "$folder/console.log" 2>/dev/null || true
        boots=''
    fi
    [ "$boots" ] || enter
    cat "$root/root/log"
    [ -f "$root/root/status" ] || fail 'the test did not come to its end'
    exit "$(cat "$root/root/status")"
}

# All that is mounted and started is in a world of its own where that may be had, and else at
# least in a process group: it ends with us, however we end.
run_apart() {
    command -v debootstrap >/dev/null || fail "apt-get install debootstrap (and systemd-container, to boot it)"
    folder=$(mktemp -d)
    : >"$folder/started"
    running=''
    trap clean_up EXIT
    trap 'exit 1' HUP INT TERM
    apart='unshare --mount --pid --fork --kill-child --mount-proc'
    $apart true 2>/dev/null || apart=''
    # shellcheck disable=SC2086
    setsid setpriv --pdeathsig KILL $apart timeout --kill-after=5 "$longest_s" \
        sh "$0" --within "$folder" "$boots" "$kept" &
    running=$!
    wait "$running"
}

# The groups of processes that systemd-nspawn makes for the machine, in ours.
groups() {
    find /sys/fs/cgroup -depth -newer "$folder/started" -type d \( -path '*/payload*' -o -name supervisor \) "$@" 2>/dev/null
}

clean_up() {
    trap '' HUP INT TERM
    [ -z "$running" ] || kill -9 "-$running" 2>/dev/null || true
    for _ in 1 2 3 4 5; do # what ends now may still write, and be in a group
        groups -exec rmdir {} + || true
        rm -rf --one-file-system "$folder/root" "$folder/root.part" 2>/dev/null && [ -z "$(groups)" ] && break
        sleep 1
    done
    rm -rf --one-file-system "$folder"
}

[ "$(id -u)" = 0 ] || fail "only root can do this"
if [ "${1:-}" = --within ]; then
    folder=$2 boots=$3 kept=$4
    try
fi
boots=yes
if [ "${1:-}" = --chroot ]; then
    boots=''
    shift
fi
kept=${1:-}
run_apart
