#!/bin/sh
# Try install.sh, and then the commands of docs/hosting.md, in a clean Debian 12, or another SUITE
# such as trixie: install_test.sh [--chroot] [--suite SUITE] [FOLDER], or `make install-test`.
#
# debootstrap makes the Debian, and systemd-nspawn boots it with systemd. Where that does not work,
# or with --chroot, install.sh is tried in a chroot, in which nothing starts by itself, and the
# page is left out. A FOLDER keeps the fresh Debian for the next time.
set -eu
umask 022

checkout=$(cd "$(dirname "$0")/.." && pwd)
# Three to six minutes are usual.
longest_s=1500

fail() {
    echo "install_test.sh: $1" >&2
    exit 1
}

# Make a Debian from the mirror that apt uses here.
make_root() {
    # shellcheck disable=SC2016
    format='$(REPO_URI) $(RELEASE) $(COMPONENT)'
    # Another suite is on the mirror of this one.
    mirror=$(apt-get indextargets --format "$format" 'Created-By: Packages' |
        sed -n 's/ bookworm main$//p' | head -n 1)
    [ "$mirror" ] || fail 'apt knows no Debian 12 (bookworm, main) here'
    echo "install_test.sh: debootstrap; a minute or two"
    eval "$(apt-config shell http_proxy Acquire::http::Proxy https_proxy Acquire::https::Proxy)"
    [ -z "${http_proxy:-}" ] || export http_proxy
    [ -z "${https_proxy:-}" ] || export https_proxy
    rm -rf "$1.part"
    packages=ca-certificates,curl,python3,systemd,systemd-sysv
    debootstrap --variant=minbase --include="$packages" "$suite" "$1.part" "$mirror" \
        >"$folder/debootstrap.log" 2>&1 ||
        fail "debootstrap: $(tail -n 3 "$folder/debootstrap.log")"
    mv "$1.part" "$1"
}

# Copy this machine's settings of apt, pip and TLS: proxies, mirrors and authorities.
tell_where_packages_are() {
    for file in /etc/apt/apt.conf /etc/apt/apt.conf.d /etc/apt/auth.conf /etc/apt/auth.conf.d \
        /etc/pip.conf /etc/ssl/certs /usr/local/share/ca-certificates /etc/resolv.conf \
        /etc/hosts "${PIP_CERT:-}"; do
        if [ -e "$file" ]; then
            mkdir -p "$root$(dirname "$file")"
            # cp fails at links to nowhere, and copies the rest.
            cp -aL "$file" "$root$(dirname "$file")/" 2>/dev/null || true
        fi
    done
    # A folder of packages is here and not there. The quotes are for both systemd and a shell.
    env | grep -iE '^(PIP_|[A-Z]+_PROXY)' | grep -v -e '^PIP_FIND_LINKS=' -e "'" |
        sed "s/=\(.*\)/='\1'/" >"$root/root/environment" || true
    # These would delete the packages that apt has fetched.
    rm -f "$root/etc/apt/apt.conf.d/"docker*
}

# Print a port that was free just now.
free_port() {
    python3 -c '
import socket
s = socket.socket()
s.bind(("127.0.0.1", 0))
print(s.getsockname()[1])'
}

copy_checkout() {
    mkdir -p "$root/root/checkout"
    (cd "$checkout" && tar -cf - connectoid_relay.py connectoid_admin.py systemd deploy docs) |
        tar -C "$root/root/checkout" -xf -
    echo "PORT=$(free_port)" >>"$root/root/environment"
}

# Boot the machine to run a script of /root/checkout/deploy in it, then switch it off:
# boot INTERPRETER SCRIPT [OPTION OF systemd-nspawn]. The machine's /root then has the log and the
# status of the script.
boot() {
    command -v systemd-nspawn >/dev/null || return 1
    rm -f "$root/root/log" "$root/root/status"
    cat >"$root/etc/systemd/system/install-test.service" <<WORDS
[Unit]
After=multi-user.target

[Service]
Type=oneshot
EnvironmentFile=/root/environment
Environment=HOME=/root
ExecStart=/bin/sh -c '$1 /root/checkout/deploy/$2 >/root/log 2>&1; echo \$\$? >/root/status'
ExecStopPost=systemctl poweroff --no-block

[Install]
WantedBy=default.target
WORDS
    mkdir -p "$root/etc/systemd/system/default.target.wants"
    ln -sf /etc/systemd/system/install-test.service \
        "$root/etc/systemd/system/default.target.wants/"
    systemd-nspawn --quiet --register=no --keep-unit --console=pipe \
        --resolv-conf=off --timezone=off ${3:+"$3"} --directory="$root" --boot \
        >"$folder/console.log" 2>&1 </dev/null || true
    # Without a log the machine has not come as far as the test.
    [ -f "$root/root/log" ]
}

