"""How far the output of a model moves when its input moves."""

from optaxclip.robustness.measures import adversarial_accuracy as adversarial_accuracy
from optaxclip.robustness.measures import input_sensitivity as input_sensitivity
from optaxclip.robustness.measures import noise_accuracy as noise_accuracy
from optaxclip.robustness.searches import SensitivityStats as SensitivityStats
