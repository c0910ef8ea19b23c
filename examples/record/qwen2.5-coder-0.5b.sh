#!/usr/bin/env bash
# The tables of Qwen2.5-Coder-0.5B, whose keys carry a bias: contexts of 1,024 tokens, 256 after each.
# Usage: qwen2.5-coder-0.5b.sh; folders as in steps.sh.
source "$(dirname "$0")/steps.sh"
model=qwen2.5-coder-0.5b
document_tokens=${DOCUMENT_TOKENS:-1280}
horizon=${HORIZON:-256}
documents=${DOCUMENTS:-24}
budgets=${BUDGETS:-1b 2b 3b 4b}
needle_lengths=${NEEDLE_LENGTHS:-512 1024}
uniform_documents=${UNIFORM_DOCUMENTS:-3}
long_contexts=${LONG_CONTEXTS:-4096}
fisher_options="--fisher-samples 1 --fisher-tokens 640"
record
