"""Cases of small forms: base64url, keys, addresses, links."""

from __future__ import annotations

from collections.abc import Iterator

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from vector_forms import RELAY, commit, invite, mailbox
from vector_keys import FIELD, HALF, ORDER, Json, Key, b64, key, no_point, scatter, unb64
from vector_people import A0, A0_AT, A1, A1_AT, A2, A2_AT, AF_AT, ALICE, INVITATION, R, S


def base64url_cases() -> Iterator[Json]:
    """Yield texts, with the octets that they stand for."""
    for octets in (b"", b"\0", b"\xff\xff", b"\xfb\xff\xbf", scatter("base64url", 49)):
        yield {"name": f"{len(octets)} bytes", "text": b64(octets), "octets": octets.hex()}
    for name, text in {
        "padding": "AA==",
        "padding of one": "AAA=",
        "length 1 modulo 4": "AAAAA",
        "unused bits in 2": "AB",
        "unused bits in 3": "AAB",
        "plus": "+_-A",
        "slash": "/AAA",
        "new line at the end": "AAAA\n",
        "space within": "AA AA",
        "not ASCII": "AAAé",
        "full-width digit": "AAA\uff11",
        "NUL": "AAA\0",
        "dot": "AA.A",
    }.items():
        yield {"name": name, "text": text, "refused": "encoding"}


def key_cases() -> Iterator[Json]:
    """Yield public keys, with the private ones."""
    for name, number in (("scalar 1", 1), ("the last scalar", ORDER - 1), ("any", ALICE.scalar)):
        public = ec.derive_private_key(number, ec.SECP384R1()).public_key()
        pub = b64(public.public_bytes(Encoding.X962, PublicFormat.CompressedPoint))
        yield {"name": name, "pub": pub, "private": Key(number, pub).private}
    octets = unb64(ALICE.pub)
    whole = (
        key("Alice signs")
        .secret.public_key()
        .public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    )
    for name, pub in {
        "no point": no_point(),
        "x is the field's prime": b64(b"\2" + FIELD.to_bytes(HALF, "big")),
        "x over the field": b64(b"\2" + b"\xff" * HALF),
        "first byte 4": b64(b"\4" + octets[1:]),
        "first byte 0": b64(b"\0" + octets[1:]),
        "first byte 6": b64(b"\6" + octets[1:]),
        "point at infinity": b64(b"\0"),
        "empty": "",
        "one byte short": b64(octets[:-1]),
        "one byte more": b64(octets + b"\0"),
        "not compressed": b64(whole),
        "padded": ALICE.pub + "==",
        "unused bits": ALICE.pub[:-1] + "B",
        "P-256": b64(b"\2" + scatter("P-256", 32)),
        "standard alphabet": "A+" + ALICE.pub[2:],
        "space at the end": ALICE.pub + " ",
    }.items():
        yield {"name": name, "pub": pub, "refused": "address"}


GOOD_URLS = {
    "plain": RELAY,
    "no slash": "https://relay.example.com",
    "port": "https://relay.example.com:8443/",
    "last port": "https://relay.example.com:65535/",
    "path": "https://example.com/relays/one",
    "IPv4": "https://192.0.2.1/",
    "IPv6": "https://[2001:db8::1]:8443/",
    "http to localhost": "http://localhost:8080/",
    "http to 127.0.0.1": "http://127.0.0.1:8080",
    "http to ::1": "http://[::1]:8080/",
    "http to the end of loopback": "http://127.255.255.255/",
    "capitals": "https://Relay.Example.COM/",
    "a name without dots": "https://relay/",
    "digits and a hyphen": "https://1-a.2b/",
    "63 characters between dots": f"https://{'a' * 63}.example/",
    "a host of 253 characters": f"https://{'a.' * 126}a/",
    "the last IPv4": "https://255.255.255.255/",
    "IPv6, the end IPv4": "https://[64:ff9b::192.0.2.1]/",
    "IPv6, whole": "https://[2001:0db8:0:0:0:0:0:1]/",
    "IPv6, one group left out": "https://[2001:db8:0:0::0:0:1]/",
    "empty segments": "https://relay.example.com//a//",
    "percent": "https://relay.example.com/%41%C3%bc%2F",
    "three dots": "https://relay.example.com/.../a..b/.a",
    "all signs": "https://relay.example.com/._~!$&'()*+,;=:@-",
    "512 characters": "https://relay.example.com/".ljust(512, "a"),
}

