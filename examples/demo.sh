#!/usr/bin/env bash
# The main job on a real model: capture -> fit-codebooks -> allocate -> profile.
# On a machine with a GPU the profile runs the CUDA kernel; elsewhere the float64 reference.
# Usage: demo.sh [FOLDER], by default runs/demo; BIN names the folder of the sphkv command.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${BIN:-.venv/bin}
out=${1:-runs/demo}
mkdir -p "$out"

step() {
	printf '\n$ sphkv %s\n' "$*"
	"$bin/sphkv" "$@"
}

step capture --model smollm2 --text-file fit=examples/text/emma.txt \
	--text-file select=examples/text/persuasion.txt \
	--text-file judge=examples/text/pride_and_prejudice.txt \
	--document-tokens 640 --max-tokens 5120 --fisher --output "$out/capture.h5" --force
step fit-codebooks "$out/capture.h5" --output "$out/codebooks.h5" --force
step allocate "$out/capture.h5" "$out/codebooks.h5" --budget 3b \
	--output "$out/allocation.h5" --force
step profile "$out/capture.h5" "$out/allocation.h5" --output "$out/report.json" \
	--html "$out/report.html" --force

printf '\nThe artifacts:\n'
ls -lh "$out" | awk 'NR > 1 {print "  '"$out"'/" $NF, $5}'
