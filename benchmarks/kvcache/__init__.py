"""The compressed KV cache against the dense one and against its rivals: `python -m benchmarks kvcache`."""
