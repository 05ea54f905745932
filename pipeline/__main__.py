"""Command line: `unveil VERB CONFIG [key=value ...]`."""

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline import __version__

if TYPE_CHECKING:
    from pipeline.config import AuditConfig

USAGE = """usage: unveil VERB CONFIG [key=value ...]

Finds real training faces that leaked into a synthetic face release.

verbs
  run      all stages, each only where its input changed
  scan     list the sets into units named by their content
  embed    decode, detect, align and embed every image
  search   compare the release with every gallery image, exactly
  assess   threshold, candidates, persons, summary.json
  report   report.html and findings.csv
  plant    copy people of the control set into the release in known ways, and measure how many the audit finds
  review   label the closest pairs blind, with decoys, in a browser on this machine
  verify   check a random sample of a finished run by another path
  clean    the release without its findings, as lists or rewritten, and what remains in it
  export   a dataset card section, a verdict for CI, labels for FiftyOne
  seal     sign the digests of the results; `verify` checks them from then on
  purge    destroy the run's key and remove its files, with a receipt
  plan     print the resolved configuration and what would run; run nothing
  doctor   check versions, builds and models
  watch    CONFIG is a list of audits (docs/watch.md): audit what is new, changed or stale; safe to start from cron

on a Ray cluster (docs/cluster.md)
  submit VERB CONFIG cluster=ADDRESS   the same verb as a job there: log, exit code; Ctrl-C leaves it running
  submit status|stop|logs ID cluster=ADDRESS

without CONFIG
  catalogue [NAME]  what is known of published releases and real sets
  selftest stats    repeat the statistics on simulated audits with a known truth (QUICK=1: under a minute)

CONFIG is a YAML file (see configs/). `key=value` changes one of its values, for example report.faces=clear.
options: --help, --version. Set UNVEIL_DEBUG=1 to see where an error comes from.
exit codes: 0 done, 1 error, 2 done and more persons found than assess.limit allows
"""

STAGE_VERBS = ("scan", "embed", "search", "assess", "report")
ASIDE_VERBS = ("plan", "doctor", "watch")
VERBS = ("run", *STAGE_VERBS, "plant", "review", "verify", "clean", "export", "seal", "purge", *ASIDE_VERBS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("--help", "-h", "help"):
        print(USAGE, end="")
        return 0 if words else 1
    if words[0] == "--version":
        print(f"unveil {__version__}")
        return 0
    if words[0] in ("catalogue", "selftest"):
        return _guarded_alone(*words)
    if words[0] == "submit":
        return _guarded(*words)
    if words[0] not in VERBS:
        return _fail(f"unknown verb {words[0]!r}. Verbs: {', '.join(VERBS)}.")
    if len(words) < 2:
        return _fail(
            f"`unveil {words[0]}` needs a configuration file, for example: unveil {words[0]} configs/demo.yaml"
        )
    return _guarded(*words)


def _guarded(verb: str, *words: str) -> int:
    """Run a verb; a user's mistake becomes one line."""
    from cluster.faults import ClusterError
    from operators.errors import AuditError

    _configure_logging()
    try:
        if verb == "submit":
            from pipeline.submit import submit

            return submit(words, lambda text: print(text, end="", flush=True))
        return _run(verb, words[0], words[1:])
    except (AuditError, ClusterError) as error:
        if os.environ.get("UNVEIL_DEBUG"):
            raise
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted. Run the same command again: it goes on where it was.", code=130)


def _guarded_alone(verb: str, *names: str) -> int:
    """A verb without a configuration."""
    from operators.errors import AuditError

    try:
        if verb == "catalogue":
            from pipeline.catalogue import entry, table, text

            print("\n\n".join(map(text, map(entry, names))) if names else table(), flush=True)
            return 0
        if names != ("stats",):
            return _fail("`unveil selftest` needs to know what: unveil selftest stats")
        from pipeline.selftest_stats import run_selftest

        return 0 if run_selftest(quick=bool(os.environ.get("QUICK")), out=print)["passed"] else 1
    except AuditError as error:
        return _fail(str(error))
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(verb: str, path: str, overrides: Sequence[str]) -> int:
    from pipeline.config import load
    from pipeline.submit import refuse_other_code

    refuse_other_code()
    _refuse_secrets(overrides)
    if verb == "watch":
        from pipeline.watch import watch

        return watch(path, overrides, lambda text: print(text, flush=True))
    config = load(path, overrides)
    if verb in ("plan", "doctor", "purge", "review"):
        return _beside(verb, config)
    from pipeline.audit import audit
    from pipeline.closing import closing

    audit(config, *{"run": (), "plant": ("plant", "assess", "report")}.get(verb, (verb,)))
    if verb in ("run", "assess", "report", "plant"):
        text, over = closing(config)
        print(text)
        return 2 if over else 0
    if verb == "clean":
        from pipeline.clean import folder_of
        from pipeline.clean_record import clean_text, cleaned
        from pipeline.stage import Run

        record = cleaned(folder_of(Run(config)))
        print(clean_text(record) if record is not None else "nothing was cleaned")
    return 0


def _refuse_secrets(overrides: Sequence[str]) -> None:
    """ConfigError for a secret in an address on the command line, which `ps` shows to others and Ray keeps."""
    from operators.addresses import public_override
    from operators.errors import ConfigError

    for text in overrides:
        if (said := public_override(text)) != text:
            raise ConfigError(
                f"{said}: this address holds a signature or a password, and a command line is seen by others on this "
                f"machine and kept by Ray. Write it into the configuration file, as it is or as ${{oc.env:NAME}}."
            )


def _beside(verb: str, config: "AuditConfig") -> int:
    """A verb that is no part of an audit; it holds the run folder itself, or not at all."""
    if verb == "plan":
        from pipeline.plan import plan

        print(plan(config))
        return 0
    if verb == "doctor":
        from pipeline.doctor import doctor

        text, well = doctor(config)
        print(text)
        return 0 if well else 1
    if verb == "purge":
        from pipeline.purge import purge

        print(purge(config))
        return 0
    from pipeline.review import review

    review(config, lambda text: print(text, flush=True))
    return 0


def _configure_logging() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for name in ("ray", "matplotlib", "PIL", "fontTools"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="ray")


def _fail(message: str, code: int = 1) -> int:
    print(f"unveil: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
