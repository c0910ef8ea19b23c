# Sourced by the scripts beside it: the recorded tables of one model, each by one command.
#
# Set before `record`: model, document_tokens, horizon, documents, budgets, needle_lengths,
# uniform_documents; perhaps fisher_options, for capture, and long_contexts, to evaluate the policy
# at lengths that it was not fitted on.
# Folders: artifacts in OUT, by default runs/record/MODEL; reports in RESULTS, by default
# examples/results/MODEL; BIN is that of the sphkv command. COMMIT names it where there is no git.
# A step whose artifact is there is not repeated: remove it to make it again. STEPS="capture fit ..."
# makes these alone (a length's are capture-LENGTH and length-LENGTH).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
bin=${BIN:-.venv/bin}

# wanted NAME: whether STEPS leaves it in.
wanted() {
	[[ -z ${STEPS:-} || " $STEPS " == *" $1 "* ]]
}

# is_known NAME: end here unless there is such a step.
is_known() {
	[[ " $known " == *" $1 "* ]] || { printf 'there is no step %s; there is %s\n' "$1" "$known" >&2; exit 2; }
}

# step NAME ARTIFACT COMMAND...: run, keep what it prints beside the record, note command and time.
step() {
	local name=$1 artifact=$2 started=$SECONDS text=$out/$1.txt made_by
	made_by=$(commit)
	shift 2
	is_known "$name"
	wanted "$name" || return 0
	if [[ -e $artifact ]]; then
		printf '\n%s: %s is there\n' "$name" "$artifact"
		return
	fi
	printf '\n$ %s\n' "$*"
	"$@" >"$text.new"
	mv "$text.new" "$text"
	cat "$text"
	local line
	line=$(printf '%-10s %5d s  %s  (commit %s)' "$name" $((SECONDS - started)) "$*" "$made_by")
	printf '%s\n' "${line//$HOME/\~}" | tee -a "$out/record.txt"
}

# report NAME: copy what the step of that name found to the results.
report() {
	wanted "$1" || return 0
	for suffix in json png txt; do
		if [[ -e $out/$1.$suffix ]]; then
			cp "$out/$1.$suffix" "$results/"
		fi
	done
}

commit() {
	# What the record itself writes is no change of the code.
	local same=(git diff --quiet HEAD -- . ':!examples/results')
	printf '%s' "${COMMIT:-$(git rev-parse --short HEAD)$("${same[@]}" || printf ' with changes')}"
}

provenance() {
	local gpu
	gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null || printf 'no GPU')
	printf '%s, commit %s, %s\n' "$("$bin/sphkv" --version)" "$(commit)" "$(date -u +%F)"
	printf '%s, %s cores, %s\n\n' \
		"$(sed -n 's/^model name\s*: //p' /proc/cpuinfo | head -1)" "$(nproc)" "$gpu"
}

# beginning BYTES FILE: the first bytes of a text, without a character cut in two.
beginning() {
	head -c "$1" "$2" | iconv -c -f utf-8 -t utf-8
}

record() {
	local name length
	known="capture fit design allocate table needle copy-back uniform controls studies"
	for length in ${long_contexts:-}; do known+=" capture-$length length-$length"; done
	for name in ${STEPS:-}; do is_known "$name"; done
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
	local fit_texts=("$novels/emma.txt" "$brown/news.txt" "$argument/secA.txt")
	local select_texts=("$novels/persuasion.txt" "$brown/editorial.txt" "$argument/secB.txt")
	local judge_texts=("$novels/pride_and_prejudice.txt" "$brown/learned.txt" "$argument/secJ.txt")
	step capture "$out/capture.h5" "$bin/sphkv" capture --model "$model" \
		"${fit_texts[@]/#/--text-file=fit=}" "${select_texts[@]/#/--text-file=select=}" \
		"${judge_texts[@]/#/--text-file=judge=}" --document-tokens "$document_tokens" \
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

	asked=()
	for length in $needle_lengths; do asked+=(--probe-length "$length"); done
	step needle "$out/needle.json" "$bin/sphkv" evaluate "$out/capture.h5" --dtype float32 \
		--allocation "$out/allocation.h5" --probe needle --probe-prompts 1 "${asked[@]}" \
		--plot "$out/needle.png" --output "$out/needle.json"
	report needle
	step copy-back "$out/copy-back.json" "$bin/sphkv" evaluate "$out/capture.h5" --dtype float32 \
		--allocation "$out/allocation.h5" --probe copy-back --probe-length 1024 \
		--probe-prompts 4 --output "$out/copy-back.json"
	report copy-back

	step uniform "$out/uniform.json" "$bin/sphkv" evaluate "$out/capture.h5" --dtype float32 \
		--codebooks "$out/designed.h5" --seeds 3 --method turboquant:3 --method polarquant \
		--method kivi:2 --method kivi:4 --max-documents "$uniform_documents" \
		--output "$out/uniform.json"
	report uniform

	for length in ${long_contexts:-}; do
		# One document of each judge text, long enough; nothing is fitted on what is before them.
		local tokens=$((length + horizon)) text parts="$out/texts-$length" cut=()
		mkdir -p "$parts"
		for text in "${judge_texts[@]}"; do
			beginning $((6 * tokens)) "$text" >"$parts/$(basename "$text")"
			cut+=("--text-file=judge=$parts/$(basename "$text")")
		done
		beginning 4096 "${fit_texts[0]}" >"$parts/fit.txt"
		beginning 4096 "${select_texts[0]}" >"$parts/select.txt"
		step "capture-$length" "$out/capture-$length.h5" "$bin/sphkv" capture --model "$model" \
			"--text-file=fit=$parts/fit.txt" "--text-file=select=$parts/select.txt" "${cut[@]}" \
			--document-tokens "$tokens" --query-tail 1 --query-stride 512 --dtype float32 \
			--output "$out/capture-$length.h5"
		step "length-$length" "$out/length-$length.json" "$bin/sphkv" evaluate \
			"$out/capture-$length.h5" --dtype float32 --allocation "$out/allocation.h5" \
			--budget 1b --budget 2b --budget 3b --output "$out/length-$length.json"
		report "length-$length"
	done

	# What the joint plan is without one of its parts; `study retention` fits controls of their own too.
	step controls "$out/controls.json" "$bin/sphkv" evaluate "$out/capture.h5" --dtype float32 \
		--allocation "$out/allocation.h5" --budget 2b --rows controls --output "$out/controls.json"
	report controls

	local others
	others=$("$bin/sphkv" study --list --json |
		"$bin/python" -c 'import json, sys; print(*(s["name"] for s in json.load(sys.stdin)))')
	step studies "$out/studies/depth/result.json" "$bin/sphkv" study ${others/retention/} \
		--capture "$out/capture.h5" --codebooks "$out/codebooks.h5" --max-documents 2 \
		--max-layers 10 --horizon "$horizon" --output "$out/studies"
	if wanted studies; then
		cp -r "$out/studies" "$results/"
	fi
	cp "$out/record.txt" "$results/record.txt"
	printf '\nThe results are in %s\n' "$results"
}
