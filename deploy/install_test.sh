#!/bin/sh
# Try install.sh in a clean Debian 12 made by debootstrap, as `make install-test` does: with
# systemd, booted by systemd-nspawn, or where that is not to be had in a chroot, in which
# nothing is started by itself (`--chroot` asks for that). With a FOLDER a fresh Debian is kept
# there for the next time: install_test.sh [--chroot] [FOLDER]
set -eu
umask 022

checkout=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d)
root=$folder/root
boots=yes
if [ "${1:-}" = --chroot ]; then
    boots=''
    shift
fi
kept=${1:-}

fail() {
    echo "install_test.sh: $1" >&2
    exit 1
}

make_root() {
    mirror=$(sed -n 's/^URIs: *//p; s/^deb \(http[^ ]*\) .*/\1/p' /etc/apt/sources.list.d/debian.sources \
        /etc/apt/sources.list 2>/dev/null | head -n 1)
    echo "install_test.sh: debootstrap; a minute or two"
    debootstrap --variant=minbase --include=ca-certificates,curl,python3,systemd,systemd-sysv bookworm "$1" \
        "${mirror:-http://deb.debian.org/debian}" >"$folder/debootstrap.log" 2>&1 ||
        fail "debootstrap: $(tail -n 3 "$folder/debootstrap.log")"
}

# What apt, pip and TLS are told here of mirrors and authorities, they are told there.
tell_where_packages_are() {
    rm -f "$root/etc/apt/sources.list" # debootstrap's; what is here has the updates as well
    for file in /etc/apt /etc/pip.conf /etc/ssl/certs /usr/local/share/ca-certificates "${PIP_CERT:-}"; do
        if [ -e "$file" ]; then
            mkdir -p "$root$(dirname "$file")"
            cp -aL "$file" "$root$(dirname "$file")/" 2>/dev/null || true # links to nowhere
        fi
    done
    cp -L /etc/resolv.conf /etc/hosts "$root/etc/"
    # But for folders, which are here and not there.
    env | grep -iE '^(PIP_|[A-Z]+_PROXY)' | grep -v '^PIP_FIND_LINKS=' >"$root/root/environment" || true
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
    timeout 400 systemd-nspawn --quiet --register=no --keep-unit --console=pipe --resolv-conf=off --timezone=off \
        --directory="$root" --boot >"$folder/console.log" 2>&1 </dev/null || true
    [ -f "$root/root/status" ]
}

enter() {
    echo "install_test.sh: in a chroot, without systemd"
    rm -f "$root/root/status" "$root/root/log"
    {
        set -a
        # shellcheck source=/dev/null
        . "$root/root/environment"
        set +a
        HOME=/root chroot "$root" sh /root/checkout/deploy/install_test_inside.sh >"$root/root/log" 2>&1 </dev/null
        echo $? >"$root/root/status"
    } || echo 1 >"$root/root/status"
}

[ "$(id -u)" = 0 ] || fail "only root can do this"
command -v debootstrap >/dev/null || fail "apt-get install debootstrap (and systemd-container, to boot it)"
trap 'rm -rf --one-file-system "$folder"' EXIT
trap 'exit 1' HUP INT TERM
if [ -z "$kept" ]; then make_root "$root"; else
    [ -d "$kept/usr" ] || make_root "$kept"
    cp -a "$kept" "$root"
fi
tell_where_packages_are
copy_checkout
if [ "$boots" ] && ! { command -v systemd-nspawn >/dev/null && boot; }; then
    echo "install_test.sh: systemd-nspawn (package systemd-container) cannot boot here"
    boots=''
fi
[ "$boots" ] || enter
cat "$root/root/log"
exit "$(cat "$root/root/status")"
