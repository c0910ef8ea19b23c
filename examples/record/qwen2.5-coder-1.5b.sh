#!/usr/bin/env bash
# The tables of Qwen2.5-Coder-1.5B (head_dim 128): contexts of 768 tokens, 256 after each; its policy
# also at 3,840 tokens. The model takes 6 GB in float32; fetching it needs 10 GB of disk.
# Usage: qwen2.5-coder-1.5b.sh; folders as in steps.sh.
source "$(dirname "$0")/steps.sh"
model=qwen2.5-coder-1.5b
document_tokens=${DOCUMENT_TOKENS:-1024}
horizon=${HORIZON:-256}
documents=${DOCUMENTS:-24}
budgets=${BUDGETS:-1b 2b 3b 4b}
needle_lengths=${NEEDLE_LENGTHS:-512}
uniform_documents=${UNIFORM_DOCUMENTS:-2}
fisher_options="--fisher-samples 1 --fisher-tokens 640"
long_contexts=${LONG_CONTEXTS:-3840}
record
