"""The handshake patterns of Noise (revision 34, sections 7 and 18), as a table that reads like the paper.

The table is the law: a pattern is what stands here; its sizes, roles and keys are worked out from it.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from towline.errors import MisuseError

__all__ = ["PATTERNS", "HandshakePattern", "Token", "find_pattern"]


class Token(enum.Enum):
    """One step of a handshake message. In a two-letter token the initiator's key stands first."""

    E = "e"
    S = "s"
    EE = "ee"
    ES = "es"
    SE = "se"
    SS = "ss"
    PSK = "psk"


@dataclass(frozen=True, slots=True)
class HandshakePattern:
    """What each side knows before, and what each message holds.

    Attributes:
        name: with its modifiers, as in ``"XXpsk3"``.
        initiator_knows_s: the responder's static key is a pre-message: the initiator has it beforehand.
        responder_knows_s: the same for the initiator's static key.
        messages: the tokens of each message; the initiator sends the first, then they take turns.
    """

    name: str
    initiator_knows_s: bool
    responder_knows_s: bool
    messages: tuple[tuple[Token, ...], ...]

    @property
    def is_one_way(self) -> bool:
        """Whether only the initiator ever sends, after the handshake too (N, K and X)."""
        return len(self.messages) == 1

    @property
    def psk_count(self) -> int:
        """How many pre-shared keys take part."""
        return sum(tokens.count(Token.PSK) for tokens in self.messages)

    def has_static(self, *, initiator: bool) -> bool:
        """Whether that side has a static key at all."""
        if self.responder_knows_s if initiator else self.initiator_knows_s:
            return True
        own = self.messages[0::2] if initiator else self.messages[1::2]
        return any(Token.S in tokens for tokens in own)


# Alice, the initiator, stands on the left. Messages above the dots are known beforehand.
_TABLE: Final = """
N:      <- s  ...  -> e, es
K:      -> s  <- s  ...  -> e, es, ss
X:      <- s  ...  -> e, es, s, ss

NN:     -> e  <- e, ee
NK:     <- s  ...  -> e, es  <- e, ee
NX:     -> e  <- e, ee, s, es
KN:     -> s  ...  -> e  <- e, ee, se
KK:     -> s  <- s  ...  -> e, es, ss  <- e, ee, se
KX:     -> s  ...  -> e  <- e, ee, se, s, es
XN:     -> e  <- e, ee  -> s, se
XK:     <- s  ...  -> e, es  <- e, ee  -> s, se
XX:     -> e  <- e, ee, s, es  -> s, se
IN:     -> e, s  <- e, ee, se
IK:     <- s  ...  -> e, es, s, ss  <- e, ee, se
IX:     -> e, s  <- e, ee, se, s, es

NK1:    <- s  ...  -> e  <- e, ee, es
NX1:    -> e  <- e, ee, s  -> es
X1N:    -> e  <- e, ee  -> s  <- se
X1K:    <- s  ...  -> e, es  <- e, ee  -> s  <- se
XK1:    <- s  ...  -> e  <- e, ee, es  -> s, se
X1K1:   <- s  ...  -> e  <- e, ee, es  -> s  <- se
X1X:    -> e  <- e, ee, s, es  -> s  <- se
XX1:    -> e  <- e, ee, s  -> es, s, se
X1X1:   -> e  <- e, ee, s  -> es, s  <- se
K1N:    -> s  ...  -> e  <- e, ee  -> se
K1K:    -> s  <- s  ...  -> e, es  <- e, ee  -> se
KK1:    -> s  <- s  ...  -> e  <- e, ee, se, es
K1K1:   -> s  <- s  ...  -> e  <- e, ee, es  -> se
K1X:    -> s  ...  -> e  <- e, ee, s, es  -> se
KX1:    -> s  ...  -> e  <- e, ee, se, s  -> es
K1X1:   -> s  ...  -> e  <- e, ee, s  -> se, es
I1N:    -> e, s  <- e, ee  -> se
I1K:    <- s  ...  -> e, es, s  <- e, ee  -> se
IK1:    <- s  ...  -> e, s  <- e, ee, se, es
I1K1:   <- s  ...  -> e, s  <- e, ee, es  -> se
I1X:    -> e, s  <- e, ee, s, es  -> se
IX1:    -> e, s  <- e, ee, se, s  -> es
I1X1:   -> e, s  <- e, ee, s  -> se, es
"""

_ARROW = re.compile(r"(->|<-) ([a-z, ]+?)(?=  |$)")


def _parse(line: str) -> HandshakePattern:
    name, _, body = line.partition(":")
    before, dots, after = body.partition("...")
    if not dots:
        before, after = "", body
    known = {arrow for arrow, _ in _ARROW.findall(before)}
    messages = tuple(tuple(Token(token) for token in row.split(", ")) for _, row in _ARROW.findall(after))
    return HandshakePattern(name, "<-" in known, "->" in known, messages)


PATTERNS: Final[Mapping[str, HandshakePattern]] = {
    pattern.name: pattern for pattern in map(_parse, filter(None, _TABLE.splitlines()))
}
"""The fundamental patterns by name, without modifiers."""

_PATTERN_NAME = re.compile(r"([A-Z][A-Z0-9]*)(.*)")
_PSK_MODIFIER = re.compile(r"psk(0|[1-9][0-9]?)")


def find_pattern(name: str) -> HandshakePattern:
    """Return the pattern of that name, with its modifiers applied.

    Args:
        name: as in a protocol name: ``"XX"``, ``"NNpsk0"``, ``"XXpsk0+psk3"``.

    Raises:
        MisuseError: if there is no such pattern, or a modifier is unknown, misplaced, or not done here.

    >>> [token.value for token in find_pattern("NNpsk0").messages[0]]
    ['psk', 'e']
    """
    match = _PATTERN_NAME.fullmatch(name)
    pattern = PATTERNS.get(match[1]) if match else None
    if match is None or pattern is None:
        raise MisuseError(f"there is no handshake pattern {name!r}; there are {', '.join(PATTERNS)}")
    if not match[2]:
        return pattern
    messages = [list(tokens) for tokens in pattern.messages]
    last = -1
    for modifier in match[2].split("+"):
        if modifier == "fallback":
            raise MisuseError(f"pattern {name!r}: the fallback modifier is not supported here")
        psk = _PSK_MODIFIER.fullmatch(modifier)
        if psk is None:
            raise MisuseError(f"pattern {name!r}: {modifier!r} is not a modifier; write psk0, psk1, ...")
        place = int(psk[1])
        if place > len(messages):
            raise MisuseError(f"pattern {name!r}: {modifier} in a pattern of {len(messages)} messages")
        # Section 8: where order changes nothing it must be sorted, or two names would mean one protocol.
        if place <= last:
            raise MisuseError(f"pattern {name!r}: its psk modifiers must be in rising order, each once")
        last = place
        if place == 0:
            messages[0].insert(0, Token.PSK)
        else:
            messages[place - 1].append(Token.PSK)
    return HandshakePattern(name, pattern.initiator_knows_s, pattern.responder_knows_s, tuple(map(tuple, messages)))
