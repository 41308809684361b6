"""PTX of a few instructions run on arrays of 32-bit words, so that assembly is tested without a GPU."""

import re

import numpy as np

FULL = np.uint64(0xFFFFFFFF)


def shifted(low, high, amount):
    """The upper word of high:low shifted left by the amount's low five bits."""
    return ((high << np.uint64(32) | low) << (amount & np.uint64(31))) >> np.uint64(32)


def chosen(low, high, selector):
    """`prmt`: four nibbles of the selector each choose a byte of high:low; a nibble's top bit spreads the sign."""
    both, result = high << np.uint64(32) | low, np.uint64(0)
    for place in range(4):
        nibble = selector >> np.uint64(4 * place) & np.uint64(15)
        byte = both >> np.uint64(8) * (nibble & np.uint64(7)) & np.uint64(255)
        byte = np.where(nibble & np.uint64(8), np.where(byte & np.uint64(128), 255, 0).astype(np.uint64), byte)
        result = result | byte << np.uint64(8 * place)
    return result


def looked_up(a, b, c, table):
    """`lop3`: bit 4 a + 2 b + c of the table, for each bit of the words."""
    result = np.uint64(0)
    for row in range(8):
        if int(table) >> row & 1:
            result = result | (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return result


INSTRUCTIONS = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "shf.l.wrap.b32": shifted,
    "setp.ne.b32": lambda a, b: (a != b).astype(np.uint64),
    "selp.b32": lambda a, b, p: np.where(p, a, b),
    "lop3.b32": looked_up,
    "prmt.b32": chosen,
}


def run(text, results, inputs, registers):
    """What `$0` to `$(results - 1)` hold after the text, uint32; inputs follow them, and registers go by name."""
    values = {f"${results + i}": np.asarray(word, np.uint64) for i, word in enumerate(inputs)}
    values |= {name: np.uint64(word) for name, word in registers.items()}

    def value(operand):
        return np.uint64(int(operand, 0)) if re.fullmatch(r"0x[0-9a-f]+|\d+", operand) else values[operand]

    for line in text.strip().strip("{}").split(";"):
        name, _, operands = line.strip().partition(" ")
        if name and name != ".reg":
            target, *rest = (operand.strip() for operand in operands.split(","))
            values[target] = INSTRUCTIONS[name](*map(value, rest)) & FULL
    return [values[f"${i}"].astype(np.uint32) for i in range(results)]
