"""report.html of a run, from the files of its folder alone: nothing here imports a stage."""
