"""The model section of a recipe: a checkpoint on disk becomes a model, tensor by tensor, never whole in full
precision.

hub.py names.py load.py mapped.py      files to tensors            walk.py   one layer in memory at a time
matrices.py experts.py linear.py       what can be packed, and the layer that holds it
attention.py mlp_chunks.py             what a step of long windows runs instead of the model's own
"""
