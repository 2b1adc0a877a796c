#!/bin/sh
# Within the clean Debian of install_test.sh: install, use, lose the disk, upgrade, remove.
set -eu
cd /root/checkout
url=http://127.0.0.1:$PORT/
state=/var/lib/connectoid-relay
# Any point on the curve.
pub=A6qHyiK-iwU3jrHHHvMgrXRuHTtii6ebmFn3QeCCVCo4VQLyXb9VKWw6VF44cnYKtw

step() { echo "ok    $1"; }

# Say what is missing, and print the end of the relay's log.
fail() {
    echo "FAILED $1"
    ! systemd_runs || journalctl -u connectoid-relay --no-pager -n 20
    exit 1
}

systemd_runs() { [ -d /run/systemd/system ]; }
pid() { systemctl show -p MainPID --value connectoid-relay; }
messages() { connectoid-admin stats --json 2>/dev/null | grep -c "\"messages\": $1,"; }
owners() { find $state/ -exec stat -c %u {} + | sort -u | wc -l; }

put_message() {
    curl -s "$url" -d '{"pub": "'$pub'", "action": "send", "data": "QUJD"}' | grep -q '"ok": true'
}

healthy() {
    curl -s --retry 20 --retry-connrefused --retry-delay 1 "${url}health" | grep -q '"ok": true'
}

# Start, stop or restart the relay. Without systemd it runs as in the unit, but for the sandbox.
relay() {
    if systemd_runs; then
        systemctl "$1" connectoid-relay
        return
    fi
    if [ -f /run/relay.pid ]; then
        kill "$(cat /run/relay.pid)" && sleep 2 && rm /run/relay.pid
    fi
    [ "$1" != stop ] || return 0
    mkdir -p $state
    STATE_DIRECTORY=$state /opt/connectoid/bin/python /opt/connectoid/connectoid_relay.py \
        --port "$PORT" --host 127.0.0.1 2>/run/relay.log &
    echo $! >/run/relay.pid
}

first_install() {
    ! sh deploy/install.sh upgrade >out 2>&1 || fail 'no upgrade of nothing'
    grep -q 'nothing is installed' out || fail 'upgrade of nothing'
    mkdir /opt/connectoid
    cp connectoid_relay.py /opt/connectoid/
    chown -R 1234 /opt/connectoid
    ! sh deploy/install.sh install --flags '--prot 1' >out 2>&1 ||
        fail 'no install with wrong flags'
    grep -q -e --prot out || fail 'which flag is wrong'
    [ ! -e /etc/connectoid/relay.env ] || fail 'wrong flags are not kept'
    [ -z "$(find /opt/connectoid ! -user root)" ] || fail 'a folder that is of root alone'
    flags="--port $PORT --host 127.0.0.1 --contact 'Alice \\n <me@example.com>'"
    sh deploy/install.sh install --flags "$flags"
    systemd_runs || relay start
    healthy || fail 'a relay that is well'
    [ "$(stat -c %a:%G /etc/connectoid)" = 750:connectoid ] || fail 'settings for the group alone'
    [ "$(cat /etc/connectoid/relay.env)" = "FLAGS=$flags" ] || fail 'flags as they were given'
    step 'install: the relay is well'
}

second_install() {
    ! systemd_runs || before=$(pid)
    sh deploy/install.sh install --flags '--port 1' >out
    grep -q 'stays as it is' out || fail 'settings that stay'
    ! systemd_runs || [ "$before" = "$(pid)" ] || fail 'a relay that is left alone'
    healthy || fail 'a relay that is still well'
    step 'install again: nothing has changed, the relay was not restarted'
}

# Install over a relay that does not know of its new files, and over one that does not start.
interrupted_install() {
    systemd_runs || return 0
    : >/opt/connectoid/changed
    sh deploy/install.sh install >out
    [ "$before" != "$(pid)" ] || fail 'a relay that was told at last'
    [ ! -e /opt/connectoid/changed ] || fail 'and once only'
    cp /etc/connectoid/relay.env /root/relay.env
    echo 'FLAGS=--port none' >/etc/connectoid/relay.env
    relay stop
    ! sh deploy/install.sh install >out 2>&1 || fail 'a relay with wrong flags'
    grep -q 'argument --port' out || fail "the relay's own words: $(cat out)"
    cp /root/relay.env /etc/connectoid/relay.env
    systemctl reset-failed connectoid-relay
    sh deploy/install.sh install >out
    healthy || fail 'a relay with the right flags'
    step 'install after an interrupted one, and after wrong flags'
}

look() {
    connectoid-admin check --url "$url" || fail 'a check without FAIL'
    put_message || fail 'a message'
    [ "$(messages 1)" = 1 ] || fail 'stats'
    connectoid-admin stats | grep -q 'requests send *1 ' || fail 'what the relay counts'
    step 'check, stats'
}

