"""The file format of low-bit weights, as kernels/low_bit_weight.h states it; standard library only.

A code of `bits` bits stands for a level l, an integer with |l| <= max_level, and decodes as
T * l / max_level, T the scale of its group. Codes are strings of bits, the lowest first.
"""
from dataclasses import dataclass


@dataclass(frozen=True)
class LowBitSpec:
    """As LowBitSpec in C++; the fields are the keys of "quantization_config" in config.json."""
    scheme: str = "pow2"
    bits: int = 3
    group_size: int = 64  # inputs of an output that share a scale; 0: all
    activation_bits: int = 16
    scale: str = "free"  # or pow2: T is a power of two or zero

    def __post_init__(self):
        known = {"pow2": (2, 3, 4), "apot": (4,), "uniform": (2, 3, 4, 8)}
        if self.bits not in known.get(self.scheme, ()):
            raise ValueError(f"no scheme {self.scheme} of {self.bits} bits")
        if self.group_size not in (0, 32, 64, 128) or self.activation_bits not in (3, 4, 8, 16):
            raise ValueError(f"not valid: {self}")
        if self.scale not in ("free", "pow2"):
            raise ValueError(f"no scale {self.scale}")

    @property
    def levels(self):
        """The level of each code, [2^bits]."""
        half = 1 << (self.bits - 1)
        if self.scheme == "uniform":
            return [min(code - (half - 1), half - 1) for code in range(2 * half)]
        positive = [0] + ([1, 2, 3, 4, 5, 6, 8] if self.scheme == "apot" else
                          [1 << i for i in range(half - 1)])
        return positive + [-level for level in positive]

    @property
    def max_level(self):
        return max(self.levels)

    @property
    def max_activation(self):
        """Inputs become integers up to this."""
        return 127 * 128 if self.activation_bits == 16 else (1 << (self.activation_bits - 1)) - 1

    @property
    def static_activations(self):
        """Whether a matrix brings the range of its inputs; else each row of inputs has its own."""
        return self.activation_bits < 8

    @property
    def normal_alpha(self):
        """T / sigma of least squared error for N(0, 1); as NormalAlpha in C++."""
        return {"pow2": {2: 1.22, 3: 2.08, 4: 4.20}, "apot": {4: 2.58},
                "uniform": {2: 1.22, 3: 1.96, 4: 2.48, 8: 3.92}}[self.scheme][self.bits]


def pack(codes, bits):
    """Codes, a multiple of 8 of them, as bytes."""
    out = bytearray()
    for i in range(0, len(codes), 8):
        value = 0
        for j, code in enumerate(codes[i:i + 8]):
            value |= code << (bits * j)
        out += value.to_bytes(bits, "little")
    return bytes(out)


def unpack(data, bits):
    """The codes of bytes, a multiple of `bits` of them."""
    mask, codes = (1 << bits) - 1, []
    for i in range(0, len(data), bits):
        value = int.from_bytes(data[i:i + bits], "little")
        codes += [value >> (bits * j) & mask for j in range(8)]
    return codes
