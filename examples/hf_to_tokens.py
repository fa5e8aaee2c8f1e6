"""From a Hugging Face folder to tokens: compile it, save it, load it again, continue a text.

    python examples/hf_to_tokens.py [FOLDER] [--prompt TEXT] [--tokens 48]

Compiling needs the ``compile`` extra; ``generate`` needs ``tilewright[text]`` alone.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import tilewright

SMALL_LM = Path(__file__).parents[1] / "tests" / "models" / "small-lm"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=SMALL_LM)
    parser.add_argument("--prompt", default="def read_config(path):")
    parser.add_argument("--tokens", type=int, default=48)
    return parser.parse_args()


def generate(artifact: Path, text: str, count: int) -> list[int]:
    """At most ``count`` new tokens, chosen greedily, from an artifact alone."""
    tokenizer = tilewright.Tokenizer(artifact)
    with tilewright.load(artifact).session() as session:
        [new] = session.generate([tokenizer.encode(text)], count, stop_tokens=tokenizer.stop_tokens)
    return new


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory() as folder:
        artifact = Path(folder) / "model.tw"
        compiled = tilewright.compile(options.folder, out=artifact)
        print(compiled.report.summary())
        tokens = generate(artifact, options.prompt, options.tokens)
        print(options.prompt + tilewright.Tokenizer(artifact).decode(tokens))
        print("tokens:", *tokens)


if __name__ == "__main__":
    main()
