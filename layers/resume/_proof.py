"""Who may resume a session: proofs that its secret is held, bound to one connection (D20).

K_resume is 32 random bytes that the server gives in NEW_SESSION. It is never sent again; each connection proves it:

    context = exporter("rsm1 binding", 32)            where the channel below has one: fresh for each connection
            | client nonce ‖ server nonce             elsewhere, which costs one more round trip
    client  HMAC-SHA256(K_resume, "rsm1 c" ‖ context ‖ HELLO)
    server  HMAC-SHA256(K_resume, "rsm1 s" ‖ context ‖ HELLO ‖ RESUMED)
    refusal HMAC-SHA256(K_resume, "rsm1 r" ‖ context ‖ HELLO ‖ REJECT)
"""

from __future__ import annotations

import hmac

from towline.link import Link

__all__ = ["binding", "client_proof", "refusal_proof", "same", "server_proof"]


def binding(link: Link) -> bytes | None:
    """What makes a proof good for this connection only; None where the channel below offers nothing."""
    return None if link.exporter is None else link.exporter(b"rsm1 binding", 32)


def client_proof(key: bytes, context: bytes, hello: bytes) -> bytes:
    return hmac.digest(key, b"rsm1 c" + context + hello, "sha256")


def server_proof(key: bytes, context: bytes, hello: bytes, resumed: bytes) -> bytes:
    return hmac.digest(key, b"rsm1 s" + context + hello + resumed, "sha256")


def refusal_proof(key: bytes, context: bytes, hello: bytes, reject: bytes) -> bytes:
    return hmac.digest(key, b"rsm1 r" + context + hello + reject, "sha256")


def same(a: bytes, b: bytes) -> bool:
    """Compare in constant time."""
    return hmac.compare_digest(a, b)
