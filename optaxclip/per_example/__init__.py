"""Per-example gradients as data: norms, products and weighted sums without storing them.

From the top down: the doors (`gradients`, `schedules`, `plan`) check arguments (`arguments`,
`checks`, `fallbacks`), estimate costs (`costs`, `flops`, `table`) and choose a schedule (`choice`),
by which `weighed` sums. `flatten` makes nested blocks of equations of the loss (`program`; `scan`,
`branches` and `checkpoint` for control flow, with `partial`, `lift`, `uses`). `backward` runs them,
and measures on the spot what is used once (`spots`); of the rest it keeps forms. `walk` goes
through them forward with taps and back to forms, by the rules of the `registry` and, through code on
parameters alone, by `pullback` and `isometries`. `forms` are the gradients; `layout` and
`contractions` are what they stand on, `trees` and `safe_norms` sum over them.

On top of that stand the aggregators (`aggregators`, `robust`; `batch` is what the robust ones
share, `incoming` checks what they are given, `statistics` is what they keep, `quantile` is a
threshold for them), the function transformation `clipped_grad` (`clipped_sum` does its work), and
`moments`. `microbatches` is the loop over parts of a batch.
"""

from optaxclip.per_example.aggregators import clip_per_example as clip_per_example
from optaxclip.per_example.clipped_grad import AuxiliaryOutput as AuxiliaryOutput
from optaxclip.per_example.clipped_grad import (
    BoundedSensitivityCallable as BoundedSensitivityCallable,
)
from optaxclip.per_example.clipped_grad import clipped_grad as clipped_grad
from optaxclip.per_example.clipped_grad import clipped_value_and_grad as clipped_value_and_grad
from optaxclip.per_example.forms import Dense as Dense
from optaxclip.per_example.forms import Form as Form
from optaxclip.per_example.forms import Gathered as Gathered
from optaxclip.per_example.forms import Outer as Outer
from optaxclip.per_example.forms import Sum as Sum
from optaxclip.per_example.gradients import per_example_grad as per_example_grad
from optaxclip.per_example.gradients import per_example_norms as per_example_norms
from optaxclip.per_example.gradients import per_example_value_and_grad as per_example_value_and_grad
from optaxclip.per_example.moments import second_moment as second_moment
from optaxclip.per_example.plan import Plan as Plan
from optaxclip.per_example.plan import explain as explain
from optaxclip.per_example.quantile import example_quantile as example_quantile
from optaxclip.per_example.registry import RuleContext as RuleContext
from optaxclip.per_example.registry import register_rule as register_rule
from optaxclip.per_example.robust import centered_clip as centered_clip
from optaxclip.per_example.robust import coordinate_median as coordinate_median
from optaxclip.per_example.robust import coordinate_trimmed_mean as coordinate_trimmed_mean
from optaxclip.per_example.robust import geometric_median as geometric_median
from optaxclip.per_example.robust import trim_by_norm as trim_by_norm
from optaxclip.per_example.schedules import Reweighted as Reweighted
from optaxclip.per_example.schedules import reweighted_grad as reweighted_grad
from optaxclip.per_example.trees import inner as inner
from optaxclip.per_example.trees import masked as masked
from optaxclip.per_example.trees import materialize as materialize
from optaxclip.per_example.trees import norms as norms
from optaxclip.per_example.trees import sq_norms as sq_norms
from optaxclip.per_example.trees import weighted_sum as weighted_sum
