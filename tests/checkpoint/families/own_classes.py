"""Classes of PyTorch for an architecture that neither jaxmoe nor transformers knows; nothing here is of jaxmoe.

It is Qwen3-MoE whose scores have a factor of their own, and whose checkpoints have other names.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM, Qwen3MoeModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import WeightRenaming


class OwnConfig(Qwen3MoeConfig):
    model_type = "own_moe"
    score_scale: float = 0.5


class OwnModel(Qwen3MoeModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.layers:
            layer.self_attn.scaling = config.score_scale


class OwnForCausalLM(Qwen3MoeForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = OwnModel(config)
        self.post_init()


RENAMED = {
    r"\.wi\.weight": ".gate_proj.weight",
    r"\.wu\.weight": ".up_proj.weight",
    r"\.wo\.weight": ".down_proj.weight",
    r"\.blocks\.": ".layers.",
    r"model\.tokens\.": "model.embed_tokens.",
    r"\.query_norm\.": ".q_norm.",
    r"\.key_norm\.": ".k_norm.",
}
register_checkpoint_conversion_mapping(
    "own_moe",
    [
        *(WeightRenaming(on_disk, in_memory) for on_disk, in_memory in RENAMED.items()),
        *(get_checkpoint_conversion_mapping("qwen3_moe") or []),
    ],
)
AutoConfig.register("own_moe", OwnConfig)
AutoModel.register(OwnConfig, OwnModel)
AutoModelForCausalLM.register(OwnConfig, OwnForCausalLM)
