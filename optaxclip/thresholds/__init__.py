"""Where a bound comes from: given, learned from past norms, of elements, or split among groups.

For users is what is imported below. What other packages import besides, and no more:

* `given`: `as_threshold`, `non_negative`, `params_of`
* `learned`: `AtMost`, `RelearnAfter`, `relearn_after_of`
* `rules`: `MeanOverRoot`, `Mode`, `MovingMean`, `Percentile`, `Quantile`, `Ratio`, `WindowMoments`,
  `ZScore`
* `elements`: `SecondMoments`, `Shares`
"""

from optaxclip.thresholds.given import Context as Context
from optaxclip.thresholds.given import ElementBounds as ElementBounds
from optaxclip.thresholds.given import ElementThreshold as ElementThreshold
from optaxclip.thresholds.given import Given as Given
from optaxclip.thresholds.given import LargestBut as LargestBut
from optaxclip.thresholds.given import ParamElements as ParamElements
from optaxclip.thresholds.given import ParamNorm as ParamNorm
from optaxclip.thresholds.given import Passed as Passed
from optaxclip.thresholds.given import Threshold as Threshold
from optaxclip.thresholds.learned import Learned as Learned
from optaxclip.thresholds.learned import LearnedState as LearnedState
from optaxclip.thresholds.learned import Rule as Rule
from optaxclip.thresholds.outliers import as_published as as_published
from optaxclip.thresholds.outliers import mean_plus_std as mean_plus_std
from optaxclip.thresholds.outliers import mean_plus_std_of_values as mean_plus_std_of_values
from optaxclip.thresholds.outliers import multiple_of_quantile as multiple_of_quantile
from optaxclip.thresholds.splits import split_by_size as split_by_size
from optaxclip.thresholds.splits import split_evenly as split_evenly
