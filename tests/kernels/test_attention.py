"""Attention to compressed tokens, both backends, against numpy in float64: the oracle draws and packs the codes."""

import math

import numpy as np
import pytest
import torch

from tqsearch import kernels
from tqsearch.errors import BackendError
from tqsearch.kernels import BandTable, Compressed, Context, Dense

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poisoned")
gpu = torch.cuda.is_available()
# Of the int8 path: queries and weights have 15 bits, so a result of rms 1 is off by some 1e-4.
ROUNDING = {"reference": 1e-5, "triton": 1e-3}


def grid(width, rng):
    """Numbers, offset and step of some table of the width: any will do."""
    if width == 0:
        return np.zeros(1, int), 0.0, 0.0
    if width == 1:
        return np.array([0, 1]), 0.5, 1.6
    if width == 8:
        return np.sort(rng.choice(np.arange(-127, 128), 256)), 0.0, 0.021
    return np.sort(rng.choice(128, 2**width, replace=False)), 63.5, 0.04


def by_planes(rows, pairs):
    """Packed rows of a block, the first plane of all, then the next."""
    parts, start = [], 0
    for size, width in pairs:
        for plane in (plane for plane in (8, 4, 2, 1) if width & plane):
            stop = start + -(-size * plane // 8)
            parts += [row[start:stop] for row in rows]
            start = stop
    return b"".join(parts)


class Side:
    """Random compressed keys (packed along the dimension) or values (along the tokens), and what they stand for."""

    def __init__(self, oracle, rng, pairs, shape, block, along_tokens):
        batch, heads, count = shape
        dim = sum(size for size, _ in pairs)
        self.rotation = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
        self.scales = rng.uniform(0.5, 1.5, shape).astype(np.float16)
        codes = np.concatenate([rng.integers(0, 2**width, (*shape, size)) for size, width in pairs], axis=3)
        tables = [grid(width, rng) for _, width in pairs]
        levels, start = np.empty(codes.shape), 0
        for (size, _), (numbers, offset, step) in zip(pairs, tables, strict=True):
            levels[..., start : start + size] = ((numbers - offset) * step)[codes[..., start : start + size]]
            start += size
        self.vectors = (levels * self.scales[..., None].astype(np.float64)) @ self.rotation
        if along_tokens:
            ends = np.cumsum([size for size, _ in pairs])[:-1]
            blocks = [
                b"".join(
                    by_planes([oracle.pack(line.tolist(), [(block, width)]) for line in band], [(block, width)])
                    for band, (_, width) in zip(np.split(one, ends), pairs, strict=True)
                )
                for one in codes.reshape(-1, block, dim).swapaxes(1, 2)
            ]
        else:
            blocks = [
                by_planes([oracle.pack(row.tolist(), pairs) for row in one], pairs)
                for one in codes.reshape(-1, block, dim)
            ]
        nbytes = len(blocks[0]) if blocks else 1
        self.packed = np.frombuffer(b"".join(blocks), np.uint8).reshape(batch, heads, count // block, nbytes).copy()
        self.bands = []
        for (size, width), (numbers, offset, step) in zip(pairs, tables, strict=True):
            exact = ((numbers - offset) * step).astype(np.float32)
            steps = tuple(int(number) for number in numbers)
            middle = torch.from_numpy((exact[1:] + exact[:-1]) / 2)
            self.bands.append(BandTable(size, width, middle, torch.from_numpy(exact), steps, offset, step))

    def on(self, device):
        bands = tuple(b._replace(boundaries=b.boundaries.to(device), levels=b.levels.to(device)) for b in self.bands)
        rotation = torch.from_numpy(self.rotation.astype(np.float32)).to(device)
        return Compressed(
            torch.from_numpy(self.packed).to(device), torch.from_numpy(self.scales).to(device), bands, rotation
        )


class Case:
    """A query and a context drawn at random, and attention by its definition in float64."""

    def __init__(
        self, oracle, device, *, keys=((32, 4),), values=((32, 4),), batch=1, heads=1, group=2, queries=1, sinks=3,
        blocks=2, recents=40, block=128, dtype=torch.float32, seed=0,
    ):  # fmt: skip
        rng = np.random.default_rng(seed)
        self.device, self.dtype, self.group = device, dtype, group
        count = blocks * block
        self.keys = Side(oracle, rng, keys, (batch, heads, count), block, False)
        self.values = Side(oracle, rng, values, (batch, heads, count), block, True)
        key_dim, value_dim = (sum(size for size, _ in pairs) for pairs in (keys, values))

        def draw(*shape):
            return torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).to(device, dtype)

        self.offset = torch.from_numpy(rng.standard_normal((heads, key_dim)).astype(np.float32)).to(device)
        self.sinks = Dense(draw(batch, heads, sinks, key_dim), draw(batch, heads, sinks, value_dim))
        self.recent = Dense(draw(batch, heads, recents, key_dim), draw(batch, heads, recents, value_dim))
        self.query = draw(batch, heads * group, queries, key_dim)
        self.scaling = 1.3 / math.sqrt(key_dim)
        self.length, self.queries, self.rng = sinks + count + recents, queries, rng
        self.options = {}

    def dense(self):
        """All keys and values, float64."""
        offset = self.offset.cpu().double().numpy()[None, :, None]
        parts = zip(self.sinks, (self.keys.vectors + offset, self.values.vectors), self.recent, strict=True)
        return [np.concatenate([a.cpu().double().numpy(), b, c.cpu().double().numpy()], axis=2) for a, b, c in parts]

    def expected(self):
        keys, values = (np.repeat(part, self.group, axis=1) for part in self.dense())
        logits = self.query.cpu().double().numpy() @ keys.swapaxes(2, 3) * self.scaling
        if cap := self.options.get("softcap"):
            logits = cap * np.tanh(logits / cap)
        token, place = np.arange(self.length), np.arange(self.length - self.queries, self.length)[:, None]
        mask = self.options.get("mask")
        seen = np.ones((self.queries, self.length), bool) if mask is not None else token <= place
        if window := self.options.get("sliding_window"):
            seen = seen & (token > place - window)
        if mask is not None and mask.dtype != torch.bool:
            logits = logits + mask.cpu().double().numpy()
        if mask is not None and mask.dtype == torch.bool:
            seen = seen & mask.cpu().numpy()
        logits = np.where(seen, logits, -np.inf)
        aux = self.options.get("s_aux")
        if aux is not None:
            extra = np.broadcast_to(aux.cpu().double().numpy()[None, :, None, None], (*logits.shape[:3], 1))
            logits = np.concatenate([logits, extra], axis=3)
        top = logits.max(axis=3, keepdims=True)
        weights = np.exp(logits - np.where(np.isfinite(top), top, 0))
        total = weights.sum(axis=3, keepdims=True)
        weights = weights / np.where(total > 0, total, 1)
        return (weights[..., : self.length] @ values).swapaxes(1, 2)

    def context(self):
        keys, values = self.keys.on(self.device), self.values.on(self.device)
        return Context(self.sinks, keys, values, self.recent, self.offset)

    def run(self, backend):
        options = {"scaling": self.scaling, **self.options}
        return kernels.attention(self.query, self.context(), backend=backend, **options)

    def check(self, backend):
        out = self.run(backend)
        assert out.dtype == self.dtype
        found, expected = out.cpu().double().numpy(), self.expected()
        assert found.shape == expected.shape
        tolerance = ROUNDING[backend]
        if self.dtype != torch.float32:
            rounded = torch.from_numpy(expected).to(self.dtype).double().numpy()
            tolerance += 2 * np.abs(rounded - expected).max()
        assert np.abs(found - expected).max() <= tolerance * max(1.0, np.abs(expected).max())


@pytest.fixture(params=["reference", "triton"])
def backend(request):
    return request.param


PLANS = {
    "4 bits": [(32, 4)],
    "4 bits, whole": [(128, 4)],
    "3 bits": [(40, 3)],
    "3 bits, whole": [(128, 3)],
    "2 bits": [(64, 2)],
    "2 bits, whole": [(128, 2)],
    "8 bits": [(32, 8)],
    "1 bit": [(128, 1)],
    "3.5 bits": [(32, 4), (32, 3)],
    "bands": [(24, 8), (16, 4), (8, 3), (8, 0), (24, 2), (16, 1)],
}


@pytest.mark.parametrize("plan", PLANS)
def test_widths(oracle, device, backend, plan):
    Case(oracle, device, keys=PLANS[plan], values=PLANS[plan]).check(backend)


@pytest.mark.parametrize(("keys", "values"), [("4 bits", "2 bits"), ("3 bits", "8 bits"), ("2 bits", "3.5 bits")])
def test_widths_differ(oracle, device, backend, keys, values):
    """So do the head dimensions."""
    Case(oracle, device, keys=PLANS[keys], values=PLANS[values]).check(backend)


@pytest.mark.parametrize("dim", [16, 64, 80, 96, 128, 192, 256])
def test_head_dimensions(oracle, device, backend, dim):
    Case(oracle, device, keys=[(dim, 4)], values=[(dim, 2)], blocks=1).check(backend)


@pytest.mark.skipif(not gpu, reason="many shapes, for compiled kernels")
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("block", [32, 64, 128])
def test_widths_and_dimensions_compiled(oracle, device, dim, width, block):
    shape = {"batch": 2, "heads": 2, "group": 4, "blocks": 5, "block": block}
    case = Case(oracle, device, keys=[(dim, width)], values=[(dim, width)], dtype=torch.bfloat16, **shape)
    case.check("triton")
    case.options["mask"] = (
        torch.rand((2, 1, 1, case.length), generator=torch.Generator().manual_seed(0)).to(device) < 0.6
    )
    case.check("triton")  # what else is computed decides in which layouts codes are decoded


@pytest.mark.parametrize(("group", "queries"), [(1, 1), (3, 1), (16, 1), (1, 5), (2, 16)])
def test_rows(oracle, device, backend, group, queries):
    """Several queries are causal among themselves, also where the last tokens are compressed."""
    Case(oracle, device, group=group, queries=queries, heads=2, batch=2, blocks=1).check(backend)
    Case(oracle, device, group=group, queries=queries, recents=0, blocks=1).check(backend)


@pytest.mark.parametrize(("sinks", "blocks", "recents"), [(0, 1, 0), (5, 0, 7), (0, 0, 1), (70, 1, 130), (0, 3, 2)])
def test_lengths(oracle, device, backend, sinks, blocks, recents):
    Case(oracle, device, sinks=sinks, blocks=blocks, recents=recents, block=32).check(backend)
    Case(oracle, device, sinks=sinks, blocks=min(blocks, 1), recents=recents).check(backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes(oracle, device, backend, dtype):
    Case(oracle, device, dtype=dtype, queries=2).check(backend)


@pytest.mark.parametrize("kind", ["bool", "added"])
def test_masks(oracle, device, backend, kind):
    """Another row of the batch is padded; the mask is all that says what is seen."""
    case = Case(oracle, device, batch=2, queries=3, seed=1)
    seen = torch.rand((2, 1, 3, case.length), generator=torch.Generator().manual_seed(0)) < 0.6
    seen[1, :, :, :150] = False
    added = torch.where(seen, torch.randn(seen.shape, generator=torch.Generator().manual_seed(1)), -math.inf)
    case.options["mask"] = (seen if kind == "bool" else added).to(device)
    case.check(backend)


def test_one_mask_for_the_batch(oracle, device, backend):
    case = Case(oracle, device, batch=2, queries=2)
    case.options["mask"] = (torch.arange(case.length) % 3 > 0).expand(1, 1, 2, -1).to(device)
    case.check(backend)


def test_a_query_that_sees_nothing_gets_zeros(oracle, device, backend):
    case = Case(oracle, device, batch=2)
    mask = torch.ones((2, 1, 1, case.length), dtype=torch.bool)
    mask[1] = False
    case.options["mask"] = mask.to(device)
    case.check(backend)
    assert (case.run(backend)[1] == 0).all()


@pytest.mark.parametrize("window", [1, 30, 41, 100, 10_000])
def test_sliding_window(oracle, device, backend, window):
    case = Case(oracle, device, queries=3)
    case.options["sliding_window"] = window
    case.check(backend)


@pytest.mark.parametrize("option", ["plain", "window", "far window", "mask", "added"])
@pytest.mark.parametrize("queries", [1, 5])
def test_recent_tokens_counted_on_the_device(oracle, device, backend, queries, option):
    """Buffers with room for more tokens, which hold NaN so far: the result is that of the tokens there are."""
    case = Case(oracle, device, batch=2, heads=2, queries=queries, recents=21)
    if option in ("window", "far window"):
        case.options["sliding_window"] = 12 if option == "window" else 150
    room = 16
    mask = torch.from_numpy(case.rng.random((2, 1, queries, case.length + room)) < 0.7).to(device)
    mask[..., 0] = True
    if option == "added":
        mask = torch.where(mask, 0.5, -3.0)
    if option in ("mask", "added"):
        case.options["mask"] = mask[..., : case.length]
    expected = case.expected()
    recent = (torch.cat([part, torch.full_like(part[:, :, :room], math.nan)], dim=2) for part in case.recent)
    context = case.context()._replace(recent=Dense(*recent), recents=torch.tensor([21], device=device))
    options = {"scaling": case.scaling, **case.options}
    if option in ("mask", "added"):
        options["mask"] = mask
    out = kernels.attention(case.query, context, backend=backend, **options)
    error = np.linalg.norm(out.cpu().double().numpy() - expected) / np.linalg.norm(expected)
    assert error <= ROUNDING[backend]


def test_softcap_and_sink_logits(oracle, device, backend):
    case = Case(oracle, device, heads=2, queries=2)
    case.query *= 20
    case.options |= {"softcap": 5.0, "s_aux": torch.tensor([2.0, -1.0, 6.0, 0.0]).to(device, case.dtype)}
    case.check(backend)


def test_each_token_alone(oracle, device, backend):
    """With one token seen its value is the output: its weight is 1, and no digit is lost."""
    case = Case(oracle, device, values=[(128, 3)], queries=16, group=1, blocks=1, sinks=1, recents=1)
    for start in range(0, 129, 16):
        mask = torch.zeros((1, 1, 16, case.length), dtype=torch.bool)
        mask[0, 0, torch.arange(16), (start + torch.arange(16)) % 129] = True
        case.options["mask"] = mask.to(device)
        found, expected = case.run(backend).cpu().double().numpy(), case.expected()
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_extreme_scales(oracle, device, backend):
    """Zero vectors, tiny and huge ones beside each other."""
    case = Case(oracle, device)
    for side, factor in ((case.values, 3.0), (case.keys, 2.0)):
        old = side.scales.astype(np.float64)
        side.scales[..., ::5] = 0
        side.scales[..., 7], side.scales[..., 130] = 1e-7, factor
        side.vectors = side.vectors * (side.scales / old)[..., None]
    case.check(backend)


def test_many_splits(oracle, device, monkeypatch):
    """Each block is a run of its own; then one run takes all of them."""
    from tqsearch.kernels import attention_triton

    for blocks in (1, 9):
        monkeypatch.setattr(attention_triton, "_blocks_a_split", lambda *_, blocks=blocks: blocks)
        Case(oracle, device, blocks=9, block=32, seed=2).check("triton")


@pytest.mark.parametrize(
    ("tasks", "blocks", "found"),
    [(128, 255, 43), (64, 255, 22), (8, 1023, 11), (224, 255, 37), (5000, 9, 9), (64, 7, 2)],
)
def test_programs_run_at_once_or_in_full_rounds(tasks, blocks, found):
    """With room for 792: 128 x 6 = 768, 64 x 12 = 768, 8 x 99 = 792, 224 x 7 = 2 x 784; and two blocks at least."""
    from tqsearch.kernels import attention_triton

    assert attention_triton._blocks_a_split(tasks, blocks, 792) == found


def test_states_of_a_larger_table(oracle, device, backend):
    """Dense states and the query are read by their strides."""
    case = Case(oracle, device, heads=2, queries=2)
    case.query = case.query.transpose(1, 2).contiguous().transpose(1, 2)
    case.recent = Dense(*(torch.cat([part, part], dim=2)[:, :, : part.shape[2]] for part in case.recent))
    case.check(backend)


@pytest.mark.skipif(not gpu, reason="assembly needs a GPU")
@pytest.mark.parametrize("plan", PLANS)
def test_assembly_equals_portable_code(oracle, device, plan, monkeypatch):
    """Integer products are equal to the last bit; the special functions of the two differ in rounding."""
    from tqsearch.kernels import attention_triton

    case = Case(oracle, device, keys=PLANS[plan], values=PLANS[plan], blocks=5)
    assembled = case.run("triton")
    monkeypatch.setattr(attention_triton, "INTERPRETED", True)
    torch.testing.assert_close(case.run("triton"), assembled, rtol=1e-4, atol=1e-4)


def test_refusals(oracle, device):
    case = Case(oracle, device)
    context = case.context()
    five = Compressed(
        context.keys.packed, context.keys.scales, (context.keys.bands[0]._replace(width=5),), torch.eye(32)
    )
    with pytest.raises(BackendError, match="no kernel for 5 bits; use backend 'auto' or 'reference'"):
        kernels.attention(case.query, context._replace(keys=five), scaling=1.0, backend="triton")
    wide = context.values._replace(rotation=torch.eye(512))
    with pytest.raises(BackendError, match="no kernel for head dimension 512"):
        kernels.attention(case.query, context._replace(values=wide), scaling=1.0, backend="triton")
    odd = Case(oracle, device, block=24).context()
    with pytest.raises(BackendError, match="no kernel for blocks of 24 tokens"):
        kernels.attention(case.query, odd, scaling=1.0, backend="triton")


@pytest.mark.parametrize("plan", ["4 bits, whole", "3 bits, whole", "bands"])
def test_logits_alone(oracle, device, plan):
    from tqsearch.kernels.attention_logits_triton import logits

    case = Case(oracle, device, keys=PLANS[plan], heads=2, queries=3)
    keys = np.repeat(case.keys.vectors + case.offset.cpu().double().numpy()[None, :, None], case.group, axis=1)
    expected = case.query.cpu().double().numpy() @ keys.swapaxes(2, 3) * case.scaling
    found = logits(case.query, case.keys.on(device), case.offset, case.scaling)
    assert np.abs(found.cpu().double().numpy() - expected).max() <= 1e-3 * np.abs(expected).max()
