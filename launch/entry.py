"""What the commands share: one dialect of flags, `--config`, messages, and one-sentence errors.

A command defines its flags at the top, then `def main(...)`, and ends with

    if __name__ == "__main__":
        run(main)

`--run-dir` and `--run_dir` are the same flag, and so are `--config=x` and `--config x`.
"""

import difflib
import errno
import math
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from logging import Handler, LogRecord, getLogger
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

import configs
from launch import cli

_CONFIGS = Path(configs.__file__).parent

flags.disclaim_key_flags()  # --help of a command lists the flags that are defined here for it


def config_flag(required: bool = True) -> flags.FlagHolder:
    """Defines `--config=FILE.py[:argument]`, whose settings `--config.a.b=value` overrides.

    `--config=quickstart_video` is a file of configs/ by name, from any folder. A command that
    requires a configuration and has a flag --checkpoint, too, takes that of the checkpoint's run
    where none is given.
    """
    holder = config_flags.DEFINE_config_file(
        "config",
        help_string="A configuration: a Python file, or the name of a file in configs/, such as "
        "quickstart_video. --config.a.b=value changes a setting.",
    )
    if required:
        flags.mark_flag_as_required("config")
    return holder


def path_flag(name: str, help: str) -> flags.FlagHolder:
    """Defines `--name=PATH`, which must be given; "" would silently mean the current folder."""
    holder = flags.DEFINE_string(name, None, help)
    flags.register_validator(name, bool, f"--{name} must be given.")
    return holder


def run(main: Callable[..., int | None], positional: tuple[str, ...] = ()) -> None:
    """Parses the flags, calls `main` with the positional arguments and exits with what it returns.

    What a person can put right (a misspelt flag, a wrong setting, a missing file, a full disk) ends
    the program with one sentence and exit code 2, Ctrl-C with 130; MVJAX_TRACEBACK=1 shows where
    it came from.

    Args:
        main: what the command does.
        positional: names of the arguments that stand before or between the flags; the last one may
            be "NAME...", one or more.
    """

    def checked(arguments: Sequence[str]) -> int | None:
        values = arguments[1:]
        if len(values) < len(positional):
            stop(f"{' and '.join(positional[len(values) :])} must be given.")
        if len(values) > len(positional) and not (positional and positional[-1].endswith("...")):
            stop(f"unexpected argument {values[len(positional)]!r}; flags start with '--'.")
        _log_to_stderr()
        threading.excepthook = _background_failure
        try:
            return main(*values)
        except KeyboardInterrupt:
            stop("stopped; run the same command again to continue.", 130)
        except (ValueError, OSError, RuntimeError, ImportError, AttributeError) as error:
            sentence = _sentence(error)
            if sentence is None or os.environ.get("MVJAX_TRACEBACK"):
                raise
            stop(sentence)

    app.run(checked, flags_parser=_parse)


def stop(sentence: str, code: int = 2) -> NoReturn:
    """Ends the command with one sentence on stderr, after its name as the person typed it."""
    main = sys.modules["__main__"]
    name = main.__spec__.name if main.__spec__ else os.path.basename(sys.argv[0])
    print(f"{cli.program or name}: {' '.join(sentence.split())}", file=sys.stderr)
    raise SystemExit(code)


class _Stderr(Handler):
    """Writes bare messages to what `sys.stderr` is at that moment, above a progress bar."""

    def emit(self, record: LogRecord) -> None:
        line = self.format(record)
        # A log on a full disk, or of a terminal that is gone, must not end the work.
        with suppress(OSError, ValueError):
            if "tqdm" in sys.modules:  # a bar may be there; printing would break it
                sys.modules["tqdm"].tqdm.write(line, file=sys.stderr)
            else:
                print(line, file=sys.stderr, flush=True)


def _log_to_stderr() -> None:
    """The project's own messages from INFO on, those of others from WARNING on."""
    logging.set_verbosity(logging.WARNING)  # jax tells every missing backend at INFO
    for name in ("mvjax", "data_pipelines", "configs", "launch", "__main__"):
        logger = getLogger(name)
        logger.setLevel("INFO")
        logger.propagate = False
        logger.handlers = [_Stderr()]


def _parse(arguments: Sequence[str]) -> list[str]:
    try:
        rest = flags.FLAGS(_normalised(arguments))
        for name, value in flags.FLAGS.flag_values_dict().items():
            if isinstance(value, float) and not math.isfinite(value):  # absl's bounds let NaN pass
                raise ValueError(f"--{name} must be a finite number, got {value}.")
        return rest
    except SystemExit as end:  # absl ends --help with code 1
        raise SystemExit(0 if end.code == 1 else end.code) from None
    except Exception as error:  # a configuration file is a program: it may raise anything
        sentence = _configuration_sentence(error) or _flag_sentence(error)
        if sentence is None or os.environ.get("MVJAX_TRACEBACK"):
            raise
        stop(sentence)


