"""The parts of the benchmarks on text that do not train."""

from __future__ import annotations

import torch

import neurms
from benchmarks import gpt2, leads, llama, scales, shapes, tagger
from benchmarks.language import Scale
from benchmarks.llama_step import Runner


def test_tags_that_training_lacks_are_never_right() -> None:
    pairs = [("λόγος", "n"), ("ἦν", "v")] * tagger.WINDOW
    words, labels = tagger.encode(pairs, {"n": 0})
    assert words.shape == (2, tagger.WINDOW, 3)
    assert set(labels.unique().tolist()) == {0, -1}
    assert torch.equal(words[0, 0], words[0, 2])
    assert not torch.equal(words[0, 0], words[0, 1])

    def always_n(words: torch.Tensor) -> torch.Tensor:
        return torch.tensor([1.0, 0.0]).expand(*words.shape[:2], 2)

    assert tagger.accuracy(always_n, (words, labels)) == 0.5


def test_dominance_is_watched_on_the_hidden_matrices_of_every_method() -> None:
    scale = Scale(width=8, layers=1, heads=2, batch=1, context=4, kind="gpt2")
    found = set()
    for method in gpt2.METHODS.values():
        model = scale.model(0)
        optimizer = method.make(model, 1e-3, 1e-3)
        model(torch.randint(256, (1, 4))).square().mean().backward()
        optimizer.step()
        seen = gpt2.dominance_watch(1)(1, model, optimizer)
        found.add(tuple(sorted(seen)))
    parts = ("c_attn", "c_fc", "c_proj", "mlp_proj")
    assert found == {tuple(f"blocks.0.{part}.weight" for part in parts)}


def test_a_model_s_matrices_are_all_counted() -> None:
    # 12 width^2 parameters a layer, in both families' terms.
    assert sum(m * n * k for (m, n), k in shapes.gpt2(64, 3).items()) == 3 * 12 * 64**2
    assert sum(m * n * k for (m, n), k in shapes.llama(64, 128, 2).items()) == 2 * (
        4 * 64**2 + 3 * 64 * 128
    )


def test_shapes_are_measured_for_both() -> None:
    found = shapes.measured((8, 4), rounds=2)
    assert set(found) == {"rmnp", "muon"}
    assert min(found.values()) > 0


def test_every_variant_can_be_made() -> None:
    scale = Scale(width=32, layers=1, heads=2, batch=1, context=4)
    groups = {**leads.GROUPS, "llama": llama.METHODS, "scales": scales.METHODS}
    for methods in groups.values():
        for method in methods.values():
            optimizer = method.make(scale.model(0), 1e-3, 1e-3)
            if isinstance(optimizer, neurms.NeuRMS):
                optimizer.detach()


def test_clipped_share_counts_units_whose_factor_is_cut_off() -> None:
    model = Scale(width=8, layers=1, heads=2, batch=1, context=4).model(0)
    for s_max, expected in ((1e-3, 1.0), (1e6, 0.0)):
        with neurms.NeuRMS(model, lr=0.0, s_max=s_max, variant="U") as optimizer:
            optimizer.zero_grad()
            model(torch.randint(256, (2, 4))).square().mean().backward()
            optimizer.step()
            assert leads.clipped_share(1)(1, model, optimizer) == {"clipped": expected}


def test_memory_of_a_method_is_measured_beside_its_prediction() -> None:
    scale = Scale(width=8, layers=1, heads=2, batch=1, context=4)
    runner = Runner(scales.METHODS["rmnp"], scale)
    runner.gradients()
    assert runner.steps(1) > 0
    memory = runner.memory()
    assert memory["state_bytes"] == memory["predicted_bytes"] > 0
