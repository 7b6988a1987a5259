"""One file per family of primitives; importing them registers them."""

from optaxclip.per_example.engine.rules import conv as conv
from optaxclip.per_example.engine.rules import dot_general as dot_general
from optaxclip.per_example.engine.rules import elementwise as elementwise
from optaxclip.per_example.engine.rules import gather as gather
