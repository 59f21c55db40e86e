"""Routers as configs describe them: softmax or sigmoids, with groups of experts and without."""

from typing import Any

from jaxmoe.checkpoint.families.parts.settings import Settings
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import LayerShape
from jaxmoe.model.spec import Router

EXPERTS = "num_experts|num_local_experts|n_routed_experts|moe_num_experts"
TOP_K = "num_experts_per_tok|num_experts_per_token"


def softmax(*, top_k: str = TOP_K, normalize: bool | str = False, **options: Any):
    """Return what builds a softmax router; `normalize` is a name in the config or the value itself."""

    def make(s: Settings, index: int) -> Router:
        return Router(
            experts=s.of_layer(EXPERTS, index),
            top_k=s.of_layer(top_k, index),
            normalize=s.take(normalize) if isinstance(normalize, str) else normalize,
            **options,
        )

    return make


def sigmoid(*, scale: str):
    """Return what builds a sigmoid router with a selection bias; `scale` is the config's name of the factor."""

    def make(s: Settings, index: int) -> Router:
        options = {"selection_bias": True, "normalize": True, "epsilon": 1e-20, "scale": s.take(scale)}
        return softmax(score="sigmoid", **options)(s, index)

    return make


def deepseek_v3_router(s: Settings, index: int) -> Router:
    s.expect("scoring_func", "sigmoid", "noaux_tc")
    s.expect("topk_method", "noaux_tc")
    return Router(
        experts=s.of_layer(EXPERTS, index),
        top_k=s.of_layer(TOP_K, index),
        score="sigmoid",
        selection_bias=True,
        groups=s.take("n_group|num_expert_group"),
        group_score="top2",
        kept_groups=s.take("topk_group"),
        normalize=s.take("norm_topk_prob|moe_renormalize"),
        epsilon=1e-20,
        scale=s.take("routed_scaling_factor"),
    )


def checked(router: Router, shape: LayerShape, index: int) -> Router:
    """Return a layer's router; raise if it cannot choose among the experts that the tensors hold."""
    experts, groups = router.experts, router.groups
    problem = ""
    if experts != shape.experts:
        problem = f"{experts} experts, by config.json or by the default of its model_type, and the tensors hold"
        problem += f" {shape.experts}"
    elif router.score == "sparse_mixer" and router.top_k != 2:
        problem = f"a token chooses {router.top_k} experts, and a sparse mixer has two picks"
    elif router.top_k > experts:
        problem = f"a token chooses {router.top_k} of {experts} experts"
    elif experts % groups or router.kept_groups > groups:
        problem = f"{experts} experts in {groups} groups, of which {router.kept_groups} are chosen from"
    elif router.top_k > router.kept_groups * (experts // groups):
        problem = f"a token chooses {router.top_k} experts, and {router.kept_groups} of {groups} groups have fewer"
    elif router.group_score == "top2" and groups > 1 and experts // groups < 2:
        problem = f"groups are scored by their two best experts, and {groups} groups of {experts} have one each"
    if problem:
        raise JaxmoeError(f"config.json: layer {index}: {problem}: mend the numbers")
    return router