def _normalised(arguments: Sequence[str]) -> list[str]:
    """The arguments as absl takes them, with a configuration where --checkpoint implies one."""
    end = arguments.index("--") if "--" in arguments else len(arguments)  # the rest is not ours
    words, rest = [], list(arguments[end:])
    for word in arguments[:end]:
        if words and words[-1] in ("--config", "--checkpoint"):
            words[-1] += f"={word}"
            continue
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            name = "--" + name[2:].replace("-", "_")
        words.append("--help" if word == "-h" else name + equals + value)
    if "config" not in flags.FLAGS:
        return words + rest
    given = {name: value for name, equals, value in (w.partition("=") for w in words) if equals}
    required = bool(flags.FLAGS["config"].validators)  # of mark_flag_as_required
    if required and "--config" not in given and given.get("--checkpoint"):
        words.insert(1, f"--config={_CONFIGS / 'trained.py'}:{given['--checkpoint']}")
    return [_with_path(word) if word.startswith("--config=") else word for word in words] + rest


def _with_path(word: str) -> str:
    """--config=quickstart:smoke -> --config=/where/it/is/configs/quickstart.py:smoke."""
    name, colon, argument = word.removeprefix("--config=").partition(":")
    shipped = _CONFIGS / f"{name}.py"
    if not re.fullmatch(r"\w+", name) or Path(name).is_file():
        return word
    if shipped.exists():
        return f"--config={shipped}{colon}{argument}"
    if Path(name).exists():  # a folder, which ml_collections says
        return word
    close = difflib.get_close_matches(name, [path.stem for path in _CONFIGS.glob("[a-z]*.py")])
    hint = f"did you mean {' or '.join(close)}?" if close else "give a FILE.py."
    raise ValueError(f"there is no configuration {name!r}; {hint}")


def _configuration_sentence(error: BaseException | None) -> str | None:
    """What went wrong inside the configuration file, or None if it is not to blame."""
    while error is not None:
        if isinstance(error, SyntaxError):
            return f"{error.filename}, line {error.lineno}: {error.msg}."
        for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
            if frame.f_globals.get("__name__") == "config_config":  # as ml_collections calls it
                if isinstance(error, ValueError):  # written for a person
                    return str(error)
                name = type(error).__name__
                return f"{frame.f_code.co_filename}, line {line}: {name}: {_text(error)}"
        error = error.__context__
    return None


def _flag_sentence(error: Exception) -> str | None:
    text = _text(error)
    if isinstance(error, flags.Error):
        text = re.sub(r"Flag (--\w+) must have a value other than None", r"\1 must be given", text)
        # Some of absl's errors have two arguments, and are shown as a tuple.
        text = re.sub(r": \('(.*?)', '.*'\)$", r": \1", text)
        return re.sub(r"(^|(?<=\s))flag --\w+=(None)?: ", "", text)
    if isinstance(error, OSError):
        return _sentence(error)
    if "get_config" in text:
        return "--config must be a Python file with a function get_config, as those in configs/."
    if isinstance(error, KeyError | AttributeError):
        return f"there is no setting {_setting(text)}"
    return text if isinstance(error, ValueError | TypeError) else None


def _sentence(error: Exception) -> str | None:
    """What to tell about an error of `main`; None where only a traceback helps."""
    if isinstance(error, AttributeError):
        last = list(traceback.walk_tb(error.__traceback__))[-1][0]
        if not last.f_globals["__name__"].startswith("ml_collections"):
            return None
        return f"the configuration has no setting {_setting(_text(error))}"
    text = str(error) or type(error).__name__
    if "Configuration is not available" in text:  # ml_collections, when it is first used
        reason = text.rpartition("failure to load: ")[2].rpartition("] ")[2]
        return f"--config cannot be read: {reason}"
    if os.strerror(errno.ENOSPC) in text:  # libraries in C++ give it other types and numbers
        return f"the disk is full; make room and run the same command again ({text})."
    return text


def _background_failure(failure: threading.ExceptHookArgs) -> None:
    if os.environ.get("MVJAX_TRACEBACK") or failure.exc_value is None:
        threading.__excepthook__(failure)
    else:
        print(f"in the background: {_text(failure.exc_value)}", file=sys.stderr)


def _setting(text: str) -> str:
    """From ml_collections' words to "'lerning_rate'; did you mean 'learning_rate'?"."""
    names = re.findall(r"[\w.]+", text)
    meant = re.search(r'Did you mean "(.*?)"', text)
    return f"{names[0]!r}; did you mean {meant[1]!r}?" if meant else f"{names[0]!r}."


def _text(error: BaseException) -> str:
    # ml_collections raises errors whose only argument is another error.
    return str(error.args[0] if error.args else error).replace("\\n", " ")
