"""`python -m benchmarks.kvcache.merge OUTPUT RESULT ...`: one result of several, such as of processes side by side."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.kvcache import configurations, results


def main(arguments: list[str]) -> int:
    if len(arguments) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    output, *inputs = map(Path, arguments)
    whole = results.merge([json.loads(path.read_text()) for path in inputs])
    results.save(whole, output, [one.name for one in configurations.catalogue()])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
