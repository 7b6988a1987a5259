"""QK-Clip: attention logits bounded by scaling the weights of queries and keys, head by head."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optaxclip._arguments import check_between, check_bound, check_count
from optaxclip._leaves import Tree, leaves_with_path, path_name, place
from optaxclip._numerics import accumulator, maximum_of, scaled
from optaxclip.clipping import ClipState, Transform, check_state
from optaxclip.measure.groups import Groups
from optaxclip.measure.norms import Norm
from optaxclip.measure.statistics import check_same_groups, empty_stats, record
from optaxclip.thresholds.given import params_of

_ALL = slice(None)


@dataclasses.dataclass(frozen=True)
class Heads:
    """Where a parameter of an attention has its heads, and what the dimensions of one are for."""

    axis: int
    """The heads, with the dimensions of one on the next axis: [..., H, d]."""
    merged: bool = False
    """Whether heads and dimensions are one axis, [..., H d, ...]."""
    query: slice | None = None
    """Which dimensions are scaled by `gamma^alpha`."""
    key: slice | None = None
    """Which by `gamma^(1 - alpha)`."""
    rotary_query: slice | None = None
    """Which by gamma: their key, which all heads share, stays as it is."""


HeadsFn = Callable[[str, jax.Array], Heads | None]
"""`(path, leaf) -> Heads`, or None for what is neither query nor key."""


def attention_heads(path: str, leaf: jax.Array) -> Heads | None:
    """The heads of queries and keys, for parameters named as Flax and Equinox name them.

    | parameter | shape | heads |
    | --- | --- | --- |
    | Flax (Linen and NNX) `query/kernel`, `key/kernel` | (d, heads, head_dim) | axis -2 |
    | the same, `bias` | (heads, head_dim) | axis -2 |
    | a dense layer of that name: `kernel` | (d, heads x head_dim) | in axis -1 |
    | Equinox `query_proj/weight`, `q_proj/weight` | (heads x head_dim, d) | in axis -2 |
    | either one's `bias` | (heads x head_dim,) | in axis -1 |

    Args:
      path: the leaf's path, such as `"block/attention/query/kernel"`.
      leaf: the parameter. Layers may be stacked along axes in front.

    Returns:
      The `Heads`, or None.

    Raises:
      ValueError: queries or keys that are normalised after their projection (`normalize_qk=True`),
        whose logits do not depend on the length of the weights.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> optaxclip.attention_heads("attention/key/kernel", jnp.zeros((64, 8, 8)))
      Heads(axis=-2, merged=False, query=None, key=slice(None, None, None), rotary_query=None)
    """
    *_, module, name = ("", *path.split("/"))
    if module in ("query_ln", "key_ln", "q_norm", "k_norm"):
        raise ValueError(
            "queries and keys that are normalised cannot be clipped by their weights, got"
            f" {place(path)}. Leave qk_clip out: normalised logits are bounded already."
        )
    sides = {"query": "query", "query_proj": "query", "q_proj": "query"}
    sides |= {"key": "key", "key_proj": "key", "k_proj": "key"}
    if module not in sides or name not in ("kernel", "weight", "bias"):
        return None
    rows = name == "weight"
    merged = rows or leaf.ndim == (1 if name == "bias" else 2)
    return Heads(-1 if merged and not rows else -2, merged, **{sides[module]: _ALL})


def latent_attention_heads(nope_dim: int) -> HeadsFn:
    """The heads of multi-head latent attention, for parameters named as DeepSeek names them.

    Of `q_proj`, `q_b_proj`, `wq` and `wq_b` the first `nope_dim` dimensions of a head meet those of
    `kv_b_proj` and `wkv_b`: `W_q *= gamma^alpha`, `W_k *= gamma^(1 - alpha)`. The rest of the query
    meets a rotary key that all heads share: `W_q *= gamma`. Values and that key stay.

    Args:
      nope_dim: `qk_nope_head_dim`, 128 in DeepSeek-V3 and Kimi K2.

    Returns:
      A function for `heads=` of `qk_clip`. A `kernel` is (rank, heads, head_dim) and a `weight`
      (heads x head_dim, rank).

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> heads = optaxclip.latent_attention_heads(128)
      >>> heads("attention/kv_b_proj/weight", jnp.zeros((8 * 256, 512))).key
      slice(None, 128, None)
    """
    check_count(nope_dim, "nope_dim")

    def heads(path: str, leaf: jax.Array) -> Heads | None:
        *_, module, name = ("", *path.split("/"))
        if name not in ("kernel", "weight"):
            return None
        merged = name == "weight"
        if module in ("q_proj", "q_b_proj", "wq", "wq_b"):
            return Heads(-2, merged, slice(nope_dim), rotary_query=slice(nope_dim, None))
        known = module in ("kv_b_proj", "wkv_b")
        return Heads(-2, merged, key=slice(nope_dim)) if known else None

    return heads


def qk_clip(
    tau: Any = 100.0,
    *,
    alpha: Any = 0.5,
    heads: HeadsFn = attention_heads,
    name: str | None = None,
) -> Transform:
    """Scales the queries and keys of each head whose attention logits exceed tau.

    With S_h the largest logit of head h in this step, `gamma = min(1, tau / S_h)`:
    `W_q *= gamma^alpha`, `W_k *= gamma^(1 - alpha)`, after the update. So that head's logits are
    multiplied by gamma. Query heads that share a key share the gamma of the largest.

    Args:
      tau: > 0: a number, a traced scalar or a schedule. The paper's is 100.
      alpha: in [0, 1]: 1 scales the queries alone, 0 the keys.
      heads: which parameters make queries and keys: `attention_heads`, by the names of Flax and
        Equinox, `latent_attention_heads(nope_dim)`, or a function `(path, leaf) -> Heads`.
      name: for `clip_stats`, default `"qk_clip"`.

    Returns:
      A gradient transformation, to be chained last, for it scales `params + updates`. Its `update`
      needs `params` and `max_logits=`, the largest logits before the softmax, scaled and masked as
      they go into it: a dict from the path of each attention to an array [H], or a tree like it;
      [L, H] where L layers are stacked. Statistics are about the largest logit of each attention.

    Raises:
      ValueError: tau <= 0 or NaN; params or max_logits missing; an attention without logits, logits
        without an attention; numbers of heads that do not fit.

    Edge cases:
      | S_h <= tau, also negative | the head's updates are bit for bit what came in |
      | S_h NaN or infinite | nothing is known of the head, which stays; the step is counted |
      | biases of queries and keys | are scaled like the weights |
      | inside `jax.shard_map` | take the maximum over the devices first, `jax.lax.pmax` |

    Example:
      >>> import jax.numpy as jnp, optax, optaxclip
      >>> params = {name: {"kernel": jnp.ones((2, 1, 3))} for name in ("query", "key")}
      >>> tx = optax.chain(optax.sgd(0.1), optaxclip.qk_clip(100.0))
      >>> zeros = optax.tree.zeros_like(params)
      >>> logits = {"": jnp.array([400.0])}
      >>> updates, _ = tx.update(zeros, tx.init(params), params, max_logits=logits)
      >>> print(optax.apply_updates(params, updates)["query"]["kernel"][0])
      [[0.5 0.5 0.5]]

    Source: Kimi K2, arXiv 2507.20534, section 2.1, algorithm 1; different: docs/guide/sources.md.
    """
    _check(tau, alpha)
    norm = Norm("leaf")

    def init_fn(params: Tree) -> ClipState:
        groups = _groups(_attentions(params, heads))
        return ClipState(name or "qk_clip", empty_stats(norm, groups), ())

    def update_fn(
        updates: Tree,
        state: ClipState,
        params: Tree | None = None,
        *,
        max_logits: Tree | None = None,
        **extra_args: Any,
    ) -> tuple[Tree, ClipState]:
        del extra_args
        check_state(state)
        if max_logits is None:
            raise ValueError(
                "qk_clip needs the attention logits, got no max_logits. Call tx.update(grads,"
                " state, params, max_logits={path of the attention: the largest of each head})."
            )
        leaves = norm.leaves(updates)
        weights = dict(params_of(leaves, params, norm).named)
        bound = jnp.asarray(tau(state.stats.count) if callable(tau) else tau).astype(jnp.float32)
        own = _attentions(updates, heads)
        groups = _groups(own)
        check_same_groups(state.stats, groups)
        logits = _logits(max_logits, own)
        factors = _factors(own, logits, bound, alpha)

        def one(path: str, u: jax.Array) -> jax.Array:
            if path not in factors:
                return u
            w, wide = weights[path], accumulator(u.dtype)
            # Split as u is: on a mesh with explicit axes `where` takes nothing else.
            factor = factors[path].astype(wide) * jnp.ones_like(u, wide)
            new = u.astype(wide) * factor + w.astype(wide) * (factor - 1)
            return jnp.where(factor == 1, u, new.astype(u.dtype))

        norms = jnp.stack([maximum_of(jnp.maximum(x, 0.0)) for x in logits.values()])
        stats = record(state.stats, groups, [norms], [bound], _answer)
        return leaves.replace(leaves.map(one)), ClipState(state.name, stats, ())

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def qk_clip_params(
    params: Tree,
    max_logits: Tree,
    tau: Any = 100.0,
    *,
    alpha: Any = 0.5,
    heads: HeadsFn = attention_heads,
) -> Tree:
    """The parameters, queries and keys scaled down in each head whose logits exceed tau.

    What `qk_clip` does, for a training loop that keeps it out of its optimizer: call it on the
    parameters after the update.

    Args:
      params: of the model, or a whole Equinox model; what is neither query nor key stays.
      max_logits, tau, alpha, heads: as in `qk_clip`; tau is no schedule.

    Returns:
      The parameters, in their dtypes.

    Raises:
      ValueError: as in `qk_clip`.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> params = {name: {"bias": jnp.ones((2, 1))} for name in ("query", "key")}
      >>> logits = {"": jnp.array([400.0, 50.0])}
      >>> print(optaxclip.qk_clip_params(params, logits)["key"]["bias"].T)
      [[0.5 1. ]]

    Source: as `qk_clip`.
    """
    _check(tau, alpha, schedule=False)
    own = _attentions(params, heads)
    factors = _factors(own, _logits(max_logits, own), jnp.asarray(tau).astype(jnp.float32), alpha)

    found = leaves_with_path(params)
    new = [scaled(w, factors[p]) if (p := path_name(k)) in factors else w for k, w in found]
    return jax.tree.unflatten(jax.tree.structure(params), new)


_Attention = dict[str, tuple[Heads, Any]]
"""By path, what makes queries and keys."""


def _check(tau: Any, alpha: Any, *, schedule: bool = True) -> None:
    check_bound(tau, "tau", schedule=schedule)
    if not callable(tau) and not isinstance(tau, jax.Array) and float(tau) == 0:
        raise ValueError("tau must be > 0, got 0, which would make weights zero. Pass 100.")
    check_between(alpha, "alpha", 0, 1)


def _attentions(tree: Tree, heads: HeadsFn) -> dict[str, _Attention]:
    """By the path of an attention, its queries and keys."""
    found: dict[str, _Attention] = {}
    for key_path, leaf in leaves_with_path(tree):
        path = path_name(key_path)
        of_leaf = heads(path, leaf) if hasattr(leaf, "dtype") and jnp.ndim(leaf) else None
        if of_leaf is not None:
            home = "/".join(path.split("/")[:-2])
            found.setdefault(home, {})[path] = (of_leaf, leaf)
    if not found:
        raise ValueError(
            "qk_clip needs queries and keys, got a tree without. Pass heads=, a function (path,"
            " leaf) -> Heads that knows their names."
        )
    for home, own in found.items():
        sides = {side for h, _ in own.values() for side in ("query", "key") if getattr(h, side)}
        if len(sides) < 2:
            raise ValueError(
                f"an attention must have queries and keys, got only {', '.join(own)} at"
                f" {place(home)}. Pass heads=, a function (path, leaf) -> Heads that knows both."
            )
    return found


def _groups(own: Mapping[str, _Attention]) -> Groups:
    return Groups(tuple(own), tuple(range(len(own))), ((),) * len(own), ((),) * len(own))


def _logits(max_logits: Tree, own: Mapping[str, _Attention]) -> dict[str, jax.Array]:
    """By attention, in float32."""
    given = {path_name(key_path): x for key_path, x in leaves_with_path(max_logits)}
    if given.keys() != own.keys():
        odd = sorted(given.keys() ^ own.keys())
        raise ValueError(
            f"max_logits must have one entry for each attention, got {place(odd[0])} in only one of"
            f" the two. The attentions are at {', '.join(map(place, own))}."
        )
    return {home: jax.lax.stop_gradient(jnp.asarray(given[home], jnp.float32)) for home in own}


def _answer(norm: jax.Array, bound: jax.Array) -> tuple[jax.Array, jax.Array]:
    gamma = _gamma(norm, bound)
    return gamma, norm * gamma


def _gamma(logit: jax.Array, tau: jax.Array) -> jax.Array:
    beyond = (logit > tau) & (logit < jnp.inf)
    return jnp.where(beyond, jnp.maximum(tau, 0.0) / jnp.where(beyond, logit, 1.0), 1.0)


def _factors(
    own: Mapping[str, _Attention], logits: Mapping[str, jax.Array], tau: jax.Array, alpha: Any
) -> dict[str, jax.Array]:
    """By path, what a parameter is multiplied by; it broadcasts to it."""
    factors = {}
    for home, leaves in own.items():
        found = jnp.atleast_1d(logits[home])
        counts = {path: _count(path, leaves, found.shape[-1]) for path in leaves}
        of_keys = min(counts.values())
        if any(count % of_keys for count in counts.values()):
            raise ValueError(
                f"query heads must be a multiple of key heads, got {sorted(set(counts.values()))}"
                f" at {place(home)}. Pass heads= that says where they are."
            )
        groups = found.reshape(*found.shape[:-1], of_keys, found.shape[-1] // of_keys)
        gamma = _gamma(jnp.max(groups, axis=-1), tau)
        for path, (heads, leaf) in leaves.items():
            of_leaf = jnp.repeat(gamma, counts[path] // of_keys, axis=-1)
            factors[path] = _factor(path, heads, leaf, of_leaf, alpha)
    return factors


def _count(path: str, leaves: _Attention, number: int) -> int:
    """How many heads a parameter has; `number` are the logits."""
    heads, leaf = leaves[path]
    size = leaf.shape[heads.axis]
    if not heads.merged:
        count, fits = size, heads.query is None or size == number
    elif heads.query is None and heads.key == _ALL:
        # A head of the keys is as long as one of the queries.
        query = next(x.shape[h.axis] for h, x in leaves.values() if h.query is not None)
        count, fits = number * size // query, number * size % query == 0
    else:
        count, fits = number, size % number == 0
    if not fits or count < 1:
        raise ValueError(
            f"logits must be one for each query head, got {number} for {place(path)} of shape"
            f" {leaf.shape}. Pass an array [heads], or [layers, heads] of stacked layers."
        )
    return count


def _factor(path: str, heads: Heads, leaf: Any, gamma: jax.Array, alpha: Any) -> jax.Array:
    """`gamma ** power`, [*layers, heads, dimensions], in the shape that broadcasts to the leaf."""
    *layers, count = gamma.shape
    at = heads.axis % leaf.ndim
    if list(leaf.shape[: len(layers)]) != layers or at < len(layers):
        raise ValueError(
            f"logits [layers, heads] go with layers stacked in front, got {gamma.shape} for"
            f" {place(path)} of shape {leaf.shape}. Pass an array [heads] for a single layer."
        )
    dim = leaf.shape[at] // count if heads.merged else leaf.shape[at + 1]
    for which in (heads.query, heads.key, heads.rotary_query):
        if which is not None and max(which.start or 0, which.stop or 0) > dim:
            raise ValueError(
                f"the parts of a head must lie within it, got {which} of {dim} dimensions at"
                f" {place(path)}. Pass the dimensions without position, qk_nope_head_dim."
            )
    share = jnp.asarray(alpha).astype(jnp.float32)
    powers = {"query": share, "key": 1 - share, "rotary_query": jnp.ones(())}
    power = jnp.zeros(dim, jnp.float32)
    for part, value in powers.items():
        if getattr(heads, part) is not None:
            power = power.at[getattr(heads, part)].set(value)
    shape = [*layers, *[1] * (leaf.ndim - len(layers))]
    shape[at] = count * dim if heads.merged else count
    if not heads.merged:
        shape[at + 1] = dim
    return (gamma[..., None] ** power).reshape(shape)
