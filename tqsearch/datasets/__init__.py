"""Data sets for measurements: the ann-benchmarks sets by name, vector files by path, and one generated set.

Importing this package loads numpy only; h5py, platformdirs and tqdm are imported by the functions that need them.
"""

from tqsearch.datasets.dataset import Dataset
from tqsearch.datasets.io import read_vectors
from tqsearch.datasets.load import list_datasets, load_dataset
from tqsearch.datasets.synthetic import synthetic_embeddings

__all__ = ["Dataset", "list_datasets", "load_dataset", "read_vectors", "synthetic_embeddings"]
