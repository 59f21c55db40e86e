"""The keys of `config.json` that jaxmoe uses, and what may stand under each: kind, sign and range.

Keys that only one architecture has stand in its record. Whoever reads a config checks it here first, once, so that
everything behind may take a number for a number. The bounds are far beyond any published model; they keep a damaged
config from asking for more memory than there is.
"""

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

from jaxmoe.errors import JaxmoeError


class Kind(NamedTuple):
    """What may stand under a key: as a type that msgspec checks, and in words."""

    type: Any
    words: str


_Size = Annotated[int, Meta(ge=1, le=1 << 20)]
_Count = Annotated[int, Meta(ge=0, le=1 << 20)]
_Layer = Annotated[int, Meta(ge=0, le=1000)]
_Token = Annotated[int, Meta(ge=-1, le=1 << 24)]
_Positive = Annotated[float, Meta(ge=1e-12, le=1e12)]
_Word = Annotated[str, Meta(max_length=100)]
_Number = Annotated[float, Meta(ge=-1e12, le=1e12)]

SIZE = Kind(_Size, "a whole number of 1 to 1,048,576")
COUNT = Kind(_Count, "a whole number of 0 to 1,048,576")
SIZES = Kind(
    _Size | Annotated[list[_Size], Meta(min_length=1)], "a whole number of 1 to 1,048,576, or one for each layer"
)
COUNTS = Kind(
    _Count | Annotated[list[_Count], Meta(min_length=1)], "a whole number of 0 to 1,048,576, or one for each layer"
)
FEW = Kind(Annotated[int, Meta(ge=1, le=4096)], "a whole number of 1 to 4,096")
VOCABULARY = Kind(Annotated[int, Meta(ge=1, le=1 << 24)], "a whole number of 1 to 16,777,216")
POSITIONS = Kind(Annotated[int, Meta(ge=1, le=1 << 30)], "a whole number of 1 to 1,073,741,824")
WINDOW = Kind(Annotated[int, Meta(ge=0, le=1 << 30)], "a whole number of 0 to 1,073,741,824")
DEPTH = Kind(Annotated[int, Meta(ge=1, le=1000)], "a number of layers from 1 to 1,000")
PERIOD = Kind(Annotated[int, Meta(ge=1, le=1000)], "a whole number of 1 to 1,000")
PERIOD_OR_LETTERS = Kind(Annotated[int, Meta(ge=1, le=1000)] | _Word, "a whole number of 1 to 1,000, or letters")
LAYER = Kind(_Layer, "a whole number of 0 to 1,000")
LAYERS = Kind(list[_Layer], "a list of layers, counted from 0")
LAST = Kind(Annotated[int, Meta(ge=-1, le=1000)], "a layer, or -1 for the last one")
FREQUENCY = Kind(
    Annotated[int, Meta(ge=1, le=1000)] | list[int | bool], "a whole number from 1 on, or 0 or 1 for each layer"
)
POSITIVE = Kind(_Positive, "a finite number above 0")
POSITIVES = Kind(list[_Positive], "a list of finite numbers above 0")
WEIGHT = Kind(Annotated[float, Meta(ge=0, le=1000)], "a number of 0 to 1,000")
EPSILON = Kind(Annotated[float, Meta(ge=0, le=1)], "a number of 0 to 1")
SHARE = Kind(Annotated[float, Meta(gt=0, le=1)], "a number above 0 and up to 1")
NUMBER = Kind(_Number, "a finite number")
FLAG = Kind(bool, "true or false")
WORD = Kind(_Word, "a word")
WORDS = Kind(list[_Word], "a list of words")
PATTERN = Kind(Annotated[str, Meta(max_length=1000)], "a letter for each layer")
MAPPING = Kind(dict[str, Any], "a JSON object")
ATTENTION_KINDS = Kind(list[_Word], "a kind of attention for each layer")
BLOCK_KINDS = Kind(list[Literal["dense", "sparse"]], '"dense" or "sparse" for each layer')
TOKENS = Kind(_Token | list[_Token], "a token's number, or a list of such")
ZERO_OR_ONE = Kind(list[Literal[0, 1]], "0 or 1 for each layer")