lose_the_disk() {
    rm -rf /root/backups && mkdir /root/backups
    connectoid-admin backup /root/backups/
    ! connectoid-admin restore /root/backups/*.db >out 2>&1 || fail 'no restore beside a relay'
    grep -q 'stop the relay' out || fail 'restore beside a relay'
    relay stop
    rm -rf $state /var/lib/private/connectoid-relay
    relay start
    healthy || fail 'a relay on a new disk'
    [ "$(messages 0)" = 1 ] || fail 'an empty disk'
    relay stop
    connectoid-admin restore /root/backups/*.db
    relay start
    healthy || fail 'a relay with the backup'
    [ "$(messages 1)" = 1 ] || fail 'the message of the lost disk'
    put_message || fail 'one more message'
    connectoid-admin delete $pub | grep -q '2 messages' || fail 'delete'
    step 'restore after a lost disk, delete'
}

# Files that root makes while the relay is stopped must belong to the relay.
belong() {
    [ "$(owners)" = 1 ] || fail "one owner: $(ls -ln $state/)"
    relay stop
    rm $state/connectoid.db-lock
    connectoid-admin check >/dev/null || true
    [ "$(owners)" = 1 ] || fail "one owner: $(ls -ln $state/)"
    relay start
    healthy || fail 'a relay that may use its files'
    put_message || fail 'and write them'
    step 'files of connectoid-admin belong to the relay'
}

old_schema() {
    python3 -c 'import sqlite3, sys
db = sqlite3.connect("/root/old.db")
db.executescript(open("deploy/schemas/1.sql").read())'
    relay stop
    connectoid-admin restore /root/old.db
    ! connectoid-admin stats >out 2>&1 || fail 'no stats of an old file'
    grep -q 'has schema 1' out || fail 'an old file'
    relay start
    healthy || fail 'a relay with an old file'
    connectoid-admin stats 2>/dev/null | grep -q 'schema  *2' || fail 'a file brought up to date'
    step 'a file of the first schema is brought up to date'
}

upgrade() {
    ! systemd_runs || before=$(pid)
    echo '# newer' >>connectoid_relay.py
    put_message || fail 'a message before the upgrade'
    connectoid-admin stats --json >/root/before 2>/dev/null
    sh deploy/install.sh upgrade
    if systemd_runs; then [ "$before" != "$(pid)" ] || fail 'a new relay'; else relay restart; fi
    healthy || fail 'a relay after the upgrade'
    tail -n 1 /opt/connectoid/connectoid_relay.py | grep -q newer || fail 'the new file'
    connectoid-admin stats --json >/root/after 2>/dev/null
    [ "$(grep '"messages"' /root/after)" = "$(grep '"messages"' /root/before)" ] ||
        fail 'the messages of before'
    step 'upgrade: a new relay, the old messages'
}

environment_of_another_python() {
    rm /opt/connectoid/bin/python3* && ln -s /nowhere /opt/connectoid/bin/python3
    sh deploy/install.sh upgrade >out
    grep -q 'virtual environment' out || fail 'a new environment'
    systemd_runs || relay restart
    healthy || fail 'a relay in it'
    step 'upgrade after another Python'
}

journal() {
    systemd_runs || return 0
    journalctl -u connectoid-relay -o cat --no-pager | grep -q 'listening on' || fail 'a ready line'
    levels=$(journalctl -u connectoid-relay _COMM=python -o json --output-fields=PRIORITY \
        --no-pager | grep -o '"PRIORITY":"."' | sort | uniq -c | tr '\n' ' ')
    echo "log levels: $levels"
    step 'journal'
}

removal() {
    systemd_runs || relay stop
    sh deploy/install.sh remove
    [ -f $state/connectoid.db ] || fail 'messages that stay'
    [ -f /etc/connectoid/relay.env ] || fail 'settings that stay'
    ! systemd_runs || ! systemctl is-active --quiet connectoid-relay ||
        fail 'a relay that has stopped'
    sh deploy/install.sh install
    systemd_runs || relay start
    healthy || fail 'install after removal'
    put_message || fail 'a message after it'
    systemd_runs || relay stop
    sh deploy/install.sh remove --purge
    sh deploy/install.sh remove --purge || fail 'removal of nothing'
    left=$(find / -xdev \( -path /proc -o -path /root -o -path /sys \) -prune \
        -o -iname '*connectoid*' -print | grep -v ^/var/log || true)
    [ -z "$left" ] || fail "nothing left: $left"
    ! getent group connectoid || fail 'no group left'
    step 'remove keeps, remove --purge leaves nothing'
}

trap '[ ! -f /run/relay.pid ] || kill "$(cat /run/relay.pid)"' EXIT
python3 -c 'import ensurepip' 2>/dev/null || echo 'a Debian without python3-venv'
if systemd_runs; then
    echo "systemd $(systemctl --version | head -n 1 | cut -d' ' -f2) runs"
else
    echo 'without systemd'
fi
first_install
second_install
interrupted_install
look
lose_the_disk
belong
old_schema
upgrade
environment_of_another_python
journal
removal
echo 'all done'
