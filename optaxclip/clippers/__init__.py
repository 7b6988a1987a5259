"""The named clippers: a few lines each over `clip_by`."""
