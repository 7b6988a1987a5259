"""Per-example gradients as data: norms, products and weighted sums without storing them.

Public functions: `gradients` (`per_example_grad` and its like), `reweighted`
(`reweighted_grad`), `clipped_grad`, `clipped_fun`, `plan` (`explain`, with `table`) and `agreement`
(`check_per_example`); `fallbacks` says what had to be stacked. Packages, from the top down; each
imports only from those below:

* `aggregators`: from per-example gradients to one update. `clip`, `robust` and its `batch`,
  `quantile`, `moments`, `statistics`; `noise_scale` watches.
* `schedules`: which way to a weighted sum, and its cost. `choice` by `costs` and `flops`; `weighed`
  sums, `factored` sees through the loss; `clipped_sum`, `microbatches`.
* `engine`: the loss of one example as a program. `arguments` and `checks` make it a function of
  parameters and example; `flatten` makes nested blocks of equations of it (`program`, `lookups`,
  and `control` for loops, branches and checkpoints, with `partial`, `lift`, `uses`) as far as
  `assumptions` hold. `backward` runs them, and measures on the spot what is used once (`spots`); of
  the rest it keeps forms. `walk` goes forward with taps and back to forms, by the `rules` of the
  `registry` and, through code on parameters alone, by `pullback`, `isometries`, `factor_maps`.
* `forms`: gradients as data. `forms` on `layout` and `contractions`, `cancellation` and
  `safe_norms`; `trees` and `incoming` are trees of them; `explicit_axes` for meshes that ask.
"""

from optaxclip.per_example.aggregators.clip import clip_per_example as clip_per_example
from optaxclip.per_example.aggregators.moments import second_moment as second_moment
from optaxclip.per_example.aggregators.noise_scale import NoiseState as NoiseState
from optaxclip.per_example.aggregators.noise_scale import NoiseTerms as NoiseTerms
from optaxclip.per_example.aggregators.noise_scale import watch_noise_scale as watch_noise_scale
from optaxclip.per_example.aggregators.quantile import example_quantile as example_quantile
from optaxclip.per_example.aggregators.robust import centered_clip as centered_clip
from optaxclip.per_example.aggregators.robust import coordinate_median as coordinate_median
from optaxclip.per_example.aggregators.robust import (
    coordinate_trimmed_mean as coordinate_trimmed_mean,
)
from optaxclip.per_example.aggregators.robust import geometric_median as geometric_median
from optaxclip.per_example.aggregators.robust import trim_by_norm as trim_by_norm
from optaxclip.per_example.clipped_fun import clipped_fun as clipped_fun
from optaxclip.per_example.clipped_grad import AuxiliaryOutput as AuxiliaryOutput
from optaxclip.per_example.clipped_grad import (
    BoundedSensitivityCallable as BoundedSensitivityCallable,
)
from optaxclip.per_example.clipped_grad import clipped_grad as clipped_grad
from optaxclip.per_example.clipped_grad import clipped_value_and_grad as clipped_value_and_grad
from optaxclip.per_example.engine.registry import RuleContext as RuleContext
from optaxclip.per_example.engine.registry import register_rule as register_rule
from optaxclip.per_example.forms.forms import Dense as Dense
from optaxclip.per_example.forms.forms import Form as Form
from optaxclip.per_example.forms.forms import Gathered as Gathered
from optaxclip.per_example.forms.forms import Outer as Outer
from optaxclip.per_example.forms.forms import Sum as Sum
from optaxclip.per_example.forms.trees import inner as inner
from optaxclip.per_example.forms.trees import masked as masked
from optaxclip.per_example.forms.trees import materialize as materialize
from optaxclip.per_example.forms.trees import norms as norms
from optaxclip.per_example.forms.trees import sq_norms as sq_norms
from optaxclip.per_example.forms.trees import weighted_sum as weighted_sum
from optaxclip.per_example.gradients import per_example_grad as per_example_grad
from optaxclip.per_example.gradients import per_example_norms as per_example_norms
from optaxclip.per_example.gradients import per_example_value_and_grad as per_example_value_and_grad
from optaxclip.per_example.plan import Plan as Plan
from optaxclip.per_example.plan import explain as explain
from optaxclip.per_example.reweighted import Reweighted as Reweighted
from optaxclip.per_example.reweighted import reweighted_grad as reweighted_grad
