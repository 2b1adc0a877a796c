"""Type what docs/hosting.md shows, word for word, in the Debian that install_test.sh boots.

systemd, sudo, apt, pip, groups, curl, nginx and ssh are real. The machine has no network but its
own, so it has the ports of the page for itself; packages lie ready in it. Stand-ins are there
for what needs the internet: a certificate authority (certbot, acme.sh, Caddy's folder).
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

CHECKOUT = Path("/home/alice/connectoid")
PAGE = (CHECKOUT / "docs" / "hosting.md").read_text()
ENVIRONMENT = {
    "LANG": "C.UTF-8",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
}
HEALTHY = '{"ok": true}'
MAILBOX = "A6qHyiK-iwU3jrHHHvMgrXRuHTtii6ebmFn3QeCCVCo4VQLyXb9VKWw6VF44cnYKtw"
STATE_FOLDER = Path("/var/lib/private/connectoid-relay")
SETTINGS = Path("/etc/connectoid/relay.env")

# A deadline for a busy machine.
SLOWLY_S = 60
# A deadline for pip, apt and a start after them.
INSTALLING_S = 300

VPS = "On a VPS, under systemd"
PORT_443 = "Port 443, and restarts that nobody notices"
HTTPS = "HTTPS, built in"
CADDY = "HTTPS by Caddy"
NGINX = "HTTPS by nginx"
PI = "A Raspberry Pi at home"

# Each is as small as can be.
STAND_INS = {
    # What an authority signs is valid for the name; "localhost" is for the test's own look.
    "/usr/local/bin/sign": r"""#!/bin/sh
exec openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 90 \
    -subj /CN=relay.example.com -addext subjectAltName=DNS:relay.example.com,DNS:localhost \
    -out "$1" -keyout "$2" 2>/dev/null
""",
    # It keeps its arguments in folders for root alone, and runs the hook in a shell: now
    # and with each renewal. Real hooks are found along Debian's path.
    "/usr/local/bin/certbot": r"""#!/bin/bash
