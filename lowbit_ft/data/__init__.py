"""The data section of a recipe: files and hub data sets to rows, rows to tokens, tokens to windows, windows
to batches.

read.py     files and hub data sets, row by row
format.py   rows to text, and the spans that carry loss
chat.py     chat templates
pack.py     several rows per window
windows.py  what a window is
examples.py the windows of a source, and their report
batches.py  batches in a fixed, resumable order
"""
