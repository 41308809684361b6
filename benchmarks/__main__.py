"""`python -m benchmarks NAME ...`: the threads are pinned before anything that starts threads is imported."""

import argparse
import importlib
import sys

from benchmarks.threads import pin, requested_threads

# A benchmark is a module with `main(arguments) -> int`; adding one is one line.
COMMANDS = {
    "search": ("benchmarks.search", "TurboQuant against FAISS, turbovec and exact search at equal bytes per vector"),
    "kernels": ("benchmarks.kernels", "the GPU scan against float16 matrix products and topk, and against the limits"),
    "gpu": ("benchmarks.gpu", "the index on a GPU: recall with int8 and exact queries, and speed"),
    "training": ("benchmarks.training", "learnt axes and trellis codes on a GPU: training, adding, scanning, recall"),
    "seeds": ("benchmarks.seeds", "what training gains on a set of few queries, over random splits and seeds"),
    "kvcache": ("benchmarks.kvcache.run", "the compressed KV cache against the dense one and its rivals"),
    "attention": ("benchmarks.attention", "decode attention from compressed keys and values beside the dense kernels"),
    "distortion": ("benchmarks.distortion", "the codec's distortion and inner-product error beside theory"),
}


def main(argv: list[str]) -> int:
    listing = "\n".join(f"  {name:<12}{what}" for name, (_, what) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=f"benchmarks:\n{listing}",
        epilog="`python -m benchmarks NAME --help` shows the options of one; --threads N pins the threads of any.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=COMMANDS, metavar="NAME")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    chosen = parser.parse_args(argv)
    pin(requested_threads(chosen.arguments))
    module = importlib.import_module(COMMANDS[chosen.name][0])
    from tqsearch.errors import TQSearchError

    try:
        return int(module.main(chosen.arguments) or 0)
    except TQSearchError as error:  # a data set or a text that is not there, most of all
        print(f"benchmarks {chosen.name}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
