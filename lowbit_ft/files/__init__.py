"""Files that a kill cannot leave half written (atomic.py), and safetensors headers that are checked
(tensorfile.py).
"""
