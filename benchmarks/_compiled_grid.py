"""The cases of `compiled.py`, by name, for the processes that compile and the one that does not."""

# What is compiled for: the extra of jax that has its compiler.
KINDS = {"v5e": "tpu", "v6e": "tpu", "h100": "cuda12"}
# name: Optax's counterpart, what takes as many norms, or the same ones.
COUNTERPARTS = {
    "value": "clip",
    "global": "clip_by_global_norm",
    "leaf": "clip_by_block_rms",
    "rms": "clip_by_block_rms",
    "unit": "adaptive_grad_clip",
    "agc": "adaptive_grad_clip",
    "clippy": "adaptive_grad_clip",
    "soft": "clip_by_global_norm",
    "zclip": "clip_by_global_norm",
    "adagc": "clip_by_block_rms",
    "history": "clip_by_global_norm",
    "quantile": "clip_by_global_norm",
    "autoclip": "clip_by_global_norm",
    "stabilizer": "clip_by_block_rms",
    "adaclip": "clip_by_block_rms",
    "spam": None,
}
ALONE = "adam"


def _language_model() -> dict[str, tuple[int, ...]]:
    width, inner, keys, layers, words = 2048, 5632, 512, 20, 32_000
    block = {"q": (width, width), "k": (width, keys), "v": (width, keys), "o": (width, width)}
    block |= {"gate": (width, inner), "up": (width, inner), "down": (inner, width)}
    block |= {"norm_1": (width,), "norm_2": (width,)}
    named = {f"{i:02}/{name}": shape for i in range(layers) for name, shape in block.items()}
    return named | {"embed": (words, width), "norm": (width,)}


# name: (shapes, dtype of gradients). Parameters and moments are float32.
TREES: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "25x1024": ({f"w{i:02}": (1024, 1024) for i in range(25)}, "float32"),
    "300x256": ({f"w{i:03}": (256, 256) for i in range(300)}, "float32"),
    "lm": (_language_model(), "bfloat16"),
}
# name: a function of `_models.py`, and its arguments.
MODELS = {
    "MLP B=1024": ("mlp", (1024, 2048)),
    "LM B=16 T=256": ("lm", (16, 256)),
    "CNN B=64": ("cnn", (64, (64, 128, 256))),
    "LSTM B=128 T=64": ("lstm", (128, 64, 256)),
}
PLAIN = "plain"
METHODS = ("auto", "one_pass", "two_pass", "vmap")
MESHES = {"4x4": (4, 4), "16x16": (16, 16)}
LAYOUTS = ("jit", "explicit", "shard_map")


def names(clippers: list[str]) -> list[str]:
    """Adam alone, Optax's counterparts, each once, and ours."""
    theirs = dict.fromkeys(f"optax {x}" for x in map(COUNTERPARTS.get, clippers) if x)
    return [ALONE, *theirs, *(f"optaxclip {c}" for c in clippers)]
