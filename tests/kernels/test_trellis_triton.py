import numpy as np
import pytest
import torch

from tqsearch import trellis

triton = pytest.importorskip("triton", reason="needs Triton")
tl = triton.language

from tqsearch.kernels import trellis_triton as kernel  # noqa: E402

COLUMNS = 32
PLANES = 4


@triton.jit
def decode_rows(
    planes_ptr,  # (rows, 4, 32) uint8
    table_ptr,
    out_ptr,  # (rows, 8, 32) int8
    TAPS: tl.constexpr,
    BITS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    BACK: tl.constexpr,
    ROWS: tl.constexpr,
):
    columns = tl.arange(0, 32)[None, :]
    base = planes_ptr + tl.arange(0, ROWS)[:, None] * 128
    path = tl.load(base + columns)
    before = tl.load(base + columns - BACK, mask=(columns >= BACK) & (tl.arange(0, ROWS)[:, None] >= 0), other=0)
    parts = kernel.decode(
        path,
        before,
        tl.load(base + 32 + columns),
        tl.load(base + 64 + columns),
        tl.load(base + 96 + columns),
        table_ptr,
        TAPS,
        BITS,
        ASSEMBLY,
    )
    for part in tl.static_range(8):
        tl.store(out_ptr + tl.arange(0, ROWS)[:, None] * 256 + part * 32 + columns, parts[part])


def case(bits, rows=16):
    """Random planes, and the entries that the reference decodes from them."""
    planes = np.random.default_rng(bits).integers(0, 256, (rows, PLANES, COLUMNS), dtype=np.uint8)
    bands = [(8 * COLUMNS, bits)]
    packed = torch.from_numpy(planes[:, :bits].reshape(rows, -1).copy())
    numbers = trellis.level_numbers(trellis.unpack(packed, bands), bands).numpy()
    book = trellis.trellis_codebook(bits)
    levels = trellis.decode(trellis.unpack(packed, bands), bands).double().numpy()
    np.testing.assert_allclose((np.array(kernel.steps(bits))[numbers] - kernel.offset(bits)) * book.step, levels, 1e-6)
    return planes, np.array(kernel.steps(bits))[numbers]


def entries(parts, quad):
    """(rows, 8, columns) parts to (rows, coordinates)."""
    out = np.full((len(parts), 8 * COLUMNS), 999)
    out[:, kernel.slot_dims(COLUMNS, quad).ravel()] = parts.reshape(len(parts), -1)
    return out


def launch(bits, quad, device):
    planes, wanted = case(bits)
    out = torch.zeros((len(planes), 8, COLUMNS), dtype=torch.int8, device=device)
    decode_rows[(1,)](
        torch.from_numpy(planes).to(device),
        torch.tensor(kernel.steps(bits), dtype=torch.int8, device=device),
        out,
        TAPS=kernel.masks(bits),
        BITS=bits,
        ASSEMBLY=kernel.assembly(bits) if quad else "",
        BACK=4 if quad else 1,
        ROWS=len(planes),
    )
    return entries(out.cpu().numpy(), quad), wanted


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_portable_body_equals_the_reference(bits, device):
    found, wanted = launch(bits, False, device)
    assert np.array_equal(found, wanted)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="inline assembly needs a GPU")
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_assembly_equals_the_reference(bits, device):
    found, wanted = launch(bits, True, device)
    assert np.array_equal(found, wanted)


def permute(low, high, selector):
    """PTX prmt: four bytes of eight, each by the low three bits of a nibble; its top bit replicates the byte's sign."""
    source, out = (high << 32) | low, 0
    for i in range(4):
        nibble = (selector >> (4 * i)) & 15
        byte = (source >> (8 * (nibble & 7))) & 255
        if nibble & 8:
            byte = 255 if byte & 128 else 0
        out |= byte << (8 * i)
    return out


def logic(a, b, c, table):
    """PTX lop3: bit 4 a + 2 b + c of the table, for each bit."""
    return sum(((table >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1))) & 1) << i for i in range(32))


OPERATIONS = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: (a << b) & 0xFFFFFFFF,
    "shr.u32": lambda a, b: a >> b,
    "shf.l.wrap.b32": lambda a, b, c: ((((b << 32) | a) << c) >> 32) & 0xFFFFFFFF,
    "lop3.b32": logic,
    "prmt.b32": permute,
}


def run(program, words):
    """The eight results of an assembly program, by the instructions' definitions."""
    registers = {f"${8 + i}": int(word) for i, word in enumerate(words)}
    for line in program.splitlines()[1:-1]:
        name, operands = line.rstrip(";").split(" ", 1)
        into, *given = [operand.strip() for operand in operands.split(",")]
        values = [registers[operand] if operand in registers else int(operand, 0) for operand in given]
        registers[into] = OPERATIONS[name](*values)
    return [registers[f"${i}"] for i in range(8)]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_assembly_read_by_its_instructions_equals_the_reference(bits):
    planes, wanted = case(bits, rows=2)
    words = planes.view("<u4")  # (rows, planes, columns / 4)
    parts = np.zeros((len(planes), 8, COLUMNS), dtype=np.int64)
    for row in range(len(planes)):
        for word in range(COLUMNS // 4):
            before = words[row, 0, word - 1] if word else 0
            results = run(kernel.assembly(bits), [words[row, 0, word], before, *words[row, 1:bits, word]])
            column = slice(4 * word, 4 * word + 4)
            parts[row, :, column] = np.array(results, dtype="<u4").view(np.int8).reshape(8, 4)
    assert np.array_equal(entries(parts, True), wanted)
