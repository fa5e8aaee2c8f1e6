"""How much attention a model parks on the first token: what sinks are kept for (StreamingLLM, arXiv:2309.17453)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

Array = np.ndarray[Any, Any]


def first_token(folder: Path, rows: Array) -> dict[str, float]:
    """Of queries in the second halves of texts [B, S]: ``first`` is the share of attention that the first token gets, in
    the mean of all heads, ``most`` that of the head where it is largest, ``even`` what all tokens alike would give it.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    half = rows.shape[1] // 2
    with torch.inference_mode():
        layers = model(torch.from_numpy(rows), output_attentions=True, use_cache=False).attentions
    heads = torch.cat([layer[:, :, half:, 0].mean((0, 2)) for layer in layers])
    even = np.mean(1 / np.arange(half + 1, rows.shape[1] + 1))
    return {"first": round(float(heads.mean()), 6), "most": round(float(heads.max()), 6), "even": round(float(even), 6)}
