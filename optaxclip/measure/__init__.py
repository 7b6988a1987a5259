"""What is measured: norms, which leaf belongs to which, and what is told about them.

What other packages import, and no more:

* `norms`: `AxisName`, `By`, `L2`, `Norm`
* `groups`: `Blocks`, `Groups`
* `units`: `UnitAxes`, `equinox_unit_axes`, `flax_unit_axes`, `haiku_unit_axes`, `resolve`
* `platforms`: `ACCELERATOR`, `CPU`, `Rates`, `by_rates`, `in_turn`, `rounding_of_products`
* `reductions`: `Sums`
* `mesh`: `check_reduced`
* `statistics`: `ClipStats`, `ExampleStats`, `GroupStats`, `check_same_groups`, `empty_stats`,
  `record`, `record_nothing`, `worst`
"""
