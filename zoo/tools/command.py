"""The command line: options from dataclasses, mistakes in one line, the choice of device and dtype.

torch is imported where it is used: the scripts of data/ read their options without it.
"""

import argparse
import contextlib
import dataclasses
import functools
import inspect
import os
import re
import sys
import typing
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import torch


class Parser(argparse.ArgumentParser):
    """A parser whose --help keeps the line breaks of a docstring. A mistake is one line, and exit code 2.

    Text that follows a line "Examples:" in the docstring is shown behind the options.
    """

    def __init__(self, doc: str = "", formatter: type = argparse.RawDescriptionHelpFormatter,
                 prog: str | None = None):  # fmt: skip
        about, heading, examples = doc.partition("Examples:\n")
        super().__init__(prog, description=about, epilog=heading + examples, formatter_class=formatter)
        self.allow_abbrev = False

    def parse_known_args(self, args: Sequence[str] | None = None, namespace=None):
        """Part of parse_args(). argparse would make an empty list of the value in --name=--."""
        for name, _, value in (arg.partition("=") for arg in (sys.argv[1:] if args is None else args)):
            if name.startswith("-") and value == "--":
                self.error(f"argument {name}: '--' is no value")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (--help lists the options)")


def whole(least: int = -(2**31), most: int = 2**31 - 1) -> Callable[[str], int]:
    """The type of an option: a whole number within bounds. Beyond 32 bits no option has a meaning."""

    def read(text: str) -> int:
        with contextlib.suppress(ValueError):
            if least <= (value := int(text)) <= most:
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least:,} to {most:,}")

    return read


def number(text: str) -> float:
    """The type of an option: a number that is finite in float32, which is what models compute in."""
    with contextlib.suppress(ValueError):
        if abs(value := float(text)) < 2.0**127:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is no finite number")


def escaped(message: object) -> str:
    """A message as one line: control characters as in "\\n" or "\\x1b", and no more than 1,000 characters."""
    text = str(message)
    text = text if len(text) <= 1000 else text[:1000] + " ..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def fail(message: object) -> NoReturn:
    """The end of every script that a user's mistake stops: one line on stderr, and exit code 2."""
    if isinstance(message, OSError) and message.filename and message.strerror:
        message = f"{message.strerror}: {message.filename}"
    print(f"error: {escaped(message)}", file=sys.stderr)
    sys.exit(2)


def arguments(doc: str, *groups: type, argv: list[str] | None = None,
              presets: Callable[[dict], dict] | None = None) -> list:  # fmt: skip
    """One instance of each dataclass in groups, filled from the command line (argv, default: sys.argv).

    Every field is an option --name=value, or --name and --no-name for a bool. Its comment is its help.
    presets maps the options that were typed to defaults for those that were not. A wrong option, or a value
    that a dataclass refuses by a ValueError, ends the process with one line and exit code 2.
    """
    parser = Parser(doc)
    for cls in groups:
        section = parser.add_argument_group(inspect.getdoc(cls).splitlines()[0])
        kinds, notes = typing.get_type_hints(cls), comments(cls)
        for f in dataclasses.fields(cls):
            kind = kinds[f.name]
            how = {"type": {int: whole(), float: number}.get(kind, kind), "metavar": kind.__name__.upper()}
            how = {"action": argparse.BooleanOptionalAction} if kind is bool else how
            shown = f.default not in ("", None) and "default: " not in notes[f.name]
            note = notes[f.name].replace("%", "%%") + (f" [{f.default}]" if shown else "")
            section.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=note, **how)
    typed = vars(parser.parse_args(argv))
    values = {**(presets(typed) if presets else {}), **typed}
    try:
        names = {cls: [f.name for f in dataclasses.fields(cls) if f.name in values] for cls in groups}
        return [cls(**{name: values[name] for name in names[cls]}) for cls in groups]
    except ValueError as error:
        fail(error)


@functools.cache
def comments(cls: type) -> dict[str, str]:
    """Field -> the comment behind it, of a dataclass and of those that it inherits from.

    A comment may go on in lines of its own below the field.
    """
    notes = {}
    for part in filter(dataclasses.is_dataclass, reversed(cls.__mro__)):
        found = re.findall(r"^    (\w+): .*?  # (.*(?:\n    # .*)*)$", inspect.getsource(part), re.M)
        notes |= {name: note.replace("\n    # ", " ") for name, note in found}
    return notes


def run(main: Callable[[], None], interrupted: str = "interrupted") -> None:
    """Entry point of a script: a user's mistake is one line on stderr and exit code 2, Ctrl-C is code 130.

    Too little memory counts as a mistake: smaller sizes mend it.
    """
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        fail(error)
    except (MemoryError, RuntimeError) as error:  # RuntimeError: of torch's allocators
        told = " ".join(str(error).splitlines()[:1])
        kinds = "(out of|allocate|not enough) memory|size calculation overflowed"
        if not (isinstance(error, MemoryError) or re.search(kinds, told)):
            raise
        fail(f"out of memory, smaller sizes need less: {told or 'the machine has no more'}")
    except KeyboardInterrupt:
        sys.exit(print(interrupted, file=sys.stderr) or 130)


def pick_device(device: str, dtype: str) -> "tuple[torch.device, torch.dtype, str]":
    """(device, dtype, the reason in words). An empty name = the best there is. ValueError: it is not here."""
    import torch

    cuda = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    have = [*(cuda if torch.cuda.is_available() else []), *["mps"] * torch.backends.mps.is_available(), "cpu"]
    if device and device not in have:
        raise ValueError(f"device={device!r} is not available here; available: {', '.join(have)}")
    name = device or have[0]
    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if dtype and dtype not in dtypes:
        raise ValueError(f"dtype={dtype!r}: choose from {', '.join(dtypes)}")
    if name.startswith("cuda"):
        bf16, why = torch.cuda.is_bf16_supported(), torch.cuda.get_device_name(name)
    elif name == "mps":
        bf16, why = False, "bfloat16 autocast is young on mps"
    else:
        bf16 = torch.cpu._is_avx512_bf16_supported()
        why = "the processor multiplies bfloat16 natively" if bf16 else "the processor has no native bfloat16"
    chosen = dtypes[dtype] if dtype else (torch.bfloat16 if bf16 else torch.float32)
    reason = f"device {name} ({'asked for' if device else 'the best one found'})"
    return torch.device(name), chosen, f"{reason}; dtype {str(chosen)[6:]} ({'asked for' if dtype else why})"


def autocast(device: "torch.device", dtype: "torch.dtype") -> contextlib.AbstractContextManager:
    """Matmuls in dtype over float32 weights; nothing at all for float32."""
    import torch

    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
