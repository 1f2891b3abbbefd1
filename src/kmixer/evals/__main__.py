"""The harness's own command, which knows `--model kmixer` here."""

from __future__ import annotations

import sys

from lm_eval.__main__ import cli_evaluate

from kmixer.errors import InputError, one_line


def main() -> None:
    try:
        cli_evaluate()
    except InputError as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
