#!/usr/bin/env bash
# An installed sphkv, alone, with no model and no GPU: the four stages on a synthetic capture.
# Usage: smoke.sh FOLDER_OF_sphkv WORK_FOLDER
set -euo pipefail
bin=$1
work=$2
mkdir -p "$work"
cd "$work"

"$bin/sphkv" --help
"$bin/sphkv" doctor
"$bin/sphkv" capture --synthetic 2x4x2x64 --output capture.h5
"$bin/sphkv" fit-codebooks capture.h5 --output codebooks.h5
"$bin/sphkv" allocate capture.h5 codebooks.h5 --budget 3b --output allocation.h5
"$bin/sphkv" profile capture.h5 allocation.h5 \
	--backend reference --output report.json
for artifact in capture.h5 codebooks.h5 allocation.h5 report.json; do
	"$bin/sphkv" inspect "$artifact" --verify >/dev/null
done
echo "smoke test passed"
