"""Gradient clipping for JAX: composable, float32-safe, shard-aware Optax transformations."""

from optaxclip._statistics import ClipStats as ClipStats
from optaxclip._statistics import ExampleStats as ExampleStats
from optaxclip._statistics import GroupStats as GroupStats
from optaxclip.adaptive import adagc as adagc
from optaxclip.adaptive import autoclip as autoclip
from optaxclip.adaptive import clip_by_history as clip_by_history
from optaxclip.adaptive import clip_by_quantile as clip_by_quantile
from optaxclip.adaptive import zclip as zclip
from optaxclip.clipping import ClipState as ClipState
from optaxclip.clipping import clip_by as clip_by
from optaxclip.clipping import clip_stats as clip_stats
from optaxclip.guards import SkipNonfiniteState as SkipNonfiniteState
from optaxclip.guards import SkipOutliersState as SkipOutliersState
from optaxclip.guards import raise_if_stuck as raise_if_stuck
from optaxclip.guards import skip_nonfinite as skip_nonfinite
from optaxclip.guards import skip_outliers as skip_outliers
from optaxclip.losses import phuber_cross_entropy as phuber_cross_entropy
from optaxclip.norms import Norm as Norm
from optaxclip.per_example import centered_clip as centered_clip
from optaxclip.per_example import clip_per_example as clip_per_example
from optaxclip.per_example import clipped_grad as clipped_grad
from optaxclip.per_example import clipped_value_and_grad as clipped_value_and_grad
from optaxclip.per_example import coordinate_median as coordinate_median
from optaxclip.per_example import coordinate_trimmed_mean as coordinate_trimmed_mean
from optaxclip.per_example import example_quantile as example_quantile
from optaxclip.per_example import explain as explain
from optaxclip.per_example import geometric_median as geometric_median
from optaxclip.per_example import per_example_grad as per_example_grad
from optaxclip.per_example import per_example_norms as per_example_norms
from optaxclip.per_example import per_example_value_and_grad as per_example_value_and_grad
from optaxclip.per_example import register_rule as register_rule
from optaxclip.per_example import trim_by_norm as trim_by_norm
from optaxclip.splits import split_by_size as split_by_size
from optaxclip.splits import split_evenly as split_evenly
from optaxclip.strategies import agc as agc
from optaxclip.strategies import clip_by_global_norm as clip_by_global_norm
from optaxclip.strategies import clip_by_group_norm as clip_by_group_norm
from optaxclip.strategies import clip_by_leaf_norm as clip_by_leaf_norm
from optaxclip.strategies import clip_by_leaf_rms as clip_by_leaf_rms
from optaxclip.strategies import clip_by_unit_norm as clip_by_unit_norm
from optaxclip.strategies import clip_by_value as clip_by_value
from optaxclip.strategies import normalize as normalize
from optaxclip.strategies import soft_clip as soft_clip
from optaxclip.unit_axes import flax_unit_axes as flax_unit_axes

__version__ = "0.1.0"
