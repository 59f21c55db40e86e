"""Statistics of every layer behind the already compressed ones, gathered while a checkpoint is being compressed.

What a layer sees then is what it will see in the compressed model: its fit can make up for the errors before it. The
original layer runs on these hidden states once for its sums; once it is compressed, the states move on through its
factors. They lie in a folder, so that a run that was stopped resumes.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmoe.calibration.collect import gather, make_record
from jaxmoe.calibration.folder import layer_arrays
from jaxmoe.calibration.inputs import InputMoment
from jaxmoe.calibration.statistics import FIELDS, LayerStatistics
from jaxmoe.checkpoint.stored_model import StoredModel
from jaxmoe.checkpoint.workspace import fingerprint
from jaxmoe.errors import JaxmoeError
from jaxmoe.model.roles import BLOCK_INPUT
from jaxmoe.streaming import TOKENS, HiddenStates, on_device, run_layer, start
from jaxmoe.texts import Windows


class Sequential:
    """Statistics that follow a compression from layer to layer.

    Args:
        model: the original.
        texts: windows of the texts, which count together.
        folder: where the hidden states lie; whoever owns the folder removes it in the end.
        tokenizer: fingerprint of what made the windows, None if unknown.
        targets: what is compressed, see `calibrate_windows`.
        tokens: that go through a layer together.
        limit: bytes that the sums of a layer's experts may take in memory, see `calibrate`.
    """

    def __init__(
        self,
        model: StoredModel,
        texts: Sequence[Windows],
        folder: Path,
        *,
        tokenizer: str | None = None,
        targets: str | Collection[str] = "experts",
        tokens: int = TOKENS,
        limit: int | None = None,
    ):
        self.model, self.limit = model, limit
        self.record = make_record(model, texts, tokenizer, targets=targets)
        self._inputs: tuple[int, dict[str, np.ndarray]] | None = None
        ids, self.counted = (np.concatenate([getattr(text, name) for text in texts]) for name in ("ids", "counted"))
        self.states = HiddenStates(ids, folder, model.spec.hidden, tokens=tokens)

    @property
    def keeps(self) -> frozenset[str]:
        """The names of the arrays that are kept of every layer."""
        return frozenset(layer_arrays(self.record, min(self.model.shapes)))

    @property
    def reads(self) -> tuple[Path, ...]:
        """None: the states lie in the folder of the run itself."""
        return ()

    def fingerprint(self) -> str:
        """Return a SHA-256 that changes with the model and the texts."""
        return fingerprint({"sequential": True, **self.record.as_json()})

    def describe(self) -> dict[str, Any]:
        """Return what a report says of these statistics."""
        return {"sequential": True, **self.record.describe()}

    def layer(self, index: int) -> LayerStatistics:
        """Return what a layer's experts see and do behind the compressed layers.

        Raises:
            JaxmoeError: the hidden states that enter it are gone.
        """
        return LayerStatistics(
            shape=self.model.shapes[index],
            tokens=int(self.counted.sum()),
            sequences=int(self.counted.any(1).sum()),
            **self._gather(index),
        )

    def inputs(self, index: int, name: str) -> InputMoment | None:
        """Return the second moment of what some linear maps of a layer read, as `Statistics` does.

        Raises:
            JaxmoeError: the hidden states that enter the layer are gone.
        """
        if self._inputs is None or self._inputs[0] != index:
            self._gather(index)
        assert self._inputs is not None
        sums = self._inputs[1].get(name)
        return None if sums is None else InputMoment(sums, int(self.counted.sum()))

    def _gather(self, index: int) -> dict[str, np.ndarray]:
        """Return the sums of a layer's experts, and keep those of its other inputs."""
        parameters, spec = self._walk(index), self.model.spec.layers[index]
        sums = gather(self.record, index, parameters, spec, self.states, self.counted, limit=self.limit)
        own = {name: array for name, array in sums.items() if name in FIELDS}
        inputs = {name: array for name, array in sums.items() if name not in FIELDS}
        if self.record.targets and "input_moment" in own:
            inputs[BLOCK_INPUT] = own["input_moment"]
        self._inputs = index, inputs
        return own

    def follow(self, index: int, parameters: Mapping[str, Any]) -> None:
        """Move the hidden states on through a layer, with what stands for its experts and linear maps by name."""
        if index == max(self.record.visited):
            return
        self._run(index, {**on_device(self.model.layer(index)), **on_device(dict(parameters))})

    def _walk(self, index: int) -> dict[str, Any]:
        """Bring the hidden states to a layer, and return its arrays."""
        begin = next((i for i in range(index, -1, -1) if self.states.whole(i)), None)
        if begin is None:
            begin = 0
            start(self.model, self.states)
        if between := [i for i in range(begin, index) if i in self.record.visited]:
            raise JaxmoeError(
                f"the hidden states behind layer {between[-1]} are gone from {self.states.folder}: start over with"
                " --no-resume; sequential calibration compresses all layers in one run"
            )
        for before in range(begin, index):
            self._run(before, on_device(self.model.layer(before)))
        # Only now: whoever asks for a layer has finished those before it, and asks for none of them again.
        for before in range(index):
            self.states.remove(before)
        return on_device(self.model.layer(index))

    def _run(self, index: int, parameters: dict[str, Any]) -> None:
        out = self.states.create(index + 1)
        for _ in run_layer(index, parameters, self.model.spec.layers[index], self.states, out):
            pass
        self.states.finish(index + 1)
