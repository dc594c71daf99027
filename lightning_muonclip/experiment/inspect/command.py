"""``muonclip-inspect``: a look at a model before it trains."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NoReturn

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from lightning_muonclip.experiment.config import ConfigError
from lightning_muonclip.experiment.inspect.costs import STRATEGIES
from lightning_muonclip.experiment.inspect.document import document
from lightning_muonclip.experiment.inspect.look import Look, look_at
from lightning_muonclip.experiment.inspect.target import GIVEN, target_of
from lightning_muonclip.experiment.inspect.text import text
from lightning_muonclip.experiment.train import explain

_NAME = "muonclip-inspect"

#: Elements of a model that gets values if it cannot run without: a gigabyte.
_MOST_WITH_VALUES = 2**28

_EPILOG = """examples:
  muonclip-inspect model=mla                                      the model of muonclip-train
  muonclip-inspect path/to/config.json --strategy fsdp2 --ranks 8  a model of Hugging Face
  muonclip-inspect package.module:factory muonclip.router=adamw   your own: a function that returns a module,
                                                                  or (module, args, kwargs)
exit code: 0, 1 if a run would stop, 2 if the command is wrong"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {_NAME} --help")


def _parser() -> _Parser:
    parser = _Parser(
        _NAME,
        description="Shows what MuonClip would do with a model, without training it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="*", metavar="target or override", help="see the examples")
    parser.add_argument(
        "--strategy", choices=STRATEGIES, help="how the model is spread (default: of the config, or single)"
    )
    parser.add_argument("--ranks", type=_positive, help="over how many ranks (default: of the config, or 1)")
    parser.add_argument("--tokens", type=_positive, help="tokens of all ranks in a step")
    parser.add_argument("--values", action="store_true", help="build with values, and check the whole model too")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def _positive(word: str) -> int:
    number = int(word) if word.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is no positive whole number")
    return number


def inspect(arguments: Sequence[str]) -> tuple[Look, bool]:
    """Looks at what a command line names; returns what was found, and whether it asks for JSON.

    Raises:
        ConfigError: If the command line is wrong.
    """
    given = _parser().parse_intermixed_args(list(arguments))
    names = [word for word in given.words if "=" not in word and not word.startswith("~")]
    overrides = [word for word in given.words if word not in names]
    if len(names) > 1:
        raise ConfigError(f"one target at a time, got {', '.join(names)}")
    if given.strategy == "single" and (given.ranks or 1) > 1:
        raise ConfigError(f"--ranks {given.ranks} needs --strategy ddp or fsdp2")
    name = names[0] if names else None
    target = target_of(name, overrides, given.values)
    strategy, ranks = given.strategy or target.strategy, given.ranks or target.ranks
    if ranks is not None and ranks > 1 and strategy is None:
        raise ConfigError(f"--ranks {ranks} needs --strategy ddp or fsdp2")
    if given.strategy == "single":
        ranks = 1
    look = look_at(target, strategy, ranks, given.tokens)
    size = sum(param.numel() for param in target.model.parameters())
    if look.cannot_run_without_values and size <= _MOST_WITH_VALUES:
        again = look_at(target_of(name, overrides, True), strategy, ranks, given.tokens)
        if again.attention is None and again.refusal is None and target.inputs == GIVEN:
            raise ConfigError(f"{name}: the model and its example inputs do not fit. {' '.join(again.notes)}")
        look = replace(again, notes=[*look.notes, "So it was built with values.", *again.notes])
    return look, given.json


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Also for what writes to the file descriptor, such as an extension or another process."""
    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(own, 1)
        os.close(own)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # raise errors instead of printing them
    try:
        with _stdout_to_stderr():  # what models print is not part of the document
            look, as_json = inspect(sys.argv[1:] if arguments is None else arguments)
    except (ConfigError, HydraException, OmegaConfBaseException) as error:
        message = " ".join(explain(error).split())
        print(f"{_NAME}: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{_NAME}: interrupted", file=sys.stderr)
        sys.exit(130)
    if as_json:
        print(json.dumps(document(look)))
    else:
        print(text(look, shutil.get_terminal_size((100, 24)).columns))
    sys.exit(int(look.stops))


if __name__ == "__main__":
    main()