_KINDS: tuple[tuple[Kind, str], ...] = (
    (SIZE, "hidden_size num_attention_heads num_key_value_heads kv_lora_rank q_lora_rank"),
    (SIZES, "num_experts num_local_experts n_routed_experts moe_num_experts moe_intermediate_size intermediate_size"),
    (SIZES, "num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts"),
    (COUNTS, "n_shared_experts num_shared_experts"),
    (SIZE, "n_group num_expert_group topk_group"),
    (FEW, "head_dim attention_head_dim qk_head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim"),
    (VOCABULARY, "vocab_size"),
    (POSITIONS, "max_position_embeddings original_max_position_embeddings"),
    (WINDOW, "sliding_window"),
    (DEPTH, "num_hidden_layers n_layers num_layers"),
    (PERIOD, "decoder_sparse_step global_attn_every_n_layers moe_layer_interval"),
    (PERIOD_OR_LETTERS, "sliding_window_pattern"),
    (LAYER, "first_k_dense_replace max_window_layers moe_layer_start_index num_dense_layers"),
    (LAYERS, "mlp_only_layers"),
    (LAST, "moe_layer_end_index"),
    (FREQUENCY, "moe_layer_freq"),
    (POSITIVE, "rope_theta clip_qkv"),
    (SHARE, "partial_rotary_factor"),
    (EPSILON, "rms_norm_eps router_jitter_noise"),
    (NUMBER, "routed_scaling_factor"),
    (FLAG, "tie_word_embeddings attention_bias mlp_bias use_bias norm_topk_prob moe_renormalize rope_interleave"),
    (FLAG, "use_sliding_window use_qk_norm"),
    (WORD, "model_type hidden_act scoring_func topk_method dtype torch_dtype"),
    (ATTENTION_KINDS, "layer_types"),
    (BLOCK_KINDS, "mlp_layer_types"),
    (WORDS, "layers_block_type architectures"),
    (PATTERN, "hybrid_override_pattern"),
    (MAPPING, "rope_parameters rope_scaling text_config auto_map quantization_config compression_config"),
    (TOKENS, "eos_token_id"),
)

KINDS: Mapping[str, Kind] = {name: kind for kind, names in _KINDS for name in names.split()}
"""What may stand under the keys of several architectures; null always may, and says nothing."""

EVERYWHERE = (
    *("architectures", "auto_map", "dtype", "eos_token_id", "model_type"),
    *("quantization_config", "text_config", "torch_dtype", "vocab_size"),
)
"""The keys that mean the same in every architecture."""

FALSE_FOR_NONE = frozenset({"n_group", "topk_group", "routed_scaling_factor"})
"""Numbers for which published configs (Hunyuan) say false where there is no such thing."""


def check_kinds(config: Mapping[str, Any], kinds: Mapping[str, Kind] = KINDS, names: Collection[str] = ()) -> None:
    """Raise if values of a config are of another kind, sign or range than jaxmoe computes with; all are listed.

    Args:
        config: `config.json`, or an object in it.
        kinds: what may stand under each key.
        names: the keys to look at; all that `kinds` has where there are none given.

    Example:
        >>> check_kinds({"hidden_size": 64, "num_experts_per_tok": -1, "rms_norm_eps": [1e-6]})
        Traceback (most recent call last):
            ...
        jaxmoe.errors.JaxmoeError: config.json: num_experts_per_tok = -1 is not a whole number of 1 to 1,048,576, ...
    """
    problems = []
    for name, value in config.items():
        kind = kinds.get(name) if not names or name in names else None
        if kind is None or value is None or (value is False and name in FALSE_FOR_NONE):
            continue
        try:
            msgspec.convert(value, kind.type)
        except (msgspec.ValidationError, RecursionError):
            problems.append(f"{name} = {brief(value)} is not {kind.words}")
    if problems:
        raise JaxmoeError(f"config.json: {'; '.join(problems)}: mend the file, or fetch it again")


def brief(value: Any) -> str:
    """Return a value for a message, cut where it is long."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):
        # A whole number of more than some thousand digits is not written out.
        text = f"a very large {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def decoder_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a config that describes the decoder: `text_config` in one of several modalities."""
    text = config.get("text_config")
    return text if isinstance(text, Mapping) and "hidden_size" not in config else config


def lookup(config: Mapping[str, Any], keys: str) -> Any:
    """Return the first present value of alternative keys, None if there is none; dots reach into nested objects.

    Example:
        >>> lookup({"ffn_config": {"size": 3}}, "width|ffn_config.size")
        3
    """
    for key in filter(None, keys.split("|")):
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            return value
    return None
