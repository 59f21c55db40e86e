"""Statistics of the routed experts of any transformers model, by hooks on its experts modules.

This is the second door to the records of `jaxmoe.calibration`: where jaxmoe has no decoder of an architecture, its
PyTorch model still gives the same sums. The model runs as it is, in its own dtype; from the rows, experts and weights
that each experts module is called with, every expert is run again by itself in float32 (float64 in a float64 model),
and the products are summed up in float64. Of the model's activations one batch is in memory; of the records all layers
that are asked for, and one layer's gradients.

The first batch is checked: the weighted sum of the outputs must be what the module returned.
"""

from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

from jaxmoe.calibration.statistics import LayerStatistics
from jaxmoe.errors import JaxmoeError
from jaxmoe.torch.stock_experts import StockExperts, find_experts

_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}


def statistics(
    model: Any,
    batches: Iterable[Any],
    *,
    moments: str = "weighted",
    gradients: bool = False,
    layers: Collection[int] | None = None,
) -> dict[int, LayerStatistics]:
    """Gather the statistics of a model's routed experts.

    Args:
        model: a causal language model of transformers with dense experts, on any device.
        batches: token ids `[sequence, token]`, or pairs of them and a mask of which tokens count, as tensors or numpy
            arrays; padding goes to the right and does not count. Without a mask all tokens but the first of each
            sequence count.
        moments: which second moments to keep, one of `jaxmoe.calibration.statistics.MOMENTS`.
        gradients: whether to keep the Fisher information: the squared gradient of each sequence's loss, which is the
            mean negative log-likelihood of its counted tokens, each given those before it. Sequences then run one by
            one.
        layers: indices of the layers to watch, all if None; the records of large models fit into memory in parts only.

    Returns:
        The record of each layer by its index.

    Raises:
        JaxmoeError: an experts module does not follow transformers' contract (all such are listed), a layer is not
            there, a mask does not fit its ids, or activations are not finite.

    Example:
        >>> from jaxmoe.texts import Tokenizer, text_windows
        >>> (text,) = text_windows(["a.txt"], Tokenizer.open(folder), length=256)  # doctest: +SKIP
        >>> statistics(model, [(text.ids, text.counted)])[0].counts  # doctest: +SKIP
    """
    found = find_experts(model)
    if layers is not None:
        if missing := sorted(set(layers) - found.keys()):
            raise JaxmoeError(f"layers {missing} have no routed experts: those that do are {list(found)}")
        found = {index: experts for index, experts in found.items() if index in layers}
    watchers = {index: _Watcher(index, experts, moments, gradients) for index, experts in found.items()}
    tokens = sequences = 0
    with _prepared(model, watchers.values(), gradients):
        for batch in batches:
            ids, counted = _batch(batch, model.device)
            tokens += int(counted.sum())
            sequences += int(counted.any(1).sum())
            for rows in range(len(ids)) if gradients else [slice(None)]:
                _run(model, watchers.values(), torch.atleast_2d(ids[rows]), torch.atleast_2d(counted[rows]), gradients)
    return {
        index: LayerStatistics(shape=watcher.experts.shape, tokens=tokens, sequences=sequences, **watcher.sums)
        for index, watcher in watchers.items()
    }


