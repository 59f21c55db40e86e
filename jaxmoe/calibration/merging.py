"""Add up the statistics of several runs, as if one run had seen all their texts."""

from collections.abc import Sequence
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np

from jaxmoe.calibration.folder import Statistics
from jaxmoe.calibration.record import Record, Source
from jaxmoe.calibration.writer import StatisticsWriter
from jaxmoe.checkpoint.tensor_file import listing
from jaxmoe.errors import JaxmoeError


def merge(folders: Sequence[str | Path], output: str | Path, *, force: bool = False) -> Statistics:
    """Write the statistics of several runs of one model into one folder; domains of one name add up.

    One layer of one domain is in memory at a time; a killed merge resumes where it stopped.

    Args:
        folders: statistics folders, at least two.
        output: the folder to create.
        force: whether a text may count twice.

    Raises:
        JaxmoeError: a folder is not whole, they are not of the same model, tokenizer, layers and kind, or a text is in
            two of them.
    """
    if len(folders) < 2:
        raise JaxmoeError(f"{len(folders)} statistics folders to merge: give at least two")
    opened = [Statistics.open(folder).check() for folder in folders]
    record = _merged(opened, force)
    writer = StatisticsWriter(output, record)
    if (done := writer.finished()) is not None:
        return done
    with writer.opened():
        for domain, index in writer.missing():
            own = [each for each in opened if domain in each.domains]
            experts = reduce(add, (each.layer(index, [domain]) for each in own)) if index in record.layers else None
            writer.write(domain, index, experts, _inputs(own, index, domain))
        return writer.publish()


def _inputs(opened: Sequence[Statistics], index: int, domain: str) -> dict[str, np.ndarray]:
    """Return the sums of a layer's further inputs, which all of the folders keep."""
    found = {}
    for name in opened[0].record.inputs.get(index, {}):
        moments = (each.inputs(index, name, [domain]) for each in opened)
        found[name] = reduce(np.add, (moment.sums for moment in moments if moment is not None))
    return found


def _merged(opened: Sequence[Statistics], force: bool) -> Record:
    first = opened[0].record
    problems = []
    for other in opened[1:]:
        for name in ("model", "tokenizer", "layers", "moments", "gradients", "targets", "inputs"):
            if getattr(other.record, name) != getattr(first, name):
                problems.append(f"{opened[0].folder} and {other.folder} differ in {name}")
    if problems:
        raise JaxmoeError(f"{listing(problems)}: only runs of one model with the same settings add up")
    domains: dict[str, tuple[Source, ...]] = {}
    seen: dict[str, str] = {}
    for each in opened:
        for domain, sources in each.record.domains.items():
            domains[domain] = domains.get(domain, ()) + sources
            for source in sources:
                where = f"{domain} of {each.folder}"
                if source.fingerprint in seen:
                    problems.append(f"{where} is the text of {seen[source.fingerprint]}")
                seen[source.fingerprint] = where
    if problems and not force:
        raise JaxmoeError(f"{listing(problems)}: leave one out, or force it if they are to count twice")
    return Record(
        model=first.model,
        tokenizer=first.tokenizer,
        domains=domains,
        layers=first.layers,
        moments=first.moments,
        gradients=first.gradients,
        targets=first.targets,
        inputs=first.inputs,
    )
