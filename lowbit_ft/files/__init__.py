"""Files that a kill cannot leave half written and two processes cannot mix (atomic.py, lock.py), manifests
that vouch for them (manifest.py, marker.py, opened.py), one error for it all (errors.py), files that a
stranger wrote (regular.py, jsonfile.py), what a run folder keeps in JSON (records.py), and safetensors files
that are checked (tensorfile.py).
"""
