"""The quant section of a recipe at work: which layers are packed, the walk over them, and what it holds in
memory.
"""