HOSTILE_URLS = {
    "http": "http://relay.example.com/",
    "http to a name that begins like loopback": "http://127.0.0.1.example.com/",
    "http to a name like localhost": "http://localhost.example.com/",
    "http to a home": "http://192.168.1.1/",
    "http to this host's all addresses": "http://0.0.0.0:8080/",
    "http to loopback as a number": "http://2130706433/",
    "user": "https://alice@relay.example.com/",
    "user and password": "https://a:b@relay.example.com/",
    "a host for a user": "https://relay.example.com:443@192.0.2.1/",
    "query": RELAY + "?a=b",
    "fragment": RELAY + "#a",
    "javascript": "javascript:alert(1)",
    "file": "file:///etc/passwd",
    "data": "data:text/plain,a",
    "ftp": "ftp://a/",
    "web socket": "wss://relay.example.com/",
    "no scheme": "relay.example.com",
    "no host": "https:///a",
    "port 0": "https://relay.example.com:0/",
    "port 65536": "https://relay.example.com:65536/",
    "port without digits": "https://relay.example.com:/",
    "space": "https://relay.example.com/ a",
    "space before": " https://relay.example.com/",
    "new line": "https://relay.example.com/\n",
    "header in a path": "https://relay.example.com/\r\nHost:a",
    "backslash": "https://relay.example.com\\@192.0.2.1/",
    "not ASCII": "https://r\u00e9lay.example.com/",
    "513 characters": RELAY.ljust(513, "a"),
    "zone": "http://[fe80::1%25eth0]/",
    "zone, https": "https://[fe80::1%25eth0]/",
    "zone, without escape": "https://[fe80::1%eth0]/",
    "IPv6 of one number": "https://[1]/",
    "IPv6 of nothing": "https://[]/",
    "IPv6 of a colon": "https://[:]/",
    "IPv6 of three colons": "https://[:::]/",
    "IPv6 of seven groups": "https://[1:2:3:4:5:6:7]/",
    "IPv6 of nine groups": "https://[1:2:3:4:5:6:7:8:9]/",
    "IPv6 of eight groups and a gap": "https://[1:2:3:4::5:6:7:8]/",
    "IPv6 with two gaps": "https://[1::2::3]/",
    "IPv6 with five digits": "https://[2001:db8::00001]/",
    "IPv6 with IPv4 before it": "https://[192.0.2.1::]/",
    "IPv6 with IPv4 over 255": "https://[64:ff9b::192.0.2.256]/",
    "IPv6 with IPv4 of three": "https://[64:ff9b::192.0.2]/",
    "IPv6 with IPv4 of a zero before": "https://[64:ff9b::192.0.2.01]/",
    "IPv6 of the future": "https://[v1.a]/",
    "IPv6 without brackets": "https://2001:db8::1/",
    "IPv4 over 255": "https://192.0.2.256/",
    "IPv4 of three numbers": "https://192.0.513/",
    "IPv4 of five numbers": "https://192.0.2.1.1/",
    "IPv4 of a zero before": "https://192.0.02.1/",
    "IPv4 in octal": "https://0300.0.2.1/",
    "IPv4 in hexadecimal": "https://0xc0.0.2.0x1/",
    "IPv4 as a number": "https://3221225985/",
    "IPv4 as a number in hexadecimal": "https://0xC0000201/",
    "a name whose end is a number": "https://relay.example.1/",
    "a name whose end is 0x": "https://relay.example.0x/",
    "a dot at the end": "https://relay.example.com./",
    "a dot at the beginning": "https://.relay.example.com/",
    "two dots": "https://relay..example.com/",
    "dots alone": "https://.../",
    "a hyphen at the beginning": "https://-relay.example.com/",
    "a hyphen at the end": "https://relay-.example.com/",
    "64 characters between dots": f"https://{'a' * 64}.example/",
    "a host of 254 characters": f"https://{'a.' * 126}aa/",
    "IDNA": "https://xn--rlay-bpa.example.com/",
    "IDNA in capitals": "https://XN--RLAY-BPA.example.com/",
    "IDNA of nothing": "https://xn--.example.com/",
    "IDNA of no letter": "https://xn--a.example.com/",
    "a dot of other writings": "https://relay\u3002example.com/",
    "a full-width digit": "https://192.0.2.\uff11/",
    "percent in the host": "https://relay%2eexample.com/",
    "a line below in the host": "https://relay_1.example.com/",
    "a zero before the port": "https://relay.example.com:0443/",
    "a port of six digits": "https://relay.example.com:100000/",
    "a port in full-width digits": "https://relay.example.com:\uff18/",
    "a port below 0": "https://relay.example.com:-1/",
    "two ports": "https://relay.example.com:1:2/",
    "percent alone": "https://relay.example.com/%",
    "percent of one digit": "https://relay.example.com/%4",
    "percent of no digits": "https://relay.example.com/%zz",
    "a segment of a dot": "https://relay.example.com/./a",
    "a segment of two dots": "https://relay.example.com/a/../b",
    "two dots at the end": "https://relay.example.com/a/..",
    "a dot in percent": "https://relay.example.com/%2e/a",
    "two dots in percent": "https://relay.example.com/a/%2E%2e/b",
    "one dot of two in percent": "https://relay.example.com/a/.%2e/b",
    "NUL": "https://relay.example.com/\0",
    "a tabulator": "https://relay.example.com/a\tb",
    "capitals in the scheme": "HTTPS://relay.example.com/",
    "one slash": "https:/relay.example.com/",
    "an empty user": "https://@relay.example.com/",
}


