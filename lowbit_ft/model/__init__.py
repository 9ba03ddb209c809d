"""The model section of a recipe: a checkpoint on disk becomes a model, tensor by tensor, never whole in full
precision.

hub.py tensors.py names.py             the files, their tensors, and which parameter each one makes
checkpoint.py meta.py load.py          the checkpoint, its model without weights, and that model filled
mapped.py walk.py                      pages of files as tensors, and one layer in memory at a time
matrices.py experts.py linear.py       what can be packed, and the layer that holds it
attention.py mlp_chunks.py             what a step of long windows runs instead of the model's own
"""
