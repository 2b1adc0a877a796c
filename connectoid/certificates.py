"""DTLS: which certificates of the other end are looked at, its first alone.

The fingerprint in the SDP is that of one certificate, and nothing else decides. But OpenSSL also
verifies all that come with it, and aiortc then takes the handshake whatever came of that. A hundred
KB of certificates with large exponents held up the event loop for nearly two seconds. So none is
looked for behind the first. Nor is a second handshake made, of which a contact could ask for
thousands.

aiortc has no setting for it. Another version may have other names: then all are verified.
"""

from __future__ import annotations

from ssl import OP_NO_RENEGOTIATION
from typing import Any

# Certificates behind the first one.
VERIFY_DEPTH = 0

NEEDED = ("_create_ssl_context",)
CERTIFICATE = "_RTCDtlsTransport__local_certificate"


def verify_no_chain(transport: Any) -> None:
    """Have a DTLS transport of aiortc verify one certificate of the other end."""
    certificate: Any = getattr(transport, CERTIFICATE, None)
    if not all(hasattr(certificate, name) for name in NEEDED):
        return
    make_context = certificate._create_ssl_context

    def create_ssl_context(*profiles: Any, **named_profiles: Any) -> Any:
        context = make_context(*profiles, **named_profiles)
        context.set_verify_depth(VERIFY_DEPTH)
        context.set_options(OP_NO_RENEGOTIATION)
        return context

    certificate._create_ssl_context = create_ssl_context
