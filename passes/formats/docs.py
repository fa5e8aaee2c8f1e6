"""Writes the tables of docs/quantization.md: ``python -m tilewright.passes.formats.docs docs/quantization.md``."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np

from tilewright.passes.formats.base import Format
from tilewright.passes.formats.schemes import SCHEMES, Scheme

BEGIN = "<!-- Written by `python -m tilewright.passes.formats.docs docs/quantization.md` from here -->\n"
END = "<!-- to here -->\n"

_N, _GROUPS = 10007, 10009  # primes that are recognised in shapes


def rewritten(page: str) -> str:
    """The page with the part between the marks made anew."""
    head, _, rest = page.partition(BEGIN)
    return head + BEGIN + tables() + END + rest.partition(END)[2]


def tables() -> str:
    """A row a scheme, and what each format is."""
    rows = "\n".join(_row(name, scheme) for name, scheme in SCHEMES.items())
    kinds = dict.fromkeys(type(scheme.format) for scheme in SCHEMES.values())
    sections = "\n".join(f"### {kind.__name__}\n\n{_text(kind)}\n" for kind in kinds)
    return (
        "\n| scheme | bits a weight | error | activations | stored for a weight `[N, K]` | options | what | paper |\n"
        f"|---|---|---|---|---|---|---|---|\n{rows}\n\n{sections}\n"
    )


def _row(name: str, scheme: Scheme) -> str:
    format = scheme.format
    activations = f"{scheme.activations} bits" if scheme.activations else "as they are"
    stored = "<br>".join(_parts(format))
    options = "<br>".join(_options(format))
    cells = [_bits(scheme), _error(format), activations, stored, options, scheme.summary, _paper(scheme.paper)]
    return f"| `{name}` | {' | '.join(cells)} |"


def _bits(scheme: Scheme) -> str:
    """``4.125 (4 + 16/128), 32 a row``."""
    format, size = scheme.format, scheme.format.size
    a_row = size.row + (0 if format.group else size.group)
    sum = f" ({size.element} + {size.group}/{format.group})" if format.group and size.group else ""
    more = (f", {a_row} a row" if a_row else "") + (f", {size.once} once" if size.once else "")
    return f"{scheme.bits:g}{sum}{more}"


def _error(format: Format) -> str:
    """The root mean square error of normal numbers in rows of 4096, which are rounded to the nearest."""
    w = np.random.default_rng(0).standard_normal((16, 4096)).astype(np.float32).reshape(16, format.groups(4096), -1)
    params = format.fit(w)
    error = float(np.sqrt(np.square(format.decode(format.encode(w, params), params) - w).mean()))
    return f"{error:.1%}"


def _parts(format: Format) -> Iterator[str]:
    """``codes i4 [N, K]``, ``scale f16 [N, K/128]``, ..."""
    k = _GROUPS * format.group if format.group else _GROUPS
    known = {_N: "N", k: "K"} | ({_GROUPS: f"K/{format.group}"} if format.group else {})
    for i, (name, type) in enumerate(format.parts("w", _N, k).items()):
        shape = ", ".join(known.get(int(d), str(d)) for d in type.shape)
        yield f"`{name.partition('.')[2] if i else 'codes'} {type.dtype.value} [{shape}]`"


def _options(format: Format) -> Iterator[str]:
    defaults = {f.name: f.default for f in fields(format)}
    for option, values in format.options.items():
        value = getattr(format, option, defaults[option])
        yield f"`{option}={str(value).lower()}`: {values}"
    if not format.options:
        yield "none"


def _paper(paper: str) -> str:
    match = re.fullmatch(r"arXiv:(\S+)", paper)
    return f"[{paper}](https://arxiv.org/abs/{match[1]})" if match else paper or "-"


def _text(kind: type[Format]) -> str:
    text = inspect.cleandoc(kind.__doc__ or "")
    return re.sub(r":\w+:`(\w+)`", r"`\1`", text).replace("``", "`")


def main() -> None:
    """Rewrite the page that is named."""
    page = Path(sys.argv[1])
    page.write_text(rewritten(page.read_text()))


if __name__ == "__main__":
    main()
