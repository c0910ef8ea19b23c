"""`sphkv` and `python -m sphkv_cli`."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C while it is still loading ends it without a traceback."""
    try:
        from sphkv_cli.app import run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
