"""The sections of a recipe, a file each: the keys, and the checks of what they mean for everything else.

A key has its type, its bounds and its default; the checks beside it look at other sections, the checkpoint
on disk and this machine.

The descriptions of the keys are their documentation: error messages and the JSON Schema quote them. The order
in which the checks run is the table in check.py. `adapter` has no class here: its keys are those of its
method (lowbit_ft/adapters). No section loads anything: config.json, safetensors headers and file names are
all that is read.
"""