def listed(address: str) -> list[Json]:
    """Return the mailboxes of a good address."""
    boxes = []
    for text in address.split("~"):
        pub, url, *exts = text.split(".")
        box: Json = {"pub": pub, "url": unb64(url).decode(), "ext": None}
        for ext in exts:
            box["ext"] = unb64(ext).decode()
        boxes.append(box)
    return boxes


def long_address(length: int) -> str:
    """Return an address of so many characters, about 4,096."""
    first = mailbox(A0.pub, RELAY, "a" * 1_024)
    second = mailbox(A1.pub, RELAY, "a" * 1_024)
    for url in (RELAY, RELAY + "a", RELAY + "aa"):
        for count in range(1, 1_025):
            address = f"{first}~{second}~{mailbox(A2.pub, url, 'a' * count)}"
            if len(address) == length:
                return address
    raise ValueError(length)


def good_addresses() -> Iterator[tuple[str, str]]:
    """Yield names and addresses that a client may write to."""
    for name, url in GOOD_URLS.items():
        yield f"url: {name}", mailbox(A0.pub, url)
    yield "ext", mailbox(A0.pub, RELAY, "key 1")
    yield "ext beyond ASCII", mailbox(A0.pub, RELAY, "schlüssel 🔑.~")
    yield "ext of 1024 code points", mailbox(A0.pub, RELAY, "🔑" * 512 + "a" * 512)
    yield "4096 characters", long_address(4_096)
    yield "two mailboxes", f"{A0_AT}~{A1_AT}"
    yield "three mailboxes", f"{A0_AT}~{mailbox(A1.pub, 'https://other.example/', 'ext')}~{A2_AT}"


