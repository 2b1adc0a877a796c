#!/bin/sh
# Install, upgrade or remove the relay on Debian 12 or Raspberry Pi OS, from a checkout.
#
# It does what docs/hosting.md, "On a VPS, under systemd", does by hand, and can follow it. The
# second run changes nothing. Only --purge deletes settings and messages.
set -eu
umask 022
# Root may have a Python in its home, which the relay cannot read.
PATH=/usr/sbin:/usr/bin:/sbin:/bin

home=/opt/connectoid
settings=/etc/connectoid
units=/etc/systemd/system
admin=/usr/local/bin/connectoid-admin
state=/var/lib/connectoid-relay
service=connectoid-relay.service
socket=connectoid-relay.socket
# The first version with HPKE.
needs='cryptography>=47'
checkout=$(cd "$(dirname "$0")/.." && pwd)
# This file exists while a running relay does not know of a change, even if we are interrupted.
changed=$home/changed
new_socket=''

usage() {
    cat <<'WORDS'
usage: install.sh install [--flags TEXT] | upgrade | remove [--purge]

install   install a virtual environment for Python, the relay, connectoid-admin, units and
          a group, and start the relay. --flags are the relay's: they go into
          /etc/connectoid/relay.env if there is none yet (default: --port 8080)
upgrade   install again over an installation; the relay restarts if something has changed
remove    remove all that was installed, but settings and messages only with --purge
WORDS
}

say() { echo "install.sh: $1"; }

fail() {
    echo "install.sh: $1" >&2
    exit "${2:-1}"
}

# In a chroot, or in an image that is being built, units can be enabled but not started.
systemd_runs() { [ -d /run/systemd/system ]; }

check_checkout() {
    for file in connectoid_relay.py connectoid_admin.py \
        systemd/connectoid-certificate "systemd/$service" "systemd/$socket"; do
        [ -f "$checkout/$file" ] || fail "$checkout has no $file: run this from a whole checkout"
    done
}

# Copy a file, with a mode, unless the same one is there. A change concerns a running relay.
put() {
    if [ -f "$3" ] && cmp -s "$2" "$3"; then return; fi
    : >"$changed"
    install -D -m "$1" "$2" "$3"
}

find_python() {
    command -v python3 >/dev/null || get_package python3
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$(python3 --version) is too old: the relay needs 3.11, which Debian 12 has"
    python3 -c 'import ensurepip, venv' 2>/dev/null || get_package python3-venv
}

get_package() {
    command -v apt-get >/dev/null || fail "install $1 first"
    say "installing $1"
    # A new machine may still be installing its first updates. apt can wait for dpkg's lock, but
    # not for the lock of its lists.
    apt-get update -qq || say 'apt-get update failed; trying with the lists that are here'
    DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 \
        install -y -qq --no-install-recommends "$1" >/dev/null
}

# A new release of Debian brings another Python, for which the environment is made anew.
make_environment() {
    install -d -m 0755 "$home"
    # Somebody else may have made the folder, but root runs what is in it.
    chown -R root:root "$home"
    version='import sys, ensurepip; print(sys.version_info[:2])'
    # Without pip the environment is not whole: its making was interrupted.
    whole='import sys, pip; print(sys.version_info[:2])'
    if [ "$("$home/bin/python" -c "$whole" 2>/dev/null)" != "$(python3 -c "$version")" ]; then
        say "making a virtual environment in $home"
        python3 -m venv --clear "$home"
        : >"$changed"
    fi
    before=$("$home/bin/pip" freeze)
    "$home/bin/pip" install --quiet --disable-pip-version-check ${1:+"$1"} "$needs"
    [ "$before" = "$("$home/bin/pip" freeze)" ] || : >"$changed"
}

put_files() {
    put 0644 "$checkout/connectoid_relay.py" "$home/connectoid_relay.py"
    put 0644 "$checkout/connectoid_admin.py" "$home/connectoid_admin.py"
    put 0755 "$checkout/systemd/connectoid-certificate" "$home/connectoid-certificate"
    put 0644 "$checkout/systemd/$service" "$units/$service"
    cmp -s "$checkout/systemd/$socket" "$units/$socket" || new_socket=yes
    put 0644 "$checkout/systemd/$socket" "$units/$socket"
    mkdir -p "$(dirname "$admin")"
    # -I ignores the current folder and root's environment.
    cat >"$admin.new" <<WORDS
#!/bin/sh
export STATE_DIRECTORY="\${STATE_DIRECTORY:-$state}"
exec $home/bin/python -I -c '
import sys
sys.path.insert(0, "$home")
sys.argv[0] = "connectoid-admin"
from connectoid_admin import main
sys.exit(main())' "\$@"
WORDS
    chmod 0755 "$admin.new"
    mv -f "$admin.new" "$admin"
}

