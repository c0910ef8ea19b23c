"""`sphkv` and `python -m sphkv_cli`."""

from sphkv_cli.app import run

main = run

if __name__ == "__main__":
    run()
