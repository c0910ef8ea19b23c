# Sourced by the scripts beside it: the recorded tables of one model, each by one command.
#
# Set before `record`: model, document_tokens, horizon, documents, budgets, needle_lengths;
# perhaps fisher_options, for capture.
# Folders: artifacts in OUT, by default runs/record/MODEL; reports in RESULTS, by default
# examples/results/MODEL; BIN is that of the sphkv command. COMMIT names it where there is no git.
# A step whose artifact is there is not repeated: remove it to make it again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
bin=${BIN:-.venv/bin}

# step NAME ARTIFACT COMMAND...: run, keep what it prints beside the record, note command and time.
step() {
	local name=$1 artifact=$2 started=$SECONDS text=$out/$1.txt
	shift 2
	if [[ -e $artifact ]]; then
		printf '\n%s: %s is there\n' "$name" "$artifact"
		return
	fi
	printf '\n$ %s\n' "$*"
	"$@" >"$text.new"
	mv "$text.new" "$text"
	cat "$text"
	local line
	line=$(printf '%-10s %5d s  %s' "$name" $((SECONDS - started)) "$*")
	printf '%s\n' "${line//$HOME/\~}" | tee -a "$out/record.txt"
}

# report NAME: copy what the step of that name found to the results.
report() {
	for suffix in json png txt; do
		if [[ -e $out/$1.$suffix ]]; then
			cp "$out/$1.$suffix" "$results/"
		fi
	done
}

provenance() {
	local commit gpu
	commit=${COMMIT:-$(git rev-parse --short HEAD)$(git diff --quiet HEAD || printf ' with changes')}
	gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null || printf 'no GPU')
	printf '%s, commit %s, %s\n' "$("$bin/sphkv" --version)" "$commit" "$(date -u +%F)"
	printf '%s, %s cores, %s\n\n' \
		"$(sed -n 's/^model name\s*: //p' /proc/cpuinfo | head -1)" "$(nproc)" "$gpu"
}

record() {
	out=${OUT:-runs/record/$model}
	results=${RESULTS:-examples/results/$model}
	mkdir -p "$out" "$results"
	[[ -e $out/record.txt ]] || provenance >"$out/record.txt"

	"$bin/python" -m sphkv_cli.models.fetch "$model"
	"$bin/python" -m sphkv_cli.texts.fetch >/dev/null
	local texts=${XDG_CACHE_HOME:-$HOME/.cache}/sphkv/texts
	local novels brown argument
	novels=$(echo "$texts"/austen-*) brown=$(echo "$texts"/brown-*)
	argument=$(echo "$texts"/anarchist-faq-*)

	# A novel, the press or science, and an argument for each purpose; no text serves two.
	step capture "$out/capture.h5" "$bin/sphkv" capture --model "$model" \
		--text-file "fit=$novels/emma.txt" --text-file "fit=$brown/news.txt" \
		--text-file "fit=$argument/secA.txt" --text-file "select=$novels/persuasion.txt" \
		--text-file "select=$brown/editorial.txt" --text-file "select=$argument/secB.txt" \
		--text-file "judge=$novels/pride_and_prejudice.txt" --text-file "judge=$brown/learned.txt" \
		--text-file "judge=$argument/secJ.txt" --document-tokens "$document_tokens" \
		--max-tokens $((documents * document_tokens)) --query-tail 512 --query-stride 8 \
		--dtype float32 --fisher ${fisher_options:-} --output "$out/capture.h5"
	step fit "$out/codebooks.h5" "$bin/sphkv" fit-codebooks "$out/capture.h5" \
		--output "$out/codebooks.h5"
	step design "$out/designed.h5" "$bin/sphkv" fit-codebooks "$out/capture.h5" \
		--target-rate 3.25 --target-rate 4.25 --output "$out/designed.h5"
	step allocate "$out/allocation.h5" "$bin/sphkv" allocate "$out/capture.h5" \
		"$out/codebooks.h5" --budget 2b --horizon "$horizon" --output "$out/allocation.h5"

	local asked=() method
	for method in fp8 int8 kivi:4 kivi:2 turboquant:4 turboquant:3 turboquant:4,centred \
		turboquant:3,centred polarquant polarquant,centred; do
		asked+=(--method "$method")
	done
	for budget in $budgets; do asked+=(--budget "$budget"); done
	step table "$out/table.json" "$bin/sphkv" evaluate "$out/capture.h5" --dtype float32 \
		--allocation "$out/allocation.h5" --codebooks "$out/designed.h5" --rows published \
		"${asked[@]}" --first-tokens 4 --window 32 --by-position --plot "$out/table.png" \
		--output "$out/table.json"
	report table

	step uniform "$out/uniform.json" "$bin/sphkv" evaluate "$out/capture.h5" --dtype float32 \
		--codebooks "$out/designed.h5" --seeds 3 --method turboquant:3 --method polarquant \
		--method kivi:2 --method kivi:4 --max-documents "$uniform_documents" \
		--output "$out/uniform.json"
	report uniform

	asked=()
	for length in $needle_lengths; do asked+=(--probe-length "$length"); done
	step needle "$out/needle.json" "$bin/sphkv" evaluate "$out/capture.h5" --dtype float32 \
		--allocation "$out/allocation.h5" --probe needle --probe-prompts 1 "${asked[@]}" \
		--plot "$out/needle.png" --output "$out/needle.json"
	report needle
	cp "$out/record.txt" "$results/record.txt"
	printf '\nThe results are in %s\n' "$results"
}
