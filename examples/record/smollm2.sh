#!/usr/bin/env bash
# The tables of SmolLM2-135M: contexts of 1,536 tokens, 512 tokens after each, 7 judge documents; its
# policy also at 4,096 and 7,680 tokens.
# Usage: smollm2.sh; folders as in steps.sh.
source "$(dirname "$0")/steps.sh"
model=smollm2
document_tokens=${DOCUMENT_TOKENS:-2048}
horizon=${HORIZON:-512}
documents=${DOCUMENTS:-24}
budgets=${BUDGETS:-1b 1.5b 2b 2.5b 3b 4b}
needle_lengths=${NEEDLE_LENGTHS:-512 1024 2048}
uniform_documents=${UNIFORM_DOCUMENTS:-6}
long_contexts=${LONG_CONTEXTS:-4096 7680}
record
