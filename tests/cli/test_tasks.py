import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from neurms.cli.data import DatasetError
from neurms.cli.network import Decoder
from neurms.cli.tasks import Images, Manual, manual


def test_the_parts_of_the_manual_do_not_overlap_and_make_all_of_it() -> None:
    from pydoc_data.topics import topics

    parts = manual()
    whole = sum(len(topic.encode()) for topic in topics.values())
    # Between topics of a part stands a line break.
    assert sum(map(len, parts.values())) == whole + 3 * (len(topics) - 1)
    for topic in list(topics.values())[:5]:
        text = topic.encode()
        cut = len(text) * 18 // 20
        assert text[:cut] in bytes(parts["train"].tolist())
        assert text[cut : len(text) * 19 // 20] in bytes(parts["validation"].tolist())


def test_a_python_without_its_manual_is_explained(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pydoc_data.topics", None)
    with pytest.raises(DatasetError, match="choose --data digits"):
        manual()


def test_text_before_training_is_about_uniform_and_judged_alike_each_time() -> None:
    task = Manual(10)
    model = task.model(0)
    assert task.judged(model, "test") == task.judged(model, "test")
    assert abs(task.judged(model, "validation") - math.log(256)) < 0.3
    first, again = (task.loss(model, torch.Generator().manual_seed(3)).item() for _ in range(2))
    assert first == again


def test_the_decoder_looks_at_no_later_byte() -> None:
    model = Decoder(16, 2, 2, 8)
    tokens = torch.randint(256, (2, 8))
    changed = tokens.clone()
    changed[:, 5:] = 0
    assert torch.equal(model(tokens)[:, :5], model(changed)[:, :5])
    assert not torch.equal(model(tokens)[:, 6:], model(changed)[:, 6:])


def test_an_epoch_of_images_sees_each_whole_batch_once_in_a_new_order() -> None:
    task = Images("digits", 1)
    model, generator = task.model(0), torch.Generator().manual_seed(0)
    orders = []
    for _ in range(2):
        task.loss(model, generator)
        orders.append(task._order.clone())
        for _ in range(task.steps - 1):
            task.loss(model, generator)
    assert not torch.equal(*orders)
    assert len(torch.unique(orders[0])) == len(orders[0])
    hits = model(task._held.inputs).argmax(1) == task._held.labels
    assert task.final(model) == pytest.approx(hits.double().mean().item())
    held = cross_entropy(model(task._held.inputs), task._held.labels)
    assert task.judged(model, "validation") == pytest.approx(held.item())


@pytest.mark.parametrize(("warmup", "first"), [(0.0, 1.0), (0.1, 0.1)])
def test_rates_rise_and_fall_to_zero(warmup, first) -> None:
    task = Manual(100)
    task.warmup = warmup
    rates = [task.rate(step) for step in range(101)]
    assert rates[0] == pytest.approx(first)
    assert max(rates) == 1.0
    assert rates[-1] == pytest.approx(0.0)
