"""What the other end sends beside its certificate is not verified: with aiortc and OpenSSL."""

from __future__ import annotations

import asyncio
import datetime
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from connectoid.certificates import verify_no_chain

aiortc = pytest.importorskip("aiortc")
dtls = pytest.importorskip("aiortc.rtcdtlstransport")
SSL = pytest.importorskip("OpenSSL.SSL")

CHAIN = 4
ROUNDS = 10


def name_of(number: int) -> x509.Name:
    """Return the name of a certificate in the chain."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, str(number))])


def certificate(number: int, key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    """Return a certificate that the next one has signed."""
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder().subject_name(name_of(number)).issuer_name(name_of(number + 1))
        .public_key(key.public_key()).serial_number(number + 1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
    )
    if number:
        made = made.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    return made.sign(key, hashes.SHA256())


def with_chain() -> Any:
    """Return the context of a contact who sends more certificates than it announced."""
    key = ec.generate_private_key(ec.SECP256R1())
    first, *others = (certificate(number, key) for number in range(CHAIN))
    context = dtls.RTCCertificate(key=key, cert=first)._create_ssl_context(dtls.SRTP_PROFILES)
    for other in others:
        context.add_extra_chain_cert(other)
    return context


async def own_context(*, is_bound: bool) -> Any:
    """Return the context that a connection of this side has."""
    connection = aiortc.RTCPeerConnection(aiortc.RTCConfiguration([]))
    connection.createDataChannel("connectoid")
    transport = connection.sctp.transport
    if is_bound:
        verify_no_chain(transport)
    found = transport._RTCDtlsTransport__local_certificate._create_ssl_context(
        srtp_profiles=dtls.SRTP_PROFILES)
    await connection.close()
    return found


def greet(context: Any) -> list[int]:
    """Shake hands with the contact; return at which depths certificates were judged."""
    depths: list[int] = []

    def judge(_connection: Any, _certificate: Any, _error: int, depth: int, _good: int) -> bool:
        depths.append(depth)
        return True

    context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, judge)
    here, there = SSL.Connection(context), SSL.Connection(with_chain())
    here.set_connect_state()
    there.set_accept_state()
    done = set()
    for _ in range(ROUNDS):
        for name, end, other in (("here", here, there), ("there", there, here)):
            try:
                end.do_handshake()
                done.add(name)
            except SSL.WantReadError:
                pass
            hand_over(end, other)
    assert done == {"here", "there"}
    return depths


def hand_over(end: Any, other: Any) -> None:
    """Give to one end all that the other has written."""
    while True:
        try:
            other.bio_write(end.bio_read(65_536))
        except SSL.WantReadError:
            return


def test_chain_of_a_contact_is_not_verified_and_the_handshake_is_made() -> None:
    assert max(greet(asyncio.run(own_context(is_bound=True)))) <= 1
    # That of aiortc, which climbs to the last one.
    assert max(greet(asyncio.run(own_context(is_bound=False)))) == CHAIN - 1


def test_no_second_handshake_is_made() -> None:
    assert asyncio.run(own_context(is_bound=True)).set_options(0) & SSL.OP_NO_RENEGOTIATION
    assert not asyncio.run(own_context(is_bound=False)).set_options(0) & SSL.OP_NO_RENEGOTIATION


def test_another_aiortc_is_left_as_it_is() -> None:
    verify_no_chain(object())
