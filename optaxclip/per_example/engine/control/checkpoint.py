"""`jax.checkpoint` with a parameter in it: still a checkpoint, apart from what is recorded."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax

from optaxclip._compat import JaxprEqn, remat_jaxpr
from optaxclip.per_example.engine.program import Block, Found, Users, Values, reach
from optaxclip.per_example.engine.uses import users
from optaxclip.per_example.engine.walk import Records, Taps, Watch, find_forms, run, zero_taps

if TYPE_CHECKING:
    from optaxclip.per_example.engine.flatten import Builder


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """A body without known equations: those go to the block around it."""

    body: Block
    policy: Callable[..., bool] | None
    prevent_cse: bool

    def taps(self, watch: Watch) -> Any:
        """Those of the body."""
        return zero_taps(self.body, watch)

    def run(self, values: Values, taps: Any, watch: Watch) -> Any:
        """The body, to be evaluated again on the way back."""

        def body(taps: Taps) -> tuple[list[Any], Records]:
            return run(self.body, dict(values), taps, watch)

        rerun = jax.checkpoint(body, policy=self.policy, prevent_cse=self.prevent_cse)
        outputs, records = rerun(taps)
        values.update(zip(self.body.outputs, outputs, strict=True))
        return records

    def users(self) -> Users:
        """Those of the body."""
        return users(self.body)

    def reach(self, wanted: set[int]) -> None:
        """Into the body, whose values are those of the block around it."""
        reach(self.body, wanted)

    def forms(self, values: Mapping[int, Any], records: Any, cotangents: Any) -> Found:
        """Those of the body."""
        return find_forms(self.body, values, records, cotangents)


def flatten_checkpoint(builder: "Builder", eqn: JaxprEqn, inputs: list[int]) -> Sequence[int]:
    """Append a checkpoint; the numbers of its outputs."""
    builder.each.append([])
    outputs = builder.inline_body(remat_jaxpr(eqn), inputs, eqn)
    varying = [i for i in dict.fromkeys(outputs) if not builder.is_known(i)]
    block = builder.block((), varying)
    if block.each:
        prevent = eqn.params["prevent_cse"]
        prevent_cse = prevent if isinstance(prevent, bool) else any(prevent)
        builder.append(Checkpoint(block, eqn.params["policy"], prevent_cse))
    return outputs
