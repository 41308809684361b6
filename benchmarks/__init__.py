"""The benchmarks: `python -m benchmarks NAME`, raw results in `results/`, tables and figures by `benchmarks.report`."""
