"""The contestants, as data: adding a rival is adding one `Family` to `FAMILIES`.

Budgets are the bytes per vector of TurboQuant at each width. A family runs at its settings of the nominal widths, and
for every budget at its cheapest setting that is not below it, unless that costs more than half as much again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.engines import Engine, FaissEngine, TurboQuantEngine, TurbovecEngine
from benchmarks.tables import OURS
from tqsearch.faiss_pq import faiss_metric, faiss_pq, load_faiss, padded_dim, spread

WIDTHS = (1, 2, 2.5, 3, 3.5, 4)
QUICK_WIDTHS = (1, 2, 4)
TOO_LARGE = 1.5

OPQ_OUTER = 5
OPQ_INNER_FIRST = 10
OPQ_ROWS = 10_000


@dataclass(frozen=True)
class Problem:
    """What a contestant is built for."""

    dim: int
    metric: str
    seed: int
    pq_iterations: int


@dataclass(frozen=True)
class Family:
    """One rival.

    Attributes:
        name: as tables show it.
        label: a setting as text, for example a string of FAISS's factory.
        size: bytes per vector of a setting, in a dimension.
        build: an empty engine of a setting.
        choices: its settings, when there are few; None where any number of bytes is one.
        nominal: those of the choices that always run.
        trained: the training is limited to a sample of rows.
        quick: it takes part in `--quick`.
        widths: the budgets (as TurboQuant's widths) it runs at; None for all.
        metrics: that it supports.
        dim_multiple: of which the dimension must be a multiple.
        note: what a reader must know.
    """

    name: str
    label: Callable[[Any], str]
    size: Callable[[int, Any], float]
    build: Callable[[Problem, Any], Engine]
    choices: tuple[Any, ...] | None = None
    nominal: tuple[Any, ...] = ()
    trained: bool = False
    quick: bool = True
    widths: tuple[float, ...] | None = None
    metrics: tuple[str, ...] = ("cosine", "ip", "l2")
    dim_multiple: int = 1
    note: str = ""

    def unsuitable(self, dim: int, metric: str) -> str | None:
        """Why it cannot take part, or None."""
        if metric not in self.metrics:
            return f"metric {metric} is not supported"
        if dim % self.dim_multiple:
            return f"the dimension must be a multiple of {self.dim_multiple}, this is {dim}"
        return None

    def settings(self, dim: int, budgets: dict[float, int], *, quick: bool = False) -> list[Any]:
        """What to run.

        Args:
            dim: of the vectors.
            budgets: bytes per vector by TurboQuant's width.
            quick: the nominal settings are limited to the widths of the budgets.
        """
        wanted = [size for width, size in budgets.items() if self.widths is None or width in self.widths]
        if self.choices is None:
            return [budget for budget in sorted(set(wanted)) if budget <= dim]
        chosen = {choice for choice in self.nominal if not quick or choice in budgets}
        for budget in wanted:
            enough = [choice for choice in self.choices if budget <= self.size(dim, choice) <= TOO_LARGE * budget]
            if enough:
                chosen.add(min(enough, key=lambda choice: self.size(dim, choice)))
        return sorted(chosen or self.nominal)


def factory(pattern: str, **options: Any) -> Callable[[Problem, Any], Engine]:
    """Builds what `faiss.index_factory` makes of the pattern; `query_bits` is set on the index where given."""

    def build(problem: Problem, choice: Any) -> Engine:
        faiss = load_faiss()

        text = pattern.format(choice)
        index = faiss.index_factory(problem.dim, text, faiss_metric(problem.metric))
        if "query_bits" in options:
            inner = faiss.downcast_index(index.index) if hasattr(index, "index") else index
            inner.qb = options["query_bits"]
        return FaissEngine(index, unit_rms=options.get("unit_rms", False) and problem.metric != "cosine")

    return build


def turboquant_size(dim: int, bits: float, metric: str) -> int:
    """The budget: what the index says it keeps for a vector."""
    from tqsearch import TurboQuantIndex

    return int(TurboQuantIndex(dim, bits=bits, metric=metric).bytes_per_vector)  # type: ignore[arg-type]


def build_pq(problem: Problem, code_bytes: int) -> Engine:
    return FaissEngine(faiss_pq(problem.dim, code_bytes, problem.metric, iterations=problem.pq_iterations))


def build_opq(problem: Problem, code_bytes: int) -> Engine:
    faiss = load_faiss()

    padded = padded_dim(problem.dim, code_bytes)
    pq = faiss.IndexPQ(padded, code_bytes, 8, faiss_metric(problem.metric))
    pq.pq.cp.niter = problem.pq_iterations
    opq = faiss.OPQMatrix(padded, code_bytes)
    opq.niter, opq.niter_pq_0, opq.max_train_points = OPQ_OUTER, OPQ_INNER_FIRST, OPQ_ROWS
    chain = faiss.IndexPreTransform(opq, pq)
    if padded != problem.dim:
        chain.prepend_transform(faiss.RemapDimensionsTransform(problem.dim, padded, True))
    return FaissEngine(chain)


def build_pq_fast_scan(problem: Problem, code_bytes: int) -> Engine:
    faiss = load_faiss()

    padded = padded_dim(problem.dim, 2 * code_bytes)
    index = faiss.IndexPQFastScan(padded, 2 * code_bytes, 4, faiss_metric(problem.metric))
    index.pq.cp.niter = problem.pq_iterations
    return FaissEngine(spread(index, problem.dim, padded))


def rabitq_size(dim: int, bits: int) -> int:
    return -(-dim // 8) + 8 if bits == 1 else -(-dim // 8) + -(-dim * (bits - 1) // 8) + 20


def width_text(bits: float) -> str:
    return f"{bits:g} bit" if bits == 1 else f"{bits:g} bits"


def packed(dim: int, bits: float) -> int:
    return int(-(-dim * bits // 8))


def ours(name: str, note: str = "", *, learn: str = "", codec: str = "scalar") -> Family:
    """This package's index, with options of `TurboQuantEngine`; it runs at the widths of the budgets: see `plan`."""

    def build(problem: Problem, bits: float) -> Engine:
        return TurboQuantEngine(problem.dim, bits, problem.metric, problem.seed, learn=learn, codec=codec)

    quick = codec == "scalar"
    return Family(name, width_text, packed, build, choices=(), trained=bool(learn), quick=quick, note=note)


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            name="exact",
            label=lambda _: "Flat",
            size=lambda dim, _: 4 * dim,
            build=factory("Flat"),
            choices=(32,),
            nominal=(32,),
            note="FAISS IndexFlat on float32",
        ),
        ours("TurboQuant"),
        ours(
            "TurboQuant centred",
            'after `index.train(sample, learn="centre")`: the sample\'s mean is taken off, as RaBitQ and EDEN do',
            learn="centre",
        ),
        ours(
            "TurboQuant trained",
            "after `index.train(sample)`: principal axes, and more bits for those that matter more",
            learn="axes",
        ),
        ours("TurboQuant trellis", 'codec="trellis": levels along a trellis', codec="trellis"),
        ours(
            "TurboQuant trained trellis", 'codec="trellis", after `index.train(sample)`', learn="axes", codec="trellis"
        ),
        Family(
            name="FAISS PQ",
            label=lambda m: f"PQ{m}x8",
            size=lambda _, m: m,
            build=build_pq,
            trained=True,
        ),
        Family(
            name="FAISS PQ fast scan",
            label=lambda m: f"PQ{2 * m}x4fs",
            size=lambda _, m: m,
            build=build_pq_fast_scan,
            trained=True,
        ),
        Family(
            name="FAISS OPQ+PQ",
            label=lambda m: f"OPQ{m},PQ{m}x8",
            size=lambda _, m: m,
            build=build_opq,
            trained=True,
            quick=False,
            widths=(1, 2, 4),
            note=(
                f"the rotation is trained on at most {OPQ_ROWS} rows in {OPQ_OUTER} outer iterations,"
                f" the first with {OPQ_INNER_FIRST} of k-means"
            ),
        ),
        Family(
            name="FAISS RaBitQ",
            label=lambda bits: f"RR,RaBitQ{bits}",
            size=rabitq_size,
            build=factory("RR,RaBitQ{}", query_bits=8),
            choices=tuple(range(1, 10)),
            nominal=(1, 2, 4),
            quick=False,
            note="queries quantized to 8 bits",
        ),
        Family(
            name="FAISS RaBitQ fast scan",
            label=lambda bits: f"RR,RaBitQfs{bits}",
            size=rabitq_size,
            build=factory("RR,RaBitQfs{}", query_bits=8),
            choices=tuple(range(1, 10)),
            nominal=(1, 2, 4),
            note="queries quantized to 8 bits",
        ),
        Family(
            name="FAISS EDEN",
            label=lambda bits: f"RR,EDEN{bits}",
            size=lambda dim, bits: packed(dim, bits) + 8,
            build=factory("RR,EDEN{}"),
            choices=tuple(range(1, 9)),
            nominal=(1, 2, 3, 4),
            note="QT_*bit_eden with the two factors per vector of IndexEDEN; far less recall without them",
        ),
        Family(
            name="FAISS SQ tqmse",
            label=lambda bits: f"RR,SQtqmse{bits}",
            size=packed,
            build=factory("RR,SQtqmse{}", unit_rms=True),
            choices=(1, 2, 3, 4, 8),
            nominal=(1, 2, 3, 4),
            quick=False,
            note="keeps no scale; vectors that are not of norm 1 are divided by the root mean square of their norms",
        ),
        Family(
            name="FAISS SQ",
            label=lambda bits: f"SQ{bits}",
            size=packed,
            build=factory("SQ{}"),
            choices=(4, 8),
            nominal=(4, 8),
            note="QT_4bit and QT_8bit: the range of every dimension is trained",
        ),
        Family(
            name="turbovec",
            label=lambda bits: f"{bits} bits",
            size=lambda dim, bits: packed(dim, {2: 2, 3: 4, 4: 4}[bits]) + 4,  # 3 bits are stored in 4
            build=lambda problem, bits: TurbovecEngine(problem.dim, bits),
            choices=(2, 3, 4),
            nominal=(2, 3, 4),
            metrics=("cosine", "ip"),
            dim_multiple=8,
            note="inner product only; its optional calibration is off",
        ),
    )
}


def plan(dim: int, metric: str, *, quick: bool) -> tuple[dict[float, int], list[tuple[str, Any]], dict[str, str]]:
    """Who runs.

    Returns:
        The budgets (bytes by TurboQuant's width), the runs as (family, setting), and who is left out with the reason.
    """
    budgets = {width: turboquant_size(dim, width, metric) for width in (QUICK_WIDTHS if quick else WIDTHS)}
    runs: list[tuple[str, Any]] = []
    left_out: dict[str, str] = {}
    for family in FAMILIES.values():
        if quick and not family.quick:
            left_out[family.name] = "not part of --quick"
        elif reason := family.unsuitable(dim, metric):
            left_out[family.name] = reason
        else:
            settings: Sequence[Any] = (
                tuple(budgets) if family.name in OURS else family.settings(dim, budgets, quick=quick)
            )
            runs += [(family.name, setting) for setting in settings]
    return budgets, runs, left_out
