"""`python -m sphkv_cli.texts.fetch [NAME ...]`: fetch texts of other domains into the cache.

Without a name all of them: austen (six novels), brown (the Brown corpus by category) and
anarchist-faq (modern argument). Prints the files, one a line.
"""

import sys

from sphkv_cli.errors import SphkvError
from sphkv_cli.texts.packages import TEXTS, fetch_texts


def main(arguments: list[str]) -> int:
    """Fetch the texts named in `arguments`; returns the exit code."""
    for name in arguments:
        if name not in TEXTS:
            sys.stderr.write(f"no texts called {name}; there is {', '.join(TEXTS)}\n")
            return 2
    for name in arguments or TEXTS:
        try:
            paths = fetch_texts(name)
        except SphkvError as error:
            sys.stderr.write(f"{error}\n")
            return error.exit_code
        sys.stdout.write("".join(f"{path}\n" for path in paths))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