# Print the log of the test, and fail if the test did.
report() {
    cat "$root/root/log"
    [ -f "$root/root/status" ] || fail 'the test did not come to its end'
    status=$(cat "$root/root/status")
    [ "$status" = 0 ] || exit "$status"
}

# Install the programs that the page assumes, and fetch the packages that it installs with pip: the
# machine on which it is typed has no network.
fetch_packages() {
    cat >"$root/root/checkout/deploy/packages.sh" <<'WORDS'
set -eu
printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
chmod +x /usr/sbin/policy-rc.d
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    dbus python3-venv sudo curl openssl certbot caddy nginx-light \
    openssh-server openssh-client iproute2 >/dev/null
rm /usr/sbin/policy-rc.d
systemctl --quiet disable caddy nginx ssh certbot.timer
python3 -m venv /root/fetching
/root/fetching/bin/pip download -q --dest /srv/wheels 'cryptography>=47'
WORDS
    boot sh packages.sh && report
    printf '[global]\nno-index = true\nfind-links = /srv/wheels\n' >"$root/etc/pip.conf"
    grep -v '^PIP_' "$root/root/environment" >"$root/root/environment.new" || true
    mv "$root/root/environment.new" "$root/root/environment"
    chroot "$root" useradd --create-home --shell /bin/bash --password '*' alice
    echo 'alice ALL=(ALL) NOPASSWD: ALL' >"$root/etc/sudoers.d/alice"
    cp -a "$root/root/checkout" "$root/home/alice/connectoid"
    chroot "$root" chown -R alice:alice /home/alice/connectoid
}

enter() {
    echo "install_test.sh: in a chroot, without systemd"
    set -a
    # shellcheck source=/dev/null
    . "$root/root/environment"
    set +a
    status=0
    HOME=/root chroot "$root" sh /root/checkout/deploy/install_test_inside.sh \
        >"$root/root/log" 2>&1 </dev/null || status=$?
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
    if [ "$boots" ] && ! boot sh install_test_inside.sh; then
        echo "install_test.sh: systemd-nspawn (package systemd-container) cannot boot here"
        tail -n 3 "$folder/console.log" 2>/dev/null || true
        boots=''
    fi
    [ "$boots" ] || enter
    report
    if [ -z "$boots" ]; then
        echo "skipped: the commands of docs/hosting.md (they need systemd)"
        exit 0
    fi
    fetch_packages
    boot '/usr/bin/python3 -I' hosting_test_inside.py --private-network || fail 'no second boot'
    report
    echo 'the page is typed'
    exit 0
}

# Run the trial in namespaces of its own where we may have them, and in a process group otherwise.
# However we end, its mounts and processes end too.
run_apart() {
    command -v debootstrap >/dev/null ||
        fail "apt-get install debootstrap (and systemd-container, to boot it)"
    folder=$(mktemp -d)
    : >"$folder/started"
    running=''
    trap clean_up EXIT
    trap 'exit 1' HUP INT TERM
    apart='unshare --mount --pid --fork --kill-child --mount-proc'
    $apart true 2>/dev/null || apart=''
    # shellcheck disable=SC2086
    setsid setpriv --pdeathsig KILL $apart timeout --kill-after=5 "$longest_s" \
        sh "$0" --within "$folder" "$suite" "$boots" "$kept" &
    running=$!
    wait "$running"
}

# Find the groups of processes that systemd-nspawn makes for the machine, within ours.
groups() {
    find /sys/fs/cgroup -depth -newer "$folder/started" -type d \
        \( -path '*/payload*' -o -name supervisor \) "$@" 2>/dev/null
}

clean_up() {
    trap '' HUP INT TERM
    [ -z "$running" ] || kill -9 "-$running" 2>/dev/null || true
    # A process that is just ending may still write, and be in a group.
    for _ in 1 2 3 4 5; do
        groups -exec rmdir {} + || true
        rm -rf --one-file-system "$folder/root" "$folder/root.part" 2>/dev/null &&
            [ -z "$(groups)" ] && break
        sleep 1
    done
    rm -rf --one-file-system "$folder"
}

[ "$(id -u)" = 0 ] || fail "only root can do this"
if [ "${1:-}" = --within ]; then
    folder=$2 suite=$3 boots=$4 kept=$5
    try
fi
boots=yes
if [ "${1:-}" = --chroot ]; then
    boots=''
    shift
fi
suite=bookworm
if [ "${1:-}" = --suite ]; then
    suite=${2:?name a suite of Debian, such as trixie}
    shift 2
fi
kept=${1:-}
run_apart
