"""What a plan and a run say of themselves, as typed records: `as_json` writes their JSON, and `read` reads it.

Recipes differ in what there is to say. A field whose default is None is left out of the JSON where it is None; a field
without a default is always there, as `null` where it is None. Reading leaves unknown keys out of account, so that a
report of an older or newer jaxmoe can still be read.
"""

from typing import Any, Self

import msgspec

from jaxmoe.errors import JaxmoeError


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What all records have in common."""

    def as_json(self) -> dict[str, Any]:
        """Return the record as dictionaries, lists, text and numbers."""
        return msgspec.to_builtins(self)

    @classmethod
    def read(cls, record: Any) -> Self:
        """Return the record that `as_json` made this of.

        Raises:
            JaxmoeError: it is something else; the message names the place.

        Example:
            >>> Change.read({"before": 4, "after": "3"})
            Traceback (most recent call last):
                ...
            jaxmoe.errors.JaxmoeError: this is no record of the kind Change (Expected `int`, got `str` - at `$.after`)
        """
        try:
            return msgspec.convert(record, cls, str_keys=True)
        except msgspec.ValidationError as error:
            raise JaxmoeError(f"this is no record of the kind {cls.__name__} ({error})") from None


class Change(Record, frozen=True, kw_only=True):
    """A size before and after.

    Example:
        >>> Change(before=4, after=3).as_json()
        {'before': 4, 'after': 3}
    """

    before: int
    after: int


class Requested(Record, frozen=True, kw_only=True):
    """The size that was asked for: a removed fraction, or how many of a token's experts run.

    Args:
        ratio: removed fraction, in [0, 1].
        of: what it is a fraction of: "touched" (the matrices that are replaced), "experts" or "model".
        unit: in which it is counted, "parameters" or "bytes".
        targets: roles of the matrices that a recipe replaces; None for the experts' alone.
        main_experts: how many of a token's experts run, for recipes that remove nothing.
        renorm: what becomes of their router weights; None where these stay as they are.

    Example:
        >>> Requested(ratio=0.4, of="model").as_json()
        {'ratio': 0.4, 'of': 'model'}
    """

    ratio: float | None = None
    of: str | None = None
    unit: str = "parameters"
    targets: tuple[str, ...] | None = None
    main_experts: int | None = None
    renorm: str | None = None


class Outcome(Record, frozen=True, kw_only=True):
    """Something that a user should know of a run.

    Args:
        kind: in one word, such as "never_routed".
        detail: in one sentence.
        layer: where it happened; None for the whole model.
        target: the matrices that it is about; None for all of them.
    """

    layer: int | None
    kind: str
    target: str | None
    detail: str


class Projection(Record, frozen=True, kw_only=True):
    """One projection of all experts of a layer.

    Args:
        terms: what is stored: `target`, `kind` and the sizes of every term.
        ranks: of each term.
        parameters: stored numbers; a term over several projections counts for each in equal parts.
        kept: these as a fraction of the original's.
        bits_per_weight: stored bits for each original number.
        group_ranks: ranks of the groups of experts, for terms whose groups have ranks of their own.
        error: relative Frobenius error, mean over the experts; None where no matrix changes.
        worst_error: that of the worst expert; None for a linear map beside the experts.
        worst_expert: which one it is.
        weighted_error: as `error`, weighted by the calibrated second moments; None without these.
    """

    terms: list[dict[str, Any]]
    ranks: list[int]
    parameters: int
    kept: float
    bits_per_weight: float | None = None
    group_ranks: list[list[int]] | None = None
    error: float | None = None
    worst_error: float | None = None
    worst_expert: int | None = None
    weighted_error: float | msgspec.UnsetType | None = msgspec.UNSET


class Improvement(Record, frozen=True, kw_only=True):
    """An error before and after something was learned."""

    before: float
    after: float


class Layer(Record, frozen=True, kw_only=True):
    """One layer of a plan or a run.

    Args:
        layer: its index.
        projections: what it stores, by projection of the experts, or by name of a linear map beside them.
        seconds: that it took; None in a plan.
        losses: thinned history of the loss of every target that was fitted step by step.
        kept: indices of the experts that stay, for steps that remove some.
        bits: of every expert's numbers, by target, where a budget chose them.
        error: relative squared error of the experts' sum, for experts that do not run: left out, and with what
            compensates for them.
        steps: that their vectors learned for.
        importance: how much the router's choices weigh, by rank and by expert.
        never_auxiliary: experts that always ran.
    """

    layer: int
    projections: dict[str, Projection]
    seconds: float | None = None
    losses: dict[str, list[float]] | list[float] | None = None
    kept: list[int] | None = None
    bits: dict[str, list[int]] | None = None
    error: Improvement | None = None
    steps: int | None = None
    importance: dict[str, Any] | None = None
    never_auxiliary: list[int] | None = None

    @property
    def linear_maps(self) -> dict[str, Projection]:
        """Of what it stores, the linear maps beside the experts, such as `attention.query`."""
        return {name: own for name, own in self.projections.items() if "." in name}


class Step(Record, frozen=True, kw_only=True):
    """One step of a recipe of several, in terms of what it finds.

    Args:
        method: its name.
        settings: its settings.
        requested: the size that it was given.
        achieved: removed fraction of "touched", "experts" and "model".
        parameters: of the whole model.
        bytes: of the whole model's tensors.
        kept: how many "experts", or "channels" of every expert, stay.
        outcomes: what happened; None in a plan.
        layer_seconds: that its layers took; None in a plan.
    """

    method: str
    settings: dict[str, Any]
    requested: Requested
    achieved: dict[str, float]
    parameters: Change
    bytes: Change
    kept: dict[str, int] | None = None
    outcomes: list[Outcome] | None = None
    layer_seconds: float | None = None


class PlanSummary(Record, frozen=True, kw_only=True):
    """What a recipe will store, before anything runs.

    Args:
        method: the recipe's name.
        settings: its settings, by step where there are several.
        requested: the size that was asked for.
        achieved: removed fraction of "touched", "experts" and "model", in the unit that was asked for.
        removed: the same in both units, by unit; None in reports of earlier versions.
        parameters: of the whole model.
        bytes: of the whole model's tensors.
        bits_per_weight: stored bits for each original number of "touched", "experts" and "model".
        peak_bytes: predicted peak of memory beyond that of the idle program; None where nothing predicts it.
        layers: what every layer stores.
        allocation: the rule that shared the budget over layers and targets.
        kept: how many "experts", or "channels" of every expert, stay.
        steps: of a recipe of several.
        exports: forms in which the result can be written.
        loads_in: the programs that will load it in the form that is planned, one sentence each.
        experts_per_token: that run.
        active_parameters: that one token uses, in the mean.
        operations_per_token: of the routed experts' products.
    """

    method: str
    settings: dict[str, Any]
    requested: Requested
    achieved: dict[str, float]
    parameters: Change
    bytes: Change
    peak_bytes: int | None
    layers: list[Layer]
    removed: dict[str, dict[str, float]] | None = None
    bits_per_weight: dict[str, float] | None = None
    allocation: str | None = None
    kept: dict[str, int] | None = None
    steps: list[Step] | None = None
    exports: list[str] | None = None
    loads_in: list[str] | None = None
    experts_per_token: Change | None = None
    active_parameters: Change | None = None
    operations_per_token: Change | None = None

    def changes(self) -> dict[str, Change]:
        """Return the sizes before and after, by name; those that are known."""
        names = ("parameters", "bytes", "active_parameters", "operations_per_token", "experts_per_token")
        return {name: own for name in names if (own := getattr(self, name)) is not None}


class Calibration(Record, frozen=True, kw_only=True):
    """What a run was calibrated on.

    Args:
        sequential: whether each layer saw what the compressed ones before it make of the text.
        domains: tokens of each text.
        tokens: in all.
        moments: which second moments were kept.
        targets: of what inputs these are; None for the experts' alone.
    """

    sequential: bool
    domains: dict[str, int]
    tokens: int
    moments: str | None = None
    targets: list[str] | None = None


class Stored(Record, frozen=True, kw_only=True):
    """What the files of a checkpoint hold."""

    parameters: int
    bytes: int


class Report(PlanSummary, frozen=True, kw_only=True):
    """What a run did: the keys of its plan as they came true, and what it took.

    Args:
        jaxmoe: the version that ran.
        source: folder of the checkpoint.
        output: folder of the result.
        command: the command line; empty for a call from Python.
        seed: the random seed.
        export: form of the result, "factored", "dense", "slim", "packed" or "packed-vllm".
        layers: as in a plan, with errors and seconds.
        outcomes: what a user should know.
        calibration: what it was calibrated on; None without.
        peak_bytes: measured peak of resident memory.
        predicted_peak_bytes: what the plan said.
        layer_seconds: sum over the layers, of earlier runs too.
        seconds: of this run.
        complete: whether all layers are done; False where other runs' are missing.
        missing_layers: which.
        stored: what the files hold; None where the run is not complete.
        ignored_config_keys: keys of the source's config that were left out of account.
        recovery: what training did, for recipes that end in it.
        run: everything that decides the bytes of the result; None where the run is not complete.
        seal: a checksum of the report as it was written.
    """

    jaxmoe: str
    source: str
    output: str
    command: str
    seed: int
    export: str
    outcomes: list[Outcome]
    calibration: Calibration | None
    layer_seconds: float
    seconds: float
    complete: bool
    predicted_peak_bytes: int | None = None
    missing_layers: list[int] | None = None
    stored: Stored | None = None
    ignored_config_keys: list[str] | None = None
    recovery: dict[str, Any] | None = None
    run: dict[str, Any] | None = None
    seal: str | None = None
