"""The cases of `at_scale.py`, by name, for the process that compiles and the one that does not."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder with layers of one size, and the chips that hold it."""

    width: int
    layers: int
    heads: int
    chips: int
    kind: str = "v5e"
    words: int = 32_000
    tokens_a_chip: int = 4096

    def sequences(self, tokens: int) -> int:
        """How many sequences a chip has."""
        return max(1, self.tokens_a_chip // tokens)


MODELS = {
    "134M": Model(768, 12, 12, 16),
    "1B": Model(2048, 18, 16, 256),
    "7B": Model(4096, 32, 32, 256, "v6e"),
}
TOKENS = (1024, 4096)
PLAIN = "plain gradient"
SYSTEMS = (
    PLAIN, "optaxclip, whole gradient", "optaxclip, by layer", "optaxclip, by leaf",
    "jax-privacy, one example a chip",
)  # fmt: skip
