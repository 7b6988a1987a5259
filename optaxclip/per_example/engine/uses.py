"""Where each active value meets the example."""

import collections

from optaxclip.per_example.engine.program import Block, Equation, Users


def users(block: Block) -> Users:
    """The uses that each active value reaches, those within control flow included."""
    reached: Users = collections.defaultdict(set)
    for equation in block.each:
        if not isinstance(equation, Equation):
            for number, found in equation.users().items():
                reached[number] |= found
        elif block.is_use(equation):
            for number in block.active & set(equation.inputs):
                reached[number].add(equation)
    for equation in reversed(block.once):
        for number in block.active & set(equation.inputs):
            reached[number].update(*(reached[n] for n in equation.outputs))
    return reached
