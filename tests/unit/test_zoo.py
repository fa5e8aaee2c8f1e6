"""The zoo's models build the same every time, run at every shape, and can be exported with dynamic sizes."""

import pytest
import torch

from tests.zoo import WINDOW, ZOO, ZooModel

entries = pytest.mark.parametrize("entry", ZOO.values(), ids=ZOO.keys())


@entries
def test_exported_program_equals_eager_at_every_shape(entry: ZooModel) -> None:
    model = entry.model()
    program = torch.export.export(
        model, (), entry.example(), dynamic_shapes=entry.dynamic_shapes(), strict=False
    ).module()
    for shape in entry.shapes:
        expected = entry.reference(model, shape)
        assert expected.isfinite().all(), shape
        torch.testing.assert_close(entry.output(program(**entry.inputs(shape))), expected, rtol=1e-5, atol=1e-5)


@entries
def test_output_is_large_enough_to_compare_and_depends_on_the_input(entry: ZooModel) -> None:
    model, shape = entry.model(), entry.shapes[0]
    first, other = (entry.output(model(**entry.inputs(shape, seed))) for seed in (1, 2))
    assert first.std() > 0.1
    assert (first - other).abs().max() > 0.01


@entries
def test_shapes_cover_batch_one_and_stay_within_the_bounds(entry: ZooModel) -> None:
    assert len(entry.shapes) >= 4
    assert any(shape[0] == 1 for shape in entry.shapes)
    assert min(entry.shapes[0]) >= 2
    for shape in entry.shapes:
        assert all(low <= n <= high for n, (low, high) in zip(shape, entry.dims.values(), strict=True))


@pytest.mark.parametrize("name", [name for name, entry in ZOO.items() if entry.is_causal])
def test_causal_models_ignore_later_tokens_and_see_earlier_ones(name: str) -> None:
    entry = ZOO[name]
    model, ids = entry.model(), entry.inputs((1, 13))["input_ids"]
    changed = ids.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 100 + 3
    same, differ = (entry.output(model(input_ids=tokens)) for tokens in (ids, changed))
    torch.testing.assert_close(same[:, :6], differ[:, :6], rtol=0, atol=1e-5)
    assert (same[:, 7:] - differ[:, 7:]).abs().max() > 1e-2


def test_sliding_window_changes_the_output() -> None:
    entry = ZOO["mistral"]
    model, ids = entry.model(), entry.inputs((1, 100))["input_ids"]
    changed = ids.clone()
    changed[0, 0] = (changed[0, 0] + 1) % 100 + 3
    difference = (entry.output(model(input_ids=ids)) - entry.output(model(input_ids=changed))).abs().amax(-1)[0]
    assert difference[: WINDOW - 1].max() > 1e-3
    assert difference[2 * WINDOW :].max() == 0  # two layers reach at most twice as far


def test_models_are_the_same_every_time() -> None:
    first, second = ZOO["llama"].model(), ZOO["llama"].model()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
