"""Second opinions: further face models, whose searches live beside that of the first.

Each further model of `embedders` is an audit of its own in `models/<name>` of the run folder: the same sets as listed
by the first, its vectors from the shared store, its own threshold and search. Only its best matches are used.
"""

from dataclasses import replace

from operators.backbones import BackboneConfig
from operators.tables import UNITS
from pipeline.embed import embed
from pipeline.stage import Run


def opinions(run: Run) -> list[Run]:
    """The audits of the further models, for reading and for searching within this run."""
    return [_opinion(run, model) for model in run.config.models()[1:]]


def adopt(run: Run, other: Run) -> None:
    """Let a further model's audit have the sets as they were listed, and close its embeddings, which are there."""
    for role in run.config.sets.given():
        made = run.commit("scan", role)
        earlier = other.store.child("scan").find(role)
        if earlier is None or earlier.key != made.key:
            other.save("scan", role, UNITS, run.table("scan", role, UNITS), key=made.key, **made.facts)
    embed(other)


def _opinion(run: Run, model: BackboneConfig) -> Run:
    folder = run.folder / "models" / model.name
    store = run.config.store or str(run.folder / "store")
    evidence = replace(run.config.assess.evidence, near_duplicates=False)  # the first model says who is one person
    assess = replace(run.config.assess, evidence=evidence)
    other = Run(replace(run.config, out=str(folder), store=store, embedder=model, embedders=[], assess=assess))
    other.ray = run.ray  # type: ignore[method-assign]  # one session serves all
    return other
