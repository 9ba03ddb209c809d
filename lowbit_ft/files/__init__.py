"""Files that hold: nothing is left half written, nothing is believed unread, one error for all of it.

atomic.py lock.py                    what a kill cannot leave half written and two processes cannot mix
manifest.py marker.py opened.py      what vouches for a folder; whether it still is the one we opened
regular.py jsonfile.py records.py    files of strangers, read within bounds; the JSON of a run folder
tensorfile.py                        safetensors headers that are checked
errors.py                            every library's file errors as ours, with the path
"""
