"""The data sets that are known by name, as data.

Names, dimensions and counts are those of the ann-benchmarks README. Only sets of real vectors under one of our three
metrics are listed: the Hamming and Jaccard sets are not.
"""

from dataclasses import dataclass

from tqsearch.datasets.metric import Metric

SYNTHETIC_NAME = "synthetic-embeddings"


@dataclass(frozen=True)
class Entry:
    """One data set that can be downloaded.

    Attributes:
        name: what `load_dataset` is given.
        url: where the file is published.
        file_name: what the file is called in the cache.
        size: bytes, or None when unknown: then only the length the server announces is checked.
        sha256: in hexadecimal, or None when no checksum was published: then the file is trusted on first use. Its
            checksum is recorded beside the cached file, as `<file>.sha256`, and verified on every later load.
        licence: of the vectors, or None when it is not recorded here: ask the publisher of the original data.
        metric: of the ground truth inside the file.
        dim: coordinates of a vector.
        n: vectors in the base.
    """

    name: str
    url: str
    file_name: str
    size: int | None
    sha256: str | None
    licence: str | None
    metric: Metric
    dim: int
    n: int


def _ann_benchmarks(
    name: str,
    metric: Metric,
    dim: int,
    n: int,
    *,
    licence: str | None = None,
    size: int | None = None,
    sha256: str | None = None,
    origin: str = "https://ann-benchmarks.com",
) -> Entry:
    """An entry whose URL and file name follow from its name."""
    file_name = f"{name}.hdf5"
    return Entry(name, f"{origin}/{file_name}", file_name, size, sha256, licence, metric, dim, n)


_PDDL = "PDDL 1.0"
_COCO = "https://github.com/fabiocarrara/str-encoders/releases/download/v0.1.3"  # where the README sends COCO's users

# The three checksums, with their sizes, are the ones TensorFlow Datasets publishes for the same URLs.
_ENTRIES = (
    _ann_benchmarks("coco-i2i-512-angular", "cosine", 512, 113_287, origin=_COCO),
    _ann_benchmarks("coco-t2i-512-angular", "cosine", 512, 113_287, origin=_COCO),
    _ann_benchmarks(
        "deep-image-96-angular",
        "cosine",
        96,
        9_990_000,
        size=3_848_008_288,
        sha256="a0a44dfe80c58e63860862eeea2d34e62cff958dc3aec14fd65263d1d3c751f8",
    ),
    _ann_benchmarks("fashion-mnist-784-euclidean", "l2", 784, 60_000, licence="MIT"),
    _ann_benchmarks("gist-960-euclidean", "l2", 960, 1_000_000),
    _ann_benchmarks("glove-25-angular", "cosine", 25, 1_183_514, licence=_PDDL),
    _ann_benchmarks("glove-50-angular", "cosine", 50, 1_183_514, licence=_PDDL),
    _ann_benchmarks(
        "glove-100-angular",
        "cosine",
        100,
        1_183_514,
        licence=_PDDL,
        size=485_413_888,
        sha256="544af1d5e84e112cd4749571dcfd8ca109818a572f850af75a3a09e093a953c4",
    ),
    _ann_benchmarks("glove-200-angular", "cosine", 200, 1_183_514, licence=_PDDL),
    # 65 coordinates: the inner product is made angular by one more (Bachrach et al., 2014), and so is the ground truth.
    _ann_benchmarks("lastfm-64-dot", "cosine", 65, 292_385),
    _ann_benchmarks("mnist-784-euclidean", "l2", 784, 60_000),
    _ann_benchmarks("nytimes-256-angular", "cosine", 256, 290_000),
    _ann_benchmarks(
        "sift-128-euclidean",
        "l2",
        128,
        1_000_000,
        size=525_128_288,
        sha256="dd6f0a6ed6b7ebb8934680f861a33ed01ff33991eaee4fd60914d854a0ca5984",
    ),
)

REGISTRY: dict[str, Entry] = {entry.name: entry for entry in _ENTRIES}
