"""The table of `at_scale.py` and the documentation's page around it."""

import textwrap
from typing import Any

from _at_scale_grid import MODELS, PLAIN

Row = dict[str, Any]
COLUMNS = (
    "system", "memory a chip", "/ plain", "cycles / plain", "bytes / plain", "collectives / plain",
    "compile",
)  # fmt: skip
HEAD = f"| {' | '.join(COLUMNS)} |\n| --- | {' | '.join(['---:'] * (len(COLUMNS) - 1))} |"

PAGE = """# At scale

What it takes to clip each example's gradient of a large language model on a TPU pod.

**These are the compiler's figures**: `benchmarks/at_scale.py` compiles for chips that are not
there, and no program was run. Parameters are float32 and fully sharded, activations bfloat16 with
sharding constraints; layers are scanned and checkpointed, and so is the loss after them. Each chip
has {tokens} tokens. Memory is temporary memory of one chip. Cycles are the compiler's estimates, a
loop's body counted in each of its trips, without waiting for other chips. Collectives are those in
the text of the program, where a loop's body stands once.

{tables}

* **Whole gradient**: one bound on the norm over all parameters. Norms come out of a first pass
  backward; a second one, from the same pass forward, is the gradient of the loss weighed by them.
* **By layer**: a bound for each layer's part of each leaf (`l2_clip_norm` with an array for a leaf
  stacked over the layers). Each is weighed where it is measured: one pass.
* **By leaf**: a bound for each leaf, over all its layers. Two passes.

An example with NaN counts as zero in all of them. For that a branch, which a run without NaN never
takes, sums again a quarter of the batch at a time; neither its collectives nor its cycles are
counted. "-": not known, since the compiler does not say how often a loop in the program turns.
That of jax-privacy takes one example a chip at a time.

{how}

## What grows, and what does not

On paper, for 1,000 chips and 10^9 examples:

* **With the examples of a batch** grow the norms, weights and losses alone, some numbers each: of
  10^6 examples 4 MB a number, split over the chips as the batch is.
* **With the chips** grows what grows for a plain gradient: weights that are split are gathered for
  the second pass too, which the tables count. (For 1B on 256 chips the compiler gathers oftener
  than that; why is not known.) A norm is taken on the chip that has the example. What is added is
  one boolean, whether all is finite.
* **With the parameters** grows what a plain gradient holds. A parameter with several uses (a tied
  table, a recurrent weight) is the exception: the factors of its uses are held, which for a table
  tied to the logits are [tokens, words]. That is the first limit: untie it, or cut the batch.
* **With the length T of a sequence** the norm for a matrix `I x O` takes `min(T^2 (I + O), T I O)`
  products, so never more than the gradient of the matrix itself.

This page is written by `benchmarks/at_scale.py --markdown`.
"""


def report(versions: dict[str, str], rows: list[Row]) -> str:
    """The tables, one for each model and length."""
    parts = []
    for model, tokens in dict.fromkeys((row["model"], row["tokens"]) for row in rows):
        mine = [r for r in rows if (r["model"], r["tokens"]) == (model, tokens)]
        plain = next((r for r in mine if r["system"] == PLAIN and "error" not in r), None)
        m = MODELS[model]
        title = f"**{model} parameters, {m.chips} chips ({m.kind}), sequences of {tokens}**"
        parts.append("\n".join([title, "", HEAD, *(_line(row, plain) for row in mine)]))
    return "\n\n".join(parts)


def page(versions: dict[str, str], rows: list[Row]) -> str:
    """The documentation's page."""
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    (tokens,) = {model.tokens_a_chip for model in MODELS.values()}
    how = textwrap.fill(f"Compiled with {named}.", 100, break_on_hyphens=False)
    return PAGE.format(tables=report(versions, rows), how=how, tokens=f"{tokens:,}")


def _line(row: Row, plain: Row | None) -> str:
    if "error" in row:
        why = row["error"].strip().splitlines()[-1][:80]
        return f"| {row['system']} | {why} |" + " |" * (len(COLUMNS) - 2)

    def times(key: str) -> str:
        if plain is None or not plain[key]:
            return "-"
        known = key == "temporary" or not row["loops_of_unknown_trips"]
        return f"{row[key] / plain[key]:.2f}x" if known else "-"

    count = sum(row["collectives"].values())
    of_plain = sum(plain["collectives"].values()) if plain is not None else 0
    cells = (
        row["system"], f"{row['temporary'] / 1e9:.2f} GB", times("temporary"), times("cycles"),
        times("bytes"), f"{count} / {of_plain}", f"{row['seconds']:.0f} s",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"