def _batch(batch: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    ids, counted = batch if isinstance(batch, (tuple, list)) else (batch, None)
    ids = torch.as_tensor(ids).to(device=device, dtype=torch.long)
    if counted is None:
        counted = (torch.arange(ids.shape[-1], device=device) > 0).expand(ids.shape)
    counted = torch.as_tensor(counted).to(device=device, dtype=torch.bool)
    if ids.ndim != 2 or counted.shape != ids.shape:
        raise JaxmoeError(
            f"token ids {tuple(ids.shape)} with a mask {tuple(counted.shape)}: give both as [sequence, token]"
        )
    return ids, counted


def _run(model, watchers, ids: torch.Tensor, counted: torch.Tensor, gradients: bool) -> None:
    for watcher in watchers:
        watcher.counted = counted.flatten()
    if not counted.any():
        return
    if not gradients:
        # The head has no experts, and its logits would be the largest tensor of all.
        with torch.no_grad():
            model.base_model(input_ids=ids, use_cache=False)
        return
    with torch.enable_grad():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        if (predicted := counted[:, 1:]).any():
            torch.nn.functional.cross_entropy(logits[predicted].float(), ids[:, 1:][predicted]).backward()


@contextmanager
def _prepared(model: Any, watchers: Collection["_Watcher"], gradients: bool) -> Iterator[None]:
    """Set the model up, with hooks and exact products, and leave it as it was."""
    training, precision = model.training, torch.get_float32_matmul_precision()
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    with ExitStack() as hooks:
        try:
            model.eval()
            torch.set_float32_matmul_precision("highest")
            for parameter, _, _ in before:
                parameter.requires_grad_(False)
                parameter.grad = None
            for watcher in watchers:
                handle = watcher.experts.module.register_forward_hook(watcher.see, with_kwargs=True)
                hooks.callback(handle.remove)
                for name, parameter in watcher.experts.weights.items() if gradients else ():
                    parameter.requires_grad_(True)
                    handle = parameter.register_post_accumulate_grad_hook(watcher.receiver(name))
                    hooks.callback(handle.remove)
            yield
        finally:
            model.train(training)
            torch.set_float32_matmul_precision(precision)
            for parameter, requires_grad, grad in before:
                parameter.requires_grad_(requires_grad)
                parameter.grad = grad


class _Watcher:
    """Sums up what one experts module sees."""

    def __init__(self, index: int, experts: StockExperts, moments: str, gradients: bool):
        self.index, self.experts = index, experts
        self.sums = LayerStatistics.zeros(experts.shape, moments=moments, gradients=gradients).arrays()
        self.counted: torch.Tensor | None = None
        self.checked = False

    @torch.no_grad()
    def see(self, module, args, kwargs, output) -> None:
        rows, chosen, weights = self.experts.arguments(args, kwargs)
        assert self.counted is not None
        if len(rows) != len(self.counted):
            raise JaxmoeError(
                f"{self.experts.path} was called with {len(rows)} rows for {len(self.counted)} tokens: this family"
                " drops or repeats tokens before its experts, which is not supported"
            )
        counted = self.counted.to(rows.device)
        compute = torch.promote_types(rows.dtype, torch.float32)
        rows, chosen, weights = rows[counted].to(compute), chosen[counted], weights[counted].to(compute)
        if not rows.isfinite().all():
            raise JaxmoeError(f"NaN or infinite inputs of the experts in layer {self.index}: check the model's weights")
        total = self._gather(rows, chosen, weights)
        if not self.checked:
            self._compare(total, output.reshape(-1, output.shape[-1])[counted])
            self.checked = True

    def _gather(self, rows: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Add the tokens to the sums, and return the weighted sum of their experts' outputs."""
        shape, sums, total = self.experts.shape, self.sums, torch.zeros_like(rows)
        # In float32, which is exact for so few tokens: not all devices multiply integers.
        hits = torch.zeros(len(rows), shape.experts, device=rows.device).scatter_(1, chosen.long(), 1.0)
        sums["coactivation"] += _numpy(hits.T @ hits).astype(np.int64)
        if "input_moment" in sums:
            sums["input_moment"] += _numpy(rows.T @ rows)
        for expert in chosen.unique().tolist():
            token, slot = (chosen == expert).nonzero(as_tuple=True)
            inputs, weight = rows[token], weights[token, slot][:, None]
            inner = self.experts.intermediate(inputs, expert)
            outputs = self.experts.output(inner, expert)
            norms, energies = outputs.norm(dim=1, keepdim=True), (weight * inner).square()
            if not norms.isfinite().all() or not energies.isfinite().all():
                raise JaxmoeError(
                    f"NaN or infinite activations in layer {self.index}, expert {expert}: check the model's weights"
                )
            total.index_add_(0, token, weight * outputs)
            sums["counts"][expert] += len(token)
            for name, values in (
                ("weight_sums", weight),
                ("output_norms", norms),
                ("weighted_output_norms", weight * norms),
            ):
                sums[name][expert] += float(values.double().sum())
            for name, values in (("input_sums", inputs), ("output_sums", outputs), ("channel_energies", energies)):
                sums[name][expert] += _numpy(values.double().sum(0))
            peaks = sums["channel_peaks"][expert]
            np.maximum(peaks, _numpy(energies.amax(0)), out=peaks)
            if "input_moments" in sums:
                sums["input_moments"][expert] += _numpy(inputs.T @ inputs)
                sums["intermediate_moments"][expert] += _numpy(inner.T @ inner)
            if "weighted_input_moments" in sums:
                weighted_inputs, weighted_inner = weight * inputs, weight * inner
                sums["weighted_input_moments"][expert] += _numpy(weighted_inputs.T @ weighted_inputs)
                sums["weighted_intermediate_moments"][expert] += _numpy(weighted_inner.T @ weighted_inner)
        return total

    def _compare(self, total: torch.Tensor, output: torch.Tensor) -> None:
        error, scale = float((total - output).norm()), float(output.norm())
        if error > _TOLERANCE.get(output.dtype, 0.05) * scale:
            raise JaxmoeError(
                f"{self.experts.path} ({type(self.experts.module).__name__}) does not return the weighted sum of its"
                f" experts' outputs (they differ by {error / (scale or 1.0):.2g} of it): this family combines them in"
                " another way, which is not supported"
            )

    def receiver(self, name: str):
        """Return what squares the gradient of a parameter, adds it up and drops it."""

        def receive(parameter: torch.Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            for expert, matrix in enumerate(gradient):
                for projection, part in self.experts.projections(name, matrix).items():
                    self.sums[f"fisher_{projection}"][expert] += _numpy(part.double().square())

        return receive


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.cpu().numpy()
