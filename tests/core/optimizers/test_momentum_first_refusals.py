"""Which layers have no gradient, and what needs one is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import neurms
from neurms import RMNP
from neurms.core.ground.errors import UnsupportedTrainingError
from tests.core.optimizers.momentum_models import (
    LINEAR,
    RULES,
    assert_close,
    assert_same,
    backward,
    batch,
    made,
    network,
    pair,
    snapshot,
    train,
)


class TestTaps:
    def test_detached_it_goes_on_at_the_step(self) -> None:
        (model, optimizer), (twin, other) = pair("rmnp")
        train(model, optimizer, range(2))
        optimizer.detach()
        assert type(model[4]) is nn.Linear
        train(model, optimizer, range(2, 4))
        assert model[4].weight.grad is not None
        nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        optimizer.zero_grad()
        optimizer.attach()
        train(model, optimizer, range(4, 6))
        assert model[4].weight.grad is None
        train(twin, other, range(6))
        assert_close(model, twin, 1e-12)

    def test_a_context_ends_them(self) -> None:
        model = network()
        with made("rmnp", model, update="backward"):
            assert type(model[4]) is not nn.Linear
        assert type(model[4]) is nn.Linear

    def test_a_dead_optimizer_moves_nothing(self) -> None:
        model = network()
        optimizer = made("rmnp", model, update="backward")
        with pytest.raises(ValueError, match="tapped already"):
            made("muon", model, update="backward")
        del optimizer
        backward(model, 0)
        assert model[4].weight.grad is not None
        model.zero_grad()
        train(model, made("muon", model, update="backward"), [0])

    def test_what_is_no_plain_linear_layer_has_its_gradient(self) -> None:
        class Special(nn.Linear):
            pass

        def models() -> nn.Sequential:
            torch.manual_seed(0)
            tied = nn.Linear(8, 6, bias=False)
            model = nn.Sequential(nn.Embedding(6, 8), Special(8, 8), nn.Linear(8, 8), tied)
            tied.weight = model[0].weight
            prune.l1_unstructured(model[2], "weight", 0.5)
            return model.double()

        results = []
        for update in ("backward", "step"):
            model = models()
            optimizer = made("rmnp", model, update=update)
            for _ in range(3):
                model(torch.arange(6)).square().mean().backward()
                assert all(p.grad is not None for p in model.parameters())
                optimizer.step()
                optimizer.zero_grad()
            results.append(model)
        assert_close(*results, 1e-12)

    def test_a_frozen_weight(self) -> None:
        model = network()
        model[4].weight.requires_grad_(False)
        optimizer = made("rmnp", model, update="backward")
        before = model[4].weight.clone()
        train(model, optimizer, range(2))
        assert torch.equal(before, model[4].weight)
        assert {r.name for r in optimizer.plan() if r.unformed_bytes} == {LINEAR[0], LINEAR[2]}

    def test_a_parameter_in_anothers_place(self) -> None:
        (model, optimizer), (twin, other) = pair("rmnp")
        for m, o in ((model, optimizer), (twin, other)):
            train(m, o, range(2))
            old = m[4].weight
            m[4].weight = nn.Parameter(old.detach().clone())
            group = next(g for g in o.param_groups if any(p is old for p in g["params"]))
            group["params"] = [m[4].weight if p is old else p for p in group["params"]]
            train(m, o, range(2, 5))
        assert model[4].weight.grad is None
        assert_close(model, twin, 1e-12)

    # Dynamo looks at the .grad of what the broken graph hands over.
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
    def test_in_a_compiled_model_the_graph_breaks_and_it_trains(self) -> None:
        (model, optimizer), (twin, other) = pair("rmnp")
        compiled = torch.compile(model, backend="eager")
        for step in range(3):
            optimizer.zero_grad()
            F.cross_entropy(compiled(batch(step)[0]), batch(step)[1]).backward()
            assert model[4].weight.grad is None
            optimizer.step()
        train(twin, other, range(3))
        assert_close(model, twin, 1e-12)
        torch._dynamo.reset()
        with pytest.raises(Exception, match="drop fullgraph=True"):
            torch.compile(model, backend="eager", fullgraph=True)(batch(0)[0])
        torch._dynamo.reset()


class TestRefusals:
    @pytest.mark.parametrize("name", RULES)
    def test_looking_ahead(self, name: str) -> None:
        match = r"nesterov=True cannot go.*pass nesterov=False"
        model = network()
        with pytest.raises(ValueError, match=match):
            made(name, model, update="backward", nesterov=True)
        assert type(model[4]) is nn.Linear
        optimizer = made(name, model, update="backward")
        extra = {"params": [nn.Parameter(torch.ones(2, 2))], "nesterov": True}
        with pytest.raises(ValueError, match=match):
            optimizer.add_param_group(extra)
        optimizer.param_groups[0]["nesterov"] = True
        before = snapshot(model, optimizer)
        with pytest.raises(ValueError, match=match):
            backward(model, 0)
        assert_same(before, snapshot(model, optimizer))

    @pytest.mark.parametrize("name", RULES)
    def test_no_momentum(self, name: str) -> None:
        with pytest.raises(ValueError, match=r"momentum=0\.0 cannot go.*pass a positive"):
            made(name, network(), update="backward", momentum=0.0)

    @pytest.mark.parametrize("name", RULES)
    def test_parameters_without_their_model(self, name: str) -> None:
        with pytest.raises(TypeError, match=r'params=list must be an nn\.Module.*update="step"'):
            made(name, list(network().parameters()), update="backward", head=None)  # type: ignore[arg-type]

    def test_in_a_group(self) -> None:
        for name in ("racs", "rmnp", "neurms"):
            model = network()
            groups = [{"params": model[4], "rule": "muon", "update": "backward"}]
            with pytest.raises(TypeError, match="'update', which holds for the whole optimizer"):
                neurms.create(name, model, groups=groups)
            assert type(model[4]) is nn.Linear
        alone = {"params": [model[4].weight], "rule": "muon", "update": "backward"}
        with pytest.raises(TypeError, match="update='backward', which holds for the whole"):
            neurms.RACS([alone])
        groups = [{"params": model[4], "rule": "muon"}]
        assert "update" not in neurms.create("racs", model, groups=groups).param_groups[0]

    def test_another_word(self) -> None:
        with pytest.raises(ValueError, match="update='forward'"):
            RMNP(network(), update="forward")  # type: ignore[arg-type]

    @pytest.mark.parametrize("name", RULES)
    def test_clipping(self, name: str) -> None:
        model = network()
        optimizer = made(name, model, update="backward")
        train(model, optimizer, [0])
        backward(model, 1)
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        before = snapshot(model, optimizer)
        with pytest.raises(UnsupportedTrainingError, match=r'clipping.*update="step"'):
            optimizer.step()
        assert_same(before, snapshot(model, optimizer))

    def test_a_gradscaler(self) -> None:
        model = network(torch.float32)
        optimizer = made("rmnp", model, update="backward")
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(F.cross_entropy(model(batch(0, torch.float32)[0]), batch(0)[1])).backward()
        before = copy.deepcopy(model)
        with pytest.raises(UnsupportedTrainingError, match="GradScaler"):
            scaler.step(optimizer)
        assert_close(model, before, 0.0)
        twin = network(torch.float32)
        other = made("rmnp", twin)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(F.cross_entropy(twin(batch(0, torch.float32)[0]), batch(0)[1])).backward()
        scaler.step(other)
        assert not torch.equal(twin[4].weight, before[4].weight)

    @pytest.mark.parametrize("asked", ["create_graph", "captured"])
    def test_what_needs_the_gradient_itself(self, asked: str) -> None:
        model = network()
        optimizer = made("rmnp", model, update="backward")
        before = snapshot(model, optimizer)
        loss = F.cross_entropy(model(batch(0)[0]), batch(0)[1])
        own: Any = {"create_graph": True} if asked == "create_graph" else {}
        wanted = model[7].bias if own else model[7].weight
        with pytest.raises(UnsupportedTrainingError, match=r'has no gradient; use update="step"'):
            torch.autograd.grad(loss, wanted, **own)
        assert_same(before, snapshot(model, optimizer))

    def test_a_weight_used_outside_its_layer(self) -> None:
        model = nn.Sequential(nn.Linear(3, 3))
        optimizer = made("rmnp", model, update="backward")
        weight = model[0].weight.detach().clone()
        F.linear(model(torch.randn(2, 3)), model[0].weight).sum().backward()
        with pytest.raises(UnsupportedTrainingError, match="used outside its layer"):
            optimizer.step()
        assert torch.equal(weight, model[0].weight)

    def test_several_ranks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = network()
        optimizer = made("rmnp", model, update="backward")
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
        with pytest.raises(UnsupportedTrainingError, match="trains on 2 ranks"):
            model(batch(0)[0])
        optimizer.detach()
        with pytest.raises(UnsupportedTrainingError, match="trains on 2 ranks"):
            optimizer.attach()
        assert type(model[4]) is nn.Linear

    def test_parts_of_a_batch_where_the_whole_is_needed(self) -> None:
        model = network()
        optimizer = made("lars", model, update="backward")
        backward(model, 0)
        before = snapshot(model, optimizer)
        with pytest.raises(UnsupportedTrainingError, match="second backward before"):
            backward(model, 1)
        assert_same(before, snapshot(model, optimizer))
        optimizer.step()
        train(model, optimizer, [1])
        shared = nn.Linear(3, 3)
        keep = made("lars", nn.Sequential(shared), update="backward")
        with pytest.raises(UnsupportedTrainingError, match="used a second time"):
            shared(shared(torch.ones(2, 3)))
        keep.detach()
