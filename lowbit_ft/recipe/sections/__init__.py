"""The sections of a recipe, a file each: the keys with their types, bounds and defaults, and beside them the
checks of what they mean for the other sections, for the checkpoint on disk and for this machine.

The descriptions of the keys are their documentation: error messages and the JSON Schema quote them. The order
in which the checks run is the table in check.py. `adapter` has no class here: its keys are those of its
method (lowbit_ft/adapters). No section loads anything: config.json, safetensors headers and file names are
all that is read.
"""
