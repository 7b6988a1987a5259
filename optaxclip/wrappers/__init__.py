"""Transformations around an optimizer or a clipper; what others import is imported below."""

from optaxclip.wrappers.error_feedback import ErrorFeedbackState as ErrorFeedbackState
from optaxclip.wrappers.error_feedback import error_feedback as error_feedback
from optaxclip.wrappers.guards import LossState as LossState
from optaxclip.wrappers.guards import SkipNonfiniteState as SkipNonfiniteState
from optaxclip.wrappers.guards import SkipOutliersState as SkipOutliersState
from optaxclip.wrappers.guards import raise_if_stuck as raise_if_stuck
from optaxclip.wrappers.guards import skip_nonfinite as skip_nonfinite
from optaxclip.wrappers.guards import skip_outliers as skip_outliers
from optaxclip.wrappers.watched import FirstNonfinite as FirstNonfinite
