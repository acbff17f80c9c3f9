"""What the entry points share: the configuration flag, and errors that are one sentence."""

import errno
import os
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging
from ml_collections import config_flags


def config_flag() -> flags.FlagHolder:
    """Defines `--config=FILE.py[:argument]`, whose settings `--config.a.b=value` overrides."""
    holder = config_flags.DEFINE_config_file("config", help_string="A file of configs/.")
    flags.mark_flag_as_required("config")
    return holder


def run(main: Callable[[], None]) -> None:
    """Parses the flags and calls `main`.

    What a person can put right (a misspelt flag, a wrong setting, a missing file, a full disk) ends
    the program with one sentence and exit code 2; MVJAX_TRACEBACK=1 shows where it came from.
    """

    def checked(arguments: Sequence[str]) -> None:
        if len(arguments) > 1:
            _stop(f"unexpected argument {arguments[1]!r}; flags start with '--'.")
        logging.set_verbosity(logging.WARNING)  # jax tells every missing backend at INFO
        try:
            main()
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            if os.environ.get("MVJAX_TRACEBACK"):
                raise
            _stop(_sentence(error))

    app.run(checked, flags_parser=_parse)


def _parse(arguments: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(list(arguments))
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        text = str(error.args[0] if error.args else error).replace("\\n", " ").replace("\\'", "")
        if "Traceback" in text:  # ml_collections' message for an error inside a configuration file
            text = text.splitlines()[-1].partition(": ")[2]
        unknown = isinstance(error, KeyError | AttributeError)
        _stop(f"there is no setting {text}".replace("'", "") if unknown else text)


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk is full ({error.filename or error}); make room and run this again."
    return str(error) or type(error).__name__


def _stop(sentence: str) -> None:
    main = sys.modules["__main__"]
    name = main.__spec__.name if main.__spec__ else os.path.basename(sys.argv[0])
    print(f"{name}: {' '.join(sentence.split())}", file=sys.stderr)
    raise SystemExit(2)
