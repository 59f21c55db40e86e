"""What a decoder computes, as plain records: sizes and rules, no weights and no names.

Everything is frozen and hashable, so that a spec can be a static argument of a jitted function: layers of equal spec
share one compiled program. `jaxmoe.checkpoint.families` builds the records from a checkpoint's config.
"""

from dataclasses import dataclass

from jaxmoe.factors import LayerShape


@dataclass(frozen=True, kw_only=True)
class Norm:
    """A normalisation of the last axis: "rms", or "layer" (with mean and bias)."""

    kind: str = "rms"
    epsilon: float = 1e-6
    bias: bool = False


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotary position embedding of the first `2 * len(frequencies)` numbers of a head.

    Args:
        frequencies: radians per position of each pair.
        scale: factor of cosine and sine (YaRN's attention factor).
        interleaved: whether neighbours form a pair, instead of the two halves.
        longest: number of positions up to which `frequencies` hold; None for any.
        long_frequencies: what holds beyond `longest` (LongRoPE); empty if nothing does.
        long_scale: the factor beyond `longest`.
    """

    frequencies: tuple[float, ...]
    scale: float = 1.0
    interleaved: bool = False
    longest: int | None = None
    long_frequencies: tuple[float, ...] = ()
    long_scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Causal attention with grouped heads.

    Args:
        heads: query heads.
        kv_heads: key and value heads, a divisor of `heads`.
        head: numbers of a query or key head.
        value: numbers of a value head.
        rotary: position embedding, None without any.
        scale: of the scores.
        window: tokens that a token sees, itself included; None for all before it.
        norm: of queries and keys, None without.
        norm_over: "head", or "all" heads together.
        norm_after_rotary: whether it follows the position embedding.
        bias: of the query, key and value projections.
        output_bias: of the output projection.
        sinks: whether each head has a learned score that takes probability and adds nothing.
        clip: bound of queries, keys and values, None without.
        value_scale: factor of the values.
        gated: whether a sigmoid of the token scales what goes into the output projection, number by number.
    """

    heads: int
    kv_heads: int
    head: int
    value: int
    rotary: Rotary | None
    scale: float
    window: int | None = None
    norm: Norm | None = None
    norm_over: str = "head"
    norm_after_rotary: bool = False
    bias: bool = False
    output_bias: bool = False
    sinks: bool = False
    clip: float | None = None
    value_scale: float = 1.0
    gated: bool = False


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2): keys and values from one small vector per token.

    Args:
        heads: all have their own keys and values.
        query_rank: of the compressed queries, None if they are not compressed.
        kv_rank: of the compressed keys and values.
        plain: numbers of a head's query and key without position.
        rotated: numbers with position, shared by all heads' keys.
        value: numbers of a value head.
        rotary: position embedding of the rotated part.
        scale: of the scores.
        norm: of the compressed vectors.
        bias: of the projections into the compressed vectors and of the output.
    """

    heads: int
    query_rank: int | None
    kv_rank: int
    plain: int
    rotated: int
    value: int
    rotary: Rotary
    scale: float
    norm: Norm
    bias: bool = False


@dataclass(frozen=True, kw_only=True)
class Router:
    """Which experts a token goes to, and with what weights; see `routing.route` for the order of operations.

    Args:
        experts: routed experts.
        top_k: experts per token.
        score: "softmax", "sigmoid", "chosen" (softmax over the chosen logits alone) or "sparse_mixer".
        bias: whether the logits have a bias.
        selection_bias: whether a bias is added for the choice, but not to the weights.
        groups: of experts, of which only `kept_groups` can be chosen from.
        group_score: "max" (what is left out counts 0) or "top2" (the sum of the two best; the rest counts -inf).
        kept_groups: groups that stay.
        normalize: whether the weights are divided by their sum.
        epsilon: added to that sum.
        floor: least value of that sum.
        scale: factor of the weights.
        jitter: width of the sparse mixer's mask.
    """

    experts: int
    top_k: int
    score: str = "softmax"
    bias: bool = False
    selection_bias: bool = False
    groups: int = 1
    group_score: str = "max"
    kept_groups: int = 1
    normalize: bool = False
    epsilon: float = 0.0
    floor: float = 0.0
    scale: float = 1.0
    jitter: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Gate:
    """How gate and up make the intermediate activations: activation(gate) * up.

    With `limit`, gate is bounded above and up on both sides; "swish" is gate * sigmoid(alpha gate); `offset` is added
    to up (gpt-oss has 7, 1.702 and 1).
    """

    activation: str = "silu"
    limit: float | None = None
    alpha: float = 1.0
    offset: float = 0.0


@dataclass(frozen=True, kw_only=True)
class DenseBlock:
    """A feed-forward network that all tokens use."""

    intermediate: int
    gate: Gate = Gate()
    bias: bool = False


@dataclass(frozen=True, kw_only=True)
class ExpertBlock:
    """A Mixture-of-Experts block.

    Args:
        shape: of the routed experts.
        router: of the tokens.
        gate: of the routed and the shared experts.
        bias: whether the routed experts have biases.
        shared: what all tokens use beside the routed experts, None for nothing.
        shared_gate: whether a sigmoid of the token scales that.
        scale: factor of what routed and shared experts give together.
        main: how many of a token's experts run, those with the largest weights; vectors compensate for the others
            (`compressed_experts.py`). None runs all.
        renorm: "main" scales the weights of those that run to the sum of all, "none" leaves them.
    """

    shape: LayerShape
    router: Router
    gate: Gate = Gate()
    bias: bool = False
    shared: DenseBlock | None = None
    shared_gate: bool = False
    scale: float = 1.0
    main: int | None = None
    renorm: str = "none"

    @property
    def running(self) -> int:
        """Experts that run for every token."""
        return self.router.top_k if self.main is None else self.main


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One decoder layer: attention, then the feed-forward block, each added to what came in.

    `before` and `after` say whether the normalisations stand before the blocks or behind them; `multiplier` scales
    what a block adds. With `parallel`, both blocks read the same normalised input, and there is one normalisation.
    """

    hidden: int
    attention: Attention | LatentAttention
    feed_forward: DenseBlock | ExpertBlock
    norm: Norm
    before: bool = True
    after: bool = False
    multiplier: float = 1.0
    parallel: bool = False


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """A decoder: embedding, layers, normalisation, head.

    Args:
        vocabulary: rows of the embedding.
        hidden: hidden size.
        layers: in order.
        norm: the last normalisation.
        embedding_scale: factor of the embeddings.
        logit_scale: factor of the logits.
        tied: whether the head is the embedding.
        head_bias: whether the head has a bias.
        head_norm: whether the head's columns, one per hidden number, are divided by their lengths (Ling).
    """

    vocabulary: int
    hidden: int
    layers: tuple[LayerSpec, ...]
    norm: Norm
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    tied: bool = False
    head_bias: bool = False
    head_norm: bool = False
