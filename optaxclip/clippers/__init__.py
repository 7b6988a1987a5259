"""The named clippers: a few lines each over `clip_by`.

What other packages import, and no more:

* `given`: `agc`, `clip_by_global_norm`, `clip_by_group_norm`, `clip_by_leaf_norm`,
  `clip_by_leaf_rms`, `clip_by_unit_norm`, `clip_by_value`, `clippy`, `normalize`, `soft_clip`
* `learned`: `adagc`, `autoclip`, `clip_by_history`, `clip_by_quantile`, `gradient_stabilizer`,
  `zclip`
* `elements`: `adaclip`, `spam_clip`
* `singular_values`: `clip_singular_values`
* `attention`: `attention_heads`, `latent_attention_heads`, `qk_clip`, `qk_clip_params`
"""
