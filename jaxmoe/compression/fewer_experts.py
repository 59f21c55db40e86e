"""Write a checkpoint of which fewer experts run: one layer at a time, kept as it is finished, published when complete.

Without text the vectors that stand in for experts are ones. With text, the hidden states of the original walk through
its layers, and each layer's vectors learn from what its experts read and gave there. A run that is killed goes on at
the layer where it stopped, and ends with the same bytes.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import jaxmoe
from jaxmoe.calibration.collect import make_record
from jaxmoe.checkpoint.factored_format import experts_modules, factored_config
from jaxmoe.checkpoint.output import output_folder
from jaxmoe.checkpoint.tensor_file import Planned, write_tensors
from jaxmoe.checkpoint.workspace import JOURNAL, Workspace, fingerprint, finished, layer_file
from jaxmoe.compression.expert_vectors import Examples, Vectors, distil, importance, observe
from jaxmoe.compression.fewer_experts_plan import MainPlan
from jaxmoe.compression.plan import describe
from jaxmoe.compression.run import peak_bytes, publish, where
from jaxmoe.errors import JaxmoeError
from jaxmoe.export.checking import answers, first_and_last, vector_answers
from jaxmoe.export.remote_code import remote_code
from jaxmoe.methods.compressed_experts import METHOD, Settings
from jaxmoe.model.auxiliary import ones
from jaxmoe.model.spec import ExpertBlock
from jaxmoe.report.events import Complete, OnEvent, VectorsLearned, ignore
from jaxmoe.report.records import Improvement
from jaxmoe.streaming import HiddenStates, Prefetched, run_layer, start
from jaxmoe.texts import Windows


def compress_experts(
    plan: MainPlan,
    output: str | Path,
    settings: Settings,
    *,
    texts: Sequence[Windows] = (),
    tokenizer: str | None = None,
    seed: int = 0,
    resume: bool = True,
    command: str = "",
    on_event: OnEvent = ignore,
) -> dict[str, Any]:
    """Carry out a plan and write the checkpoint.

    Args:
        plan: which experts run.
        output: the folder to create; work in progress lies in `OUTPUT.partial` beside it.
        settings: how the vectors learn.
        texts: windows to learn from, of one length; none leaves the vectors at one.
        tokenizer: fingerprint of what made the windows, None if unknown.
        seed: of the order of the tokens.
        resume: whether to go on with an unfinished run; False starts over.
        command: the command line, for the report.
        on_event: called with a small record after every layer.

    Returns:
        The report, also written to `report.json`.

    Raises:
        JaxmoeError: the output exists, the folder belongs to another run, activations are not finite, or the disk is
            full.
    """
    if texts and settings.setting == "paper":
        raise JaxmoeError(
            "published Compressed Experts learn with the whole model: write them without text, then `jaxmoe recover`"
            " trains them; or give --setting improved, which learns from text layer by layer"
        )
    output = output_folder(output, [plan.model.folder])
    begun = time.perf_counter()
    record = make_record(plan.model, texts, tokenizer, moments="none") if texts else None
    run = {
        "source": plan.model.fingerprint(),
        "method": METHOD.name,
        "settings": asdict(settings),
        "requested": plan.main.as_json(),
        "texts": None if record is None else fingerprint(record.as_json()),
        "seed": seed,
        **where(),
    }
    if (done := finished(output, run)) is not None:
        on_event(Complete(output=str(output)))
        return done
    workspace = Workspace(output, run)
    with workspace.opened(sorted(plan.model.modules), resume=resume):
        walk = _Run(plan, settings, workspace, run, seed, on_event)
        walk.with_text(texts) if texts else walk.without()
        return walk.publish(
            {
                "jaxmoe": jaxmoe.__version__,
                "source": str(plan.model.folder),
                "output": str(output),
                "command": command,
                "seed": seed,
                "export": "factored",
                "settings": asdict(settings),
                **plan.summary(),
                "calibration": None if record is None else {"sequential": False, **record.describe()},
                "seconds": time.perf_counter() - begun,
                "complete": True,
                "run": run,
            }
        )


class _Run:
    """One run: what its steps share."""

    def __init__(self, plan: MainPlan, settings: Settings, workspace: Workspace, run, seed: int, on_event: OnEvent):
        self.plan, self.settings, self.workspace, self.seed, self.on_event = plan, settings, workspace, seed, on_event
        self.model = plan.model
        self.keys = {index: fingerprint({"run": run, "layer": index}) for index in sorted(self.model.modules)}
        self.entries = {index: workspace.entry(index, key) for index, key in self.keys.items()}

    def without(self) -> None:
        """Write every layer with vectors of ones."""
        for index in self.missing():
            begun = time.perf_counter()
            shape = self.model.shapes[index]
            self._write(index, ones(shape), {}, begun)

    def missing(self) -> list[int]:
        """Return the layers that are not finished."""
        return [index for index, entry in self.entries.items() if entry is None]

    def with_text(self, texts: Sequence[Windows]) -> None:
        """Walk the texts' hidden states through the original, and let the vectors of every layer learn."""
        if not (missing := self.missing()):
            return
        ids, counted = (np.concatenate([getattr(text, name) for text in texts]) for name in ("ids", "counted"))
        states = HiddenStates(ids, self.workspace.folder / JOURNAL / "states", self.model.spec.hidden)
        first = next((index for index in range(missing[0], -1, -1) if states.whole(index)), None)
        if first is None:
            first = 0
            start(self.model, states)
        for index, parameters in Prefetched(self.model, range(first, missing[-1] + 1)):
            out = None if index == missing[-1] else states.create(index + 1)
            spec = self.model.spec.layers[index]
            examples = None
            begun = time.perf_counter()
            if index in self.entries:
                # Also where nothing is missing: another program might round the states differently.
                examples = observe(index, parameters, spec, states, out, counted)
            else:
                for _ in run_layer(index, parameters, spec, states, out):
                    pass
            if out is not None:
                states.finish(index + 1)
            if examples is not None and index in missing:
                self._learn(index, parameters, examples, begun)
            states.remove(index)

    def _learn(self, index: int, parameters: dict[str, Any], examples: Examples, begun: float) -> None:
        block = self.plan.spec.layers[index].feed_forward
        assert isinstance(block, ExpertBlock)
        found = distil(examples, parameters, block, self.settings, (self.seed, index))
        learned = {
            "error": {"before": found.before, "after": found.after},
            "steps": found.steps,
            "losses": found.losses,
            "importance": importance(examples, block.shape.experts, block.running),
            "never_auxiliary": list(found.never),
        }
        self._write(index, found.vectors, learned, begun)

    def _write(self, index: int, vectors: Vectors, learned: dict[str, Any], begun: float) -> None:
        layer, module = self.model.experts(index), self.model.modules[index]
        arrays = {**layer.tensors(), **vectors}
        tensors = [
            Planned(f"{module}.{name}", array.dtype, array.shape, lambda array=array: np.asarray(array))
            for name, array in arrays.items()
        ]
        checksum = write_tensors(self.workspace.folder / layer_file(index), tensors)
        checked = index in first_and_last(self.model.modules)
        record = {
            "layer": index,
            "spec": layer.spec(),
            "projections": describe(layer),
            **learned,
            **({"answers": {**answers(layer), **vector_answers(vectors)}} if checked else {}),
            "seconds": time.perf_counter() - begun,
            "peak_bytes": peak_bytes(),
        }
        self.entries[index] = self.workspace.finish(index, self.keys[index], checksum, record)
        done = len(self.entries) - len(self.missing())
        error = Improvement(**learned["error"]) if learned else None
        told = {"layer": index, "error": error, "seconds": record["seconds"]}
        self.on_event(VectorsLearned(done=done, total=len(self.entries), **told))

    def publish(self, report: dict[str, Any]) -> dict[str, Any]:
        """Complete the folder and return the report."""
        entries = [entry for entry in self.entries.values() if entry is not None]
        kept = ("key", "sha256", "spec", "peak_bytes", "answers")
        report["layers"] = [{name: entry[name] for name in entry if name not in kept} for entry in entries]
        report["layer_seconds"] = sum(entry["seconds"] for entry in entries)
        report["peak_bytes"] = max([peak_bytes(), *(entry["peak_bytes"] for entry in entries)])
        source = self.model.checkpoint
        report["outcomes"] = [_outcome(None, "note", note) for note in getattr(source, "notes", ())]
        report["outcomes"] += [outcome for entry in entries for outcome in _outcomes(entry)]
        described = {
            self.model.modules[entry["layer"]]: (self.model.shapes[entry["layer"]], entry["spec"]) for entry in entries
        }
        config = factored_config(source.dense_config(), experts_modules(described, source.layouts(), self.plan.main))
        size, layers = self.plan.bytes["after"], list(self.entries)
        meant = {entry["layer"]: entry["answers"] for entry in entries if "answers" in entry}
        code = remote_code(config)
        return publish(source, self.workspace, report, layers, config, code, size, meant, self.on_event)


def _outcomes(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what a user should know of a layer whose vectors learned."""
    found = []
    if never := entry.get("never_auxiliary"):
        detail = f"experts {', '.join(map(str, never))} were never auxiliary in the text, and keep vectors of ones"
        found.append(_outcome(entry["layer"], "never_auxiliary", detail))
    if (error := entry.get("error")) is not None and error["after"] >= error["before"]:
        detail = "no vectors were better than ones on the tokens set apart: give more text, or a smaller rate"
        found.append(_outcome(entry["layer"], "kept_ones", detail))
    return found


def _outcome(layer: int | None, kind: str, detail: str) -> dict[str, Any]:
    return {"layer": layer, "kind": kind, "target": None if layer is None else "auxiliary", "detail": detail}
