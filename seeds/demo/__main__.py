"""The commands `make` and `score` of the demo corpus."""

import argparse
import sys
from pathlib import Path

from operators.errors import AuditError


def main(arguments: list[str] | None = None) -> int:
    """Run one command: 0 if done, 1 with one line of explanation if not."""
    parser = argparse.ArgumentParser(prog="python -m seeds.demo", description="The demo corpus with planted leaks.")
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make", help="make the corpus")
    make.add_argument("out", type=Path, help="folder of the corpus")
    make.add_argument("--scale", type=float, default=1.0, help="share of the usual persons and leaks (default 1)")
    score = commands.add_parser("score", help="count the planted leaks that an audit found")
    score.add_argument("run", type=Path, help="folder of the audit's run")
    score.add_argument("corpus", type=Path, help="folder of the corpus")
    options = parser.parse_args(arguments)
    try:
        print(_made(options.out, options.scale) if options.command == "make" else _scored(options.run, options.corpus))
    except (AuditError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


def _made(out: Path, scale: float) -> str:
    """Make the corpus and say what is there."""
    from seeds.demo.corpus import make

    corpus = make(out, scale=scale)
    counts = ", ".join(f"{number:,} {name}" for name, number in corpus.counts.items())
    return f"{out}: {'made' if corpus.made else 'already complete, nothing done'} ({counts})"


def _scored(run: Path, corpus: Path) -> str:
    """Grade the audit and say how."""
    from seeds.demo.score import score

    result = score(run, corpus)
    return f"{result.table()}\n{result.line()}"


if __name__ == "__main__":
    sys.exit(main())