def bad_addresses() -> Iterator[tuple[str, str]]:
    """Yield names and addresses that nobody should write to."""
    for name, url in HOSTILE_URLS.items():
        yield f"url: {name}", mailbox(A0.pub, url)
    yield "url is not UTF-8", mailbox(A0.pub, b"https://\xff.example/")
    yield "url with unused bits", f"{A0.pub}.{b64(RELAY.encode())[:-1]}9"
    yield "url padded", f"{A0_AT}="
    yield "url as plain text", f"{A0.pub}.{RELAY}"
    yield "url empty", f"{A0.pub}."
    yield "pub alone", A0.pub
    yield "empty", ""
    yield "ext empty", f"{A0_AT}."
    yield "ext of 1025 code points", mailbox(A0.pub, RELAY, "a" * 1_025)
    yield "4097 characters", long_address(4_097)
    yield "4098 characters", long_address(4_098)
    yield "ext of 1024 code points over 4096 characters", mailbox(A0.pub, RELAY, "🔑" * 1_024)
    yield "ext is not UTF-8", mailbox(A0.pub, RELAY, b"\xc3\x28")
    yield "ext holds a surrogate", mailbox(A0.pub, RELAY, b"\xed\xa0\x80")
    yield "fourth part", f"{mailbox(A0.pub, RELAY, 'ext')}.AAAA"
    yield "four mailboxes", "~".join((A0_AT, A1_AT, A2_AT, AF_AT))
    yield "a key twice", f"{A0_AT}~{mailbox(A0.pub, 'https://other.example/')}"
    yield "empty mailbox at the end", f"{A0_AT}~"
    yield "empty mailbox at the beginning", f"~{A0_AT}"
    yield "second mailbox damaged", f"{A0_AT}~{A1_AT[1:]}"
    yield "space at the end", f"{A0_AT} "
    yield "no point", mailbox(no_point())
    yield "second is no point", f"{A0_AT}~{mailbox(no_point())}"


def address_cases() -> Iterator[Json]:
    """Yield addresses, with their mailboxes."""
    for name, address in good_addresses():
        yield {"name": name, "address": address, "mailboxes": listed(address)}
    http = mailbox(A0.pub, HOSTILE_URLS["http"])
    yield {
        "name": "http where the app allows it",
        "allow_http": True,
        "address": http,
        "mailboxes": listed(http),
    }
    for name, address in bad_addresses():
        yield {"name": name, "address": address, "refused": "address"}
    user = mailbox(A0.pub, "http://alice@relay.example.com/")
    yield {
        "name": "user, where the app allows http",
        "allow_http": True,
        "address": user,
        "refused": "address",
    }


EXT_AT = mailbox(A1.pub, "https://other.example/", "key 1")

APP = "https://app.example.com/"


def good_links() -> Iterator[tuple[str, str, str]]:
    """Yield names, links and the invitations in them."""
    secret = (S, commit(ALICE.pub, R))
    several = invite(f"{A0_AT}~{EXT_AT}", *secret)
    yield "in the fragment", f"{APP}#connectoid={INVITATION}", INVITATION
    yield "in the query", f"{APP}?connectoid={INVITATION}", INVITATION
    yield "bare", INVITATION, INVITATION
    yield "ext", f"{APP}#connectoid={invite(EXT_AT, *secret)}", invite(EXT_AT, *secret)
    yield "two mailboxes", f"{APP}#connectoid={several}", several
    three = invite(f"{EXT_AT}~{A2_AT}~{A0_AT}", *secret)
    yield "three mailboxes, bare", three, three
    yield "other parameters around it", f"{APP}?a=b#x=1&connectoid={several}&y=2", several
    yield "escaped", f"{APP}#connectoid={several.replace('~', '%7E').replace('.', '%2e')}", several
    other = invite(A2_AT, *secret)
    yield (
        "the fragment before the query",
        f"{APP}?connectoid={other}#connectoid={INVITATION}",
        INVITATION,
    )
    yield (
        "the query, where the fragment is another",
        f"{APP}?connectoid={INVITATION}#top",
        INVITATION,
    )
    yield "white space around it", f" \t{APP}#connectoid={INVITATION}\r\n", INVITATION
    yield "an app of its own scheme", f"shoppinglist:open#connectoid={INVITATION}", INVITATION


