#!/usr/bin/env bash
# The costs that README quotes: capture, encoding, fitting, and the command line itself.
# Usage: bench.sh; BIN names the folder of the sphkv command. Run it on an idle machine.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${BIN:-.venv/bin}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

echo "== sphkv --help"
"$bin/python" - "$bin/sphkv" <<'PY'
import statistics, subprocess, sys, time

seconds = []
for _ in range(11):
    start = time.perf_counter()
    subprocess.run([sys.argv[1], "--help"], check=True, stdout=subprocess.DEVNULL)
    seconds.append(time.perf_counter() - start)
print(f"median of {len(seconds)}: {statistics.median(seconds):.2f} s")
PY

echo "== capture against a bare forward pass, peak memory, file size"
"$bin/python" examples/benchmark_capture.py

echo "== encode and decode"
"$bin/python" examples/encode_throughput.py

echo "== fit every layer, head and level of a capture"
"$bin/sphkv" capture --model smollm2 --text-file examples/text/emma.txt \
	--text-file examples/text/persuasion.txt --text-file examples/text/pride_and_prejudice.txt \
	--document-tokens 640 --max-tokens 5120 --output "$work/capture.h5" >/dev/null
for density in analytic empirical; do
	said=$("$bin/sphkv" fit-codebooks "$work/capture.h5" --density $density --force \
		--output "$work/codebooks.h5")
	printf '%s: %s\n' "$density" "${said%%$'\n'*}"
done