set -eu
[ "$(id -u)" = 0 ]
umask 077
if [ "$1" = certonly ]; then
    if [ "$2 $3" = "--webroot -w" ]; then
        [ -d "$4" ]
        shift 3
        set -- certonly --standalone "${@:2}"
    fi
    [ "$2 $3 $5" = "--standalone -d --deploy-hook" ] && [ $# = 6 ]
    mkdir -p "/etc/letsencrypt/live/$4"
    printf %s "$6" >/etc/letsencrypt/hook
    printf %s "$4" >/etc/letsencrypt/name
fi
export RENEWED_LINEAGE="/etc/letsencrypt/live/$(cat /etc/letsencrypt/name)"
sign "$RENEWED_LINEAGE/fullchain.pem" "$RENEWED_LINEAGE/privkey.pem"
exec sh -c "$(cat /etc/letsencrypt/hook)"
""",
    # Likewise: copy to the given places, then run the command, now and with each --cron.
    "/root/.acme.sh/acme.sh": r"""#!/bin/sh
set -eu
if [ "$1" = --install-cert ]; then
    [ "$2 $3 $4 $6 $8" = "-d relay.example.com --fullchain-file --key-file --reloadcmd" ]
    [ $# = 9 ]
    printf '%s\n' "$5" "$7" "$9" >/root/.acme.sh/installed
fi
{ read -r certificate; read -r key; read -r command; } </root/.acme.sh/installed
sign "$certificate" "$key"
cd /root/.acme.sh && eval "$command"
""",
}

CADDY_FOLDER = ("/var/lib/caddy/.local/share/caddy/certificates/"
                "acme-v02.api.letsencrypt.org-directory/relay.example.com")
# As cron does it: without a terminal, in a small environment, from the sixth word on.
AS_CRON = (
    "line=$(grep -v '^#' /etc/cron.d/connectoid-certificate)\n"
    "env -i PATH=/usr/bin:/bin SHELL=/bin/sh HOME=/root"
    " /bin/sh -c \"$(echo \"$line\" | cut -d' ' -f7-)\"")


def commands() -> dict[str, list[str]]:
    """Return the page's blocks of shell commands by the heading above them."""
    blocks: dict[str, list[str]] = {}
    for part in re.split(r"(?m)^#+ ", PAGE):
        title, _, text = part.partition("\n")
        found = re.findall(r"^ *```sh\n.*?^ *```$", text, re.MULTILINE | re.DOTALL)
        if found:
            blocks[title.strip()] = [
                textwrap.dedent(block).removeprefix("```sh\n").removesuffix("```")
                for block in found]
    return blocks


COMMANDS = commands()


class Failure(Exception):
    """A promise of the page does not hold here; the text says which."""


def expect(holds: object, promise: str) -> None:
    """Raise Failure with the promise unless it holds."""
    if not holds:
        raise Failure(promise)


def start(block: str, user: str = "alice") -> subprocess.Popen[str]:
    """Start a block of commands in the checkout, as a person would type it."""
    home = f"/home/{user}"
    if user == "root":
        home = "/root"
    command = ["setpriv", "--reuid", user, "--regid", user, "--init-groups",
               "bash", "-euo", "pipefail", "-c", block]
    return subprocess.Popen(
        command, cwd=CHECKOUT, env={**ENVIRONMENT, "HOME": home, "USER": user}, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(block: str, user: str = "alice") -> str:
    """Run a block of commands and return what it printed; raise Failure if it fails."""
    process = start(block, user)
    try:
        output, errors = process.communicate(timeout=INSTALLING_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise Failure(f"not done in {INSTALLING_S} s:\n{block}") from None
    expect(process.returncode == 0, f"exit {process.returncode} of\n{block}\n{output}{errors}")
    return output


def fails(block: str) -> bool:
    """Return whether a block ends with an error."""
    process = start(block)
    process.communicate(timeout=INSTALLING_S)
    return process.returncode != 0


def fetch(url: str, *options: str) -> str:
    """Return what curl prints of a URL, or nothing."""
    command = ["curl", "-s", "--max-time", "5", *options, url]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def until(holds: Callable[[], bool], promise: str) -> None:
    """Wait until something holds; raise Failure with the promise if it never does."""
    end_s = time.monotonic() + SLOWLY_S
    while not holds():
        expect(time.monotonic() < end_s, promise)
        time.sleep(0.1)


def log() -> str:
    """Return what the relay has written."""
    return run("journalctl --boot -u connectoid-relay -o cat --no-pager", "root")


def set_flags(flags: str) -> None:
    """Write the relay's flags as the page has them."""
    SETTINGS.write_text(f"FLAGS={flags}\n")


def is_well(url: str = "http://localhost:8080") -> bool:
    """Return whether a relay answers there that is well."""
    return fetch(f"{url}/health") == HEALTHY


# What the page says, in its order. Each begins where the one before ended.


def every_command_is_typed_here() -> None:
    counts = {title: len(found) for title, found in COMMANDS.items() if title in TYPED}
    expect(counts == TYPED, f"the page has other blocks of commands: {counts}")


def install() -> None:
    output = run(COMMANDS[VPS][0])
    expect(output.rstrip().endswith(HEALTHY), f"the last line is the relay's health: {output}")
    expect("listening on http://" in log(), "the ready line is in the journal")
    uid = run("stat -c %u " + str(STATE_FOLDER), "root").strip()
    expect(uid != "0", "the state belongs to a user of its own")
    rights = run(f"stat -c %a {STATE_FOLDER}", "root").strip()
    expect(rights == "700", f"the state is for that user alone: {rights}")


def restart_takes_new_flags() -> None:
    set_flags("--port 8080 --name Ours")
    run(COMMANDS[VPS][1])
    until(is_well, "the relay is well after a restart")
    document = fetch("http://localhost:8080/", "-H", "Accept: application/json")
    expect('"name": "Ours"' in document, f"the new name is shown: {document}")


def log_and_state_are_shown() -> None:
    expect("listening on http://" in run(COMMANDS[VPS][2]), "the log is shown")


def upgrade_keeps_messages() -> None:
    message = f'{{"pub": "{MAILBOX}", "action": "send", "data": "QUJD"}}'
    expect(fetch("http://localhost:8080/", "-d", message) == HEALTHY, "a message is taken")
    relay = CHECKOUT / "connectoid_relay.py"
    text = relay.read_text()
    newer = re.sub(r'(?m)^__version__ = ".*"', '__version__ = "99.1"', text)
    relay.write_text(newer)
    run(COMMANDS[VPS][3])
    until(is_well, "the relay is well after an upgrade")
    expect("connectoid relay 99.1 listening" in log(), "the newer relay runs")
    check = f'{{"pub": "{MAILBOX}", "action": "check", "at": 0}}'
    expect('"found": true' in fetch("http://localhost:8080/", "-d", check), "the message is there")
    relay.write_text(text)


def install_again_keeps_flags() -> None:
    set_flags("--port 8081")
    lines = COMMANDS[VPS][0].splitlines()
    kept = [line for line in lines if "FLAGS" not in line and "curl http" not in line]
    again = "\n".join([*kept, COMMANDS[VPS][1]])
    run(again.replace("python3 -m venv", "python3 -m venv --clear"))
    until(lambda: is_well("http://localhost:8081"), "the flags are as they were")


def files_are_read_by_the_group() -> None:
    section = PAGE.split(f"# {VPS}\n")[1]
    words = re.findall(r"`(sudo (?:chgrp|chmod|systemctl reload) [^`]*)`", section)[:3]
    keys = Path("/etc/connectoid/keys.toml")
    keys.write_text('[keys.alice]\nkey = "0123456789abcdef0123456789abcdef"\n')
    keys.chmod(0o600)
    set_flags("--port 8080 --keys /etc/connectoid/keys.toml")
    expect(fails(COMMANDS[VPS][1]), "a file that the relay may not read is refused")
    run("\n".join(words[:2]).replace("FILE", str(keys)))
    run("systemctl reset-failed connectoid-relay", "root")
    run(COMMANDS[VPS][1])
    until(is_well, "the relay reads its keys")
    run(words[2])
    until(lambda: "read the files again" in log(), "a reload reads the files again")


def port_443_is_held_for_the_relay() -> None:
    set_flags("--port 443")
    expect(fails("sudo systemctl restart connectoid-relay"), "the relay has no right to port 443")
    expect("ermission denied" in log(), "the log says why")
    run("systemctl reset-failed connectoid-relay", "root")
    run(COMMANDS[PORT_443][0])
    until(lambda: is_well("http://localhost:443"), "the relay answers at port 443")


def port_443_refuses_nobody_during_a_restart() -> None:
    run("systemctl stop connectoid-relay", "root")
    early = start("curl -s --max-time 30 http://localhost:443/health")
    output, _ = early.communicate(timeout=SLOWLY_S)
    expect(output.strip() == HEALTHY, f"a client that comes early is served: {output}")


def port_443_block_is_for_changes_too() -> None:
    override = Path("/etc/systemd/system/connectoid-relay.socket.d/override.conf")
    override.write_text(override.read_text().replace("443", "444"))
    run("\n".join(COMMANDS[PORT_443][0].splitlines()[-4:]))
    until(lambda: is_well("http://localhost:444"), "the relay answers at the new port")
    override.unlink()
    run("systemctl disable --now connectoid-relay.socket connectoid-relay", "root")
    run("systemctl daemon-reload && systemctl enable connectoid-relay", "root")


def certificate(way: str, before: str, obtain: str, renew: str, kept: str) -> None:
    """Get a certificate in one of the page's ways, turn TLS on, renew."""
    run(before, "root")
    user = "alice"
    if way == "acme.sh":
        user = "root"
    run(obtain, user)
    run(COMMANDS[HTTPS][3])

    def is_served(authority: str) -> bool:
        there = ("--cacert", authority, "--connect-to", "relay.example.com:8443:localhost:8443")
        names = ("localhost", "relay.example.com")
        return {fetch(f"https://{name}:8443/health", *there) for name in names} == {HEALTHY}

    run(f"cp {kept} /root/first.pem", "root")
    until(lambda: is_served("/root/first.pem"), f"{way}: the certificate is served")
    run(renew, "root")
    until(lambda: is_served(kept), f"{way}: the renewed certificate is served")
    expect(not is_served("/root/first.pem"), f"{way}: the former one is not")
    run("rm -rf /etc/connectoid/tls", "root")


def certificates() -> None:
    certificate("certbot", "", COMMANDS[HTTPS][0], "certbot renew",
                "/etc/letsencrypt/live/relay.example.com/fullchain.pem")
    certificate("acme.sh", "", COMMANDS[HTTPS][1], "/root/.acme.sh/acme.sh --cron",
                "/root/relay.crt")
    sign = "sign relay.example.com.crt relay.example.com.key"
    certificate("Caddy", f"umask 077; mkdir -p {CADDY_FOLDER}; cd {CADDY_FOLDER}; {sign}",
                f"{COMMANDS[HTTPS][2]}sudo sh -c {shlex.quote(AS_CRON)}",
                f"cd {CADDY_FOLDER}; {sign}; {AS_CRON}", f"{CADDY_FOLDER}/relay.example.com.crt")
    file = Path("/etc/cron.d/connectoid-certificate")
    form = re.fullmatch(r"\d+ \d+ \* \* \* root [^%]*\n", file.read_text())
    expect(form and file.stat().st_mode & 0o777 == 0o644, "cron takes the file")


def nginx_takes_its_configuration() -> None:
    # apt starts it where it was not installed yet.
    run("systemctl start nginx", "root")
    run(COMMANDS[NGINX][0])
    (block,) = re.findall(r"```nginx\n(.*?)```", PAGE, re.DOTALL)
    Path("/etc/nginx/sites-enabled/relay.conf").write_text(block)
    run("nginx -t -q && systemctl restart nginx", "root")
    before = run("systemctl show -p StateChangeTimestampMonotonic --value nginx", "root")
    run("certbot renew", "root")
    reloaded = "systemctl show -p StateChangeTimestampMonotonic --value nginx"
    expect(run(reloaded, "root") != before, "nginx is told of a renewal")
    run("rm /etc/nginx/sites-enabled/relay.conf && systemctl stop nginx", "root")


def behind_caddy() -> None:
    run(COMMANDS[CADDY][0])
    until(is_well, "the relay is well behind a proxy")


def tunnel_from_home() -> None:
    """The VPS is a network of its own, in which ports 22 and 8080 are free."""
    run(r"""
        echo '192.0.2.1 relay.example.com' >>/etc/hosts
        ssh-keygen -q -A
        cd /home/alice && mkdir -m 0700 .ssh
        ssh-keygen -q -t ed25519 -N '' -f .ssh/id_ed25519
        cp .ssh/id_ed25519.pub .ssh/authorized_keys
        key=$(cut -d' ' -f1,2 /etc/ssh/ssh_host_ed25519_key.pub)
        echo "relay.example.com $key" >.ssh/known_hosts
        chown -R alice:alice .ssh
        ip netns add vps
        ip link add home type veth peer name world netns vps
        ip addr add 192.0.2.2/24 dev home && ip link set home up
        ip -n vps addr add 192.0.2.1/24 dev world
        ip -n vps link set world up && ip -n vps link set lo up
        mkdir -p /run/sshd
        systemd-run --quiet --unit=vps-sshd ip netns exec vps /usr/sbin/sshd -D -e -f /dev/null \
            -o UsePAM=no -o HostKey=/etc/ssh/ssh_host_ed25519_key
    """, "root")
    until(lambda: not fails("(: </dev/tcp/192.0.2.1/22) 2>/dev/null"), "sshd listens")
    tunnel = start(COMMANDS[PI][0])
    on_vps = ("ip", "netns", "exec", "vps", "curl", "-s", "http://127.0.0.1:8080/health")

    def reaches() -> bool:
        shown = subprocess.run(on_vps, capture_output=True, text=True, check=False)
        return shown.stdout.strip() == HEALTHY

    until(reaches, "the relay at home is reached through the tunnel")
    _, errors = start(COMMANDS[PI][0]).communicate(timeout=SLOWLY_S)
    expect("remote port forwarding failed" in errors, "a second tunnel does not stay without")
    expect(tunnel.poll() is None, "the first one stays")
    tunnel.kill()
    tunnel.communicate()
    run("systemctl stop vps-sshd && ip netns delete vps", "root")


def removal_leaves_nothing() -> None:
    run(COMMANDS[PORT_443][0])
    run(COMMANDS[PORT_443][1])
    listing = ("find /etc /opt /var/lib -iname '*connectoid*' ! -path '/var/lib/systemd/*';"
               " getent group connectoid || true")
    left = run(listing, "root")
    expect(left == "", f"nothing is left: {left}")
    expect(fetch("http://localhost:443/health") == "", "nobody listens")


TYPED = {VPS: 4, PORT_443: 2, HTTPS: 4, CADDY: 1, NGINX: 1, PI: 1}
STEPS = (
    every_command_is_typed_here, install, restart_takes_new_flags, log_and_state_are_shown,
    upgrade_keeps_messages, install_again_keeps_flags, files_are_read_by_the_group,
    port_443_is_held_for_the_relay, port_443_refuses_nobody_during_a_restart,
    port_443_block_is_for_changes_too, certificates, nginx_takes_its_configuration,
    behind_caddy, tunnel_from_home, removal_leaves_nothing)


def main() -> int:
    """Type the page; return 0, or 1 after saying what did not hold."""
    for name, text in STAND_INS.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)
        Path(name).chmod(0o755)
    for step in STEPS:
        try:
            step()
        except Failure as failure:
            print(f"FAILED hosting.md, {step.__name__}: {failure}", flush=True)
            journal = ["journalctl", "--boot", "-u", "connectoid-relay", "--no-pager", "-n", "20"]
            subprocess.run(journal, check=False)
            return 1
        print(f"ok    hosting.md: {step.__name__.replace('_', ' ')}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
