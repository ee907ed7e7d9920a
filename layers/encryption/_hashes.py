"""The hash functions of Noise (revision 34, sections 4.3 and 12) and the two key derivations over them.

Pure: bytes in, bytes out.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

__all__ = ["HASHES", "HashFunction"]


@dataclass(frozen=True, slots=True)
class HashFunction:
    """A hash with what Noise builds on it.

    Attributes:
        name: as in a protocol name.
        hashlib_name: as `hashlib.new` knows it.
        hashlen: bytes in a digest.
    """

    name: str
    hashlib_name: str
    hashlen: int

    def hash(self, data: bytes) -> bytes:
        """HASH(data)."""
        return hashlib.new(self.hashlib_name, data).digest()

    def hmac(self, key: bytes, data: bytes) -> bytes:
        """HMAC-HASH(key, data), RFC 2104."""
        return hmac.digest(key, data, self.hashlib_name)

    def hkdf(self, chaining_key: bytes, input_key_material: bytes) -> tuple[bytes, bytes, bytes]:
        """HKDF of section 4.3. Always three outputs: taking fewer leaves the first ones as they are."""
        temp_key = self.hmac(chaining_key, input_key_material)
        output1 = self.hmac(temp_key, b"\x01")
        output2 = self.hmac(temp_key, output1 + b"\x02")
        output3 = self.hmac(temp_key, output2 + b"\x03")
        return output1, output2, output3

    def hkdf_expand(self, key: bytes, info: bytes, length: int) -> bytes:
        """HKDF-Expand, RFC 5869, section 2.3.

        Raises:
            ValueError: if ``length`` is negative or above 255 digests.
        """
        if not 0 <= length <= 255 * self.hashlen:
            raise ValueError(f"{length} bytes of key, where {self.name} can give 0 to {255 * self.hashlen}")
        block, output = b"", bytearray()
        for counter in range(1, -(-length // self.hashlen) + 1):
            block = self.hmac(key, block + info + bytes((counter,)))
            output += block
        return bytes(output[:length])


HASHES: Final[Mapping[str, HashFunction]] = {
    function.name: function
    for function in (
        HashFunction("SHA256", "sha256", 32),
        HashFunction("SHA512", "sha512", 64),
        HashFunction("BLAKE2s", "blake2s", 32),
        HashFunction("BLAKE2b", "blake2b", 64),
    )
}
"""Every hash by its name in a protocol name."""