DAMAGED_LINKS: dict[str, dict[str, str]] = {
    "version": {
        "version 2": f"{APP}#connectoid=2~{INVITATION}",
        "version 2 of another form": f"{APP}#connectoid=2~!anything(at)all",
        "version 2, bare": f"2~{INVITATION}",
        "version 2, bare, of another form": "2~QUJD",
        "version 2 in the query": f"{APP}?connectoid=2~{INVITATION}",
        "version 2, escaped": f"{APP}#connectoid=2%7E{INVITATION}",
        "version 10": f"{APP}#connectoid=10~{INVITATION}",
        "version 999": f"{APP}#connectoid=999~{INVITATION}",
        "version 2 and nothing": f"{APP}#connectoid=2~",
    },
    "missing": {
        "nothing": "",
        "no link": "hello",
        "the app alone": APP,
        "another parameter": f"{APP}#a={INVITATION}",
        "another case": f"{APP}#Connectoid={INVITATION}",
        "in the path": f"{APP}{INVITATION}",
        "no name": f"{APP}#{INVITATION}",
        "a text around it": f"open {INVITATION}",
    },
    "no secret": {
        "an address": A0_AT,
        "an address in a link": f"{APP}#connectoid={EXT_AT}",
        "no ext and no secret": f"{APP}#connectoid={mailbox(A0.pub)}",
        "an empty secret": f"{APP}#connectoid={A0_AT}..",
        "the first mailbox of two": f"{A0_AT}~{A1_AT}",
    },
    "secret": {
        "cut off by 1": INVITATION[:-1],
        "cut off by 4": INVITATION[:-4],
        "one more character": INVITATION + "A",
        "a full stop after it": f"{APP}#connectoid={INVITATION}.",
        **{
            f"{size} bytes": invite(A0_AT, S, bytes(size - len(S))) for size in (47, 49, 53, 55)
        },
        "S alone": f"{A0_AT}..{b64(S)}",
        "padding": f"{APP}#connectoid={INVITATION}==",
        "another alphabet": f"{APP}#connectoid={INVITATION[:-1]}+",
        "a bracket after it": f"{APP}#connectoid={INVITATION})",
        "a fifth part": f"{INVITATION}.AAAA",
    },
    "address": {
        "an empty value": f"{APP}#connectoid=",
        "the beginning is lost": f"{APP}#connectoid={INVITATION[4:]}",
        "a space within": f"{APP}#connectoid={INVITATION[:80]} {INVITATION[80:]}",
        "a fourth part in the first mailbox": f"{APP}#connectoid={INVITATION}~{A1_AT}",
        "http": invite(mailbox(A0.pub, "http://relay.example.com/"), S, commit(ALICE.pub, R)),
        "a URL with a user": invite(mailbox(A0.pub, HOSTILE_URLS["user"]), S, commit(ALICE.pub, R)),
        "four mailboxes": invite("~".join((A0_AT, A1_AT, A2_AT, AF_AT)), S, commit(ALICE.pub, R)),
        "no point": invite(mailbox(no_point()), S, commit(ALICE.pub, R)),
        "cut off in the URL": f"{APP}#connectoid={INVITATION[:90]}",
        "cut off in the key": f"{APP}#connectoid={A0.pub[:50]}",
        "a marker of version 0": f"{APP}#connectoid=0~{INVITATION}",
        "a marker of version 1": f"{APP}#connectoid=1~{INVITATION}",
        "a marker with a zero before": f"{APP}#connectoid=02~{INVITATION}",
        "a marker of version 1000": f"{APP}#connectoid=1000~{INVITATION}",
        "a marker in other digits": f"{APP}#connectoid=\u0662~{INVITATION}",
        "a marker without a tilde": f"{APP}#connectoid=2",
        "a marker in second place": f"{APP}#connectoid={A1_AT}~2~{INVITATION}",
        "escaped wrongly": f"{APP}#connectoid={INVITATION.replace('.', '%zz')}",
    },
}


def bad_links() -> Iterator[tuple[str, str, str]]:
    """Yield names, the kind of damage, and links."""
    for damage, links in DAMAGED_LINKS.items():
        yield from ((name, damage, link) for name, link in links.items())


def link_cases() -> Iterator[Json]:
    """Yield links, with their content."""
    for name, link, invitation in good_links():
        address = invitation.rpartition(".")[0].removesuffix(".")
        yield {
            "name": name,
            "link": link,
            "invitation": invitation,
            "address": address,
            "mailboxes": listed(address),
            "secret": S.hex(),
            "h": commit(ALICE.pub, R).hex(),
        }
    for name, damage, link in bad_links():
        yield {"name": name, "link": link, "refused": "link", "damage": damage}
