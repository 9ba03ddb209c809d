"""The data section of a recipe: files and hub data sets to rows, rows to tokens, tokens to windows, windows
to batches.

splits.py   the files of a path and a split
read.py     files and hub data sets, row by row
formats/    rows to text, and the spans that carry loss
columns.py  what is read of a row beside its format's columns, and what is not read
messages.py a row to a chat, whatever its layout
chat.py     chat templates
audit.py    what of a chat its template did not write
mix.py      one order of the rows of several sources
pack.py     several rows per window
windows.py  what a window is
examples.py the windows of a source, and their report
batches.py  batches in a fixed, resumable order
chosen.py   the first windows, and a seeded choice of them
errors.py   what is raised where rows cannot be used
"""