understood() {
    "$home/bin/python" -I -c '
import shlex, sys
sys.path.insert(0, sys.argv[1])
from connectoid_relay import build_parser
build_parser("--flags").parse_args(shlex.split(sys.argv[2]))' "$home" "$1"
}

put_settings() {
    getent group connectoid >/dev/null || groupadd --system connectoid
    install -d -m 0750 -o root -g connectoid "$settings"
    if [ -f "$settings/relay.env" ]; then
        [ -z "$1" ] || say "$settings/relay.env stays as it is; --flags are for a new one"
    else
        understood "$1" || fail 'the relay is not started; correct --flags' 2
        printf 'FLAGS=%s\n' "${1:---port 8080}" >"$settings/relay.env"
    fi
}

start() {
    if ! systemd_runs; then
        ! command -v systemctl >/dev/null || systemctl enable --quiet "$service"
        say "systemd does not run here: the relay starts with the machine"
        return
    fi
    systemctl daemon-reload
    systemctl enable --quiet "$service"
    if [ "$new_socket" ] && systemctl is-active --quiet "$socket"; then
        # The socket cannot start while the service has the port.
        systemctl stop "$service" "$socket"
        systemctl start "$socket"
    fi
    # Starts that failed, or were many, do not count against this one.
    systemctl reset-failed "$service" 2>/dev/null || true
    if ! systemctl "$([ -e "$changed" ] && echo restart || echo start)" "$service"; then
        journalctl -u "$service" -n 5 -o cat --no-pager >&2
        see="its flags are in $settings/relay.env, its log is journalctl -u connectoid-relay"
        fail "the relay does not start; $see"
    fi
    rm -f "$changed"
    say "the relay runs; sudo connectoid-admin check looks at it"
}

put_all() {
    check_checkout
    find_python
    make_environment "$1"
    put_files
    put_settings "$2"
    start
}

remove_units() {
    for unit in "$service" "$socket"; do
        [ -f "$units/$unit" ] || continue
        if systemd_runs; then
            systemctl disable --quiet --now "$unit"
        elif command -v systemctl >/dev/null; then
            systemctl disable --quiet "$unit"
        fi
        rm -f "${units:?}/$unit"
    done
    ! systemd_runs || systemctl daemon-reload
}

remove() {
    remove_units
    rm -rf "${home:?}" "$admin"
    if [ "$1" ]; then
        # The first of the two is a link to the second under systemd.
        rm -rf "${state:?}" /var/lib/private/connectoid-relay "${settings:?}" \
            "$units/$socket.d" "$units/$service.d" \
            /etc/cron.d/connectoid-certificate /etc/cron.d/connectoid-backup
        ! getent group connectoid >/dev/null || groupdel connectoid
        say "removed, with settings and messages"
    else
        say "removed; settings are in $settings, messages in $state"
    fi
}

main() {
    command=${1:-}
    [ $# = 0 ] || shift
    flags='' purge=''
    while [ $# -gt 0 ]; do
        case "$command $1" in
            'install --flags')
                [ $# -gt 1 ] || fail '--flags needs a text' 2
                [ "$(printf %s "$2" | wc -l)" = 0 ] || fail '--flags takes one line' 2
                flags=$2
                shift
                ;;
            'remove --purge') purge=yes ;;
            *) fail "what is $1? ($0 --help)" 2 ;;
        esac
        shift
    done
    case $command in
        install | upgrade | remove) [ "$(id -u)" = 0 ] || fail 'only root can do this: use sudo' ;;
        -h | --help) usage; exit 0 ;;
        *) usage >&2; exit 2 ;;
    esac
    case $command in
        install) put_all '' "$flags" ;;
        upgrade)
            [ -f "$home/connectoid_relay.py" ] || fail 'nothing is installed: install.sh install'
            put_all --upgrade ''
            ;;
        remove) remove "$purge" ;;
    esac
}

main "$@"
