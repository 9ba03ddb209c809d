"""Files that a kill cannot leave half written (atomic.py), files that a stranger wrote (regular.py,
jsonfile.py), what a run folder keeps in JSON (records.py), and safetensors headers that are
checked (tensorfile.py).
"""
