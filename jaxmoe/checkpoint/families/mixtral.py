"""Mixtral of Mistral AI."""

from jaxmoe.checkpoint.families.family import Family
from jaxmoe.checkpoint.families.parts import Settings, Shapes, build, everywhere, grouped_query, sizes, softmax, stock
from jaxmoe.model.spec import DecoderSpec


def _decoder(s: Settings, shapes: Shapes) -> DecoderSpec:
    s.take("router_jitter_noise", None)  # of training alone
    return build(s, shapes, router=softmax(normalize=True), attention=grouped_query(bias=False, sliding=everywhere))


MIXTRAL = Family(
    model_type="mixtral",
    experts="num_local_experts",
    intermediate="intermediate_size",
    defaults={
        **sizes(32000, 4096, 14336, layers=32, heads=32, kv_heads=8, positions=131072),
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-5,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
    },
    router="block_sparse_moe.gate.weight",
    routing="softmax_normalised",
    decoder=_decoder,
    transformers=stock("mixtral", "Mixtral"),
)

FAMILIES = (MIXTRAL,)
