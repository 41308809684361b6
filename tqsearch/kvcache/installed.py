"""Says at once, and with the remedy, where transformers is missing or too old."""

FEWEST = (5, 17)  # the first version whose cache layers are those that `layer` stands in for

REMEDY = "pip install 'tqsearch[hf]'"

try:
    import transformers
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ModuleNotFoundError(f"tqsearch.kvcache needs transformers: {REMEDY}", name="transformers") from error

if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < FEWEST:
    wanted = ".".join(map(str, FEWEST))
    raise ImportError(
        f"tqsearch.kvcache needs transformers {wanted} or later, got {transformers.__version__}: {REMEDY}",
        name="transformers",
    )
