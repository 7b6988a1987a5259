"""Choosing a threshold."""

from optaxclip.selection.cross_validation import cross_validate as cross_validate
from optaxclip.selection.results import CrossValidation as CrossValidation
from optaxclip.selection.suggestion import suggest_threshold as suggest_threshold
