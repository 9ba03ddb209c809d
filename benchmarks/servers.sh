#!/bin/sh
# Every night: the servers that run on a CPU, from their packages to the table of what they compute from our folders.
# Environments, runs and rows that are there are kept; without its results file every row is measured anew:
#   rm benchmarks/results/serve.json && sh benchmarks/servers.sh          about half an hour, and ten minutes of building
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=1
"$PYTHON" -m benchmarks.serve --install
"$PYTHON" -m benchmarks.serve "$@"
"$PYTHON" -m benchmarks.serve --table
