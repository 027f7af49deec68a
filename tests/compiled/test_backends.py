import copy
import logging
import pickle
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from neurms.compiled import _forms, backends
from neurms.compiled import moments as moments_module
from neurms.compiled import update as update_module
from neurms.compiled.backends import (
    PROMPT,
    Kernel,
    compilations,
    kernel,
    use_backend,
    validate_backend,
)
from neurms.compiled.moments import moment_factors
from neurms.compiled.reductions import column_square_sum
from neurms.compiled.update import apply_updates_

from .conftest import inductor

ONE = torch.tensor(1.0)


@kernel
def doubled_(x: Tensor, by: Tensor | None = None) -> Tensor:
    """Double a tensor in place."""
    if by is None:
        return x.mul_(2.0)
    return x.mul_(by)


@kernel
def row_sums(x: Tensor) -> Tensor:
    """Sum rows."""
    return x.sum(1)


@kernel
def failing(x: Tensor) -> Tensor:
    """Fail in the compiler only."""
    return x + 1


class TestNames:
    @pytest.mark.parametrize("name", backends.BACKENDS)
    def test_known_names_pass(self, name):
        assert validate_backend(name) == name

    def test_the_error_names_argument_value_and_choices(self):
        with pytest.raises(ValueError, match=r"backend='jax'.*'eager', 'inductor'"):
            validate_backend("jax")

    def test_unknown_names_are_refused_where_they_enter(self):
        with pytest.raises(ValueError, match="backend='x'"), use_backend("x"):
            pass
        with pytest.raises(ValueError, match="backend='x'"):
            doubled_.on("x")


class TestContext:
    def test_nests_and_is_restored(self):
        seen = [backends.current_backend()]
        with use_backend("eager"):
            with use_backend("torchscript"):
                seen.append(backends.current_backend())
            seen.append(backends.current_backend())
        seen.append(backends.current_backend())
        assert seen == ["auto", "torchscript", "eager", "auto"]

    def test_is_restored_after_an_exception(self):
        with pytest.raises(KeyError), use_backend("eager"):
            raise KeyError
        assert backends.current_backend() == "auto"

    def test_does_not_follow_into_threads_but_on_does(self):
        seen = []
        fixed = doubled_.on("torchscript")

        def work():
            seen.append(backends.current_backend())
            seen.append(fixed(torch.ones(2)).tolist())

        with use_backend("torchscript"):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        assert seen == ["auto", [2.0, 2.0]]

    @inductor
    def test_auto_never_compiles(self):
        before = compilations(column_square_sum)
        for _ in range(20):
            column_square_sum(torch.ones(7, 3))
        assert compilations(column_square_sum) == before


class TestKernel:
    def test_is_called_by_keyword_on_every_backend(self, backend):
        assert doubled_.on(backend)(x=torch.ones(2)).tolist() == [2.0, 2.0]
        assert doubled_.on(backend)(torch.ones(2), by=ONE * 3).tolist() == [3.0, 3.0]

    def test_changes_a_parameter_and_records_nothing(self, backend):
        parameter = nn.Parameter(torch.ones(3))
        result = doubled_.on(backend)(parameter)
        assert parameter.tolist() == [2.0] * 3
        assert parameter.requires_grad
        assert parameter.grad_fn is None
        assert result.data_ptr() == parameter.data_ptr()

    def test_pickles_and_copies_by_name(self):
        assert copy.deepcopy(column_square_sum) is column_square_sum
        assert pickle.loads(pickle.dumps(column_square_sum)) is column_square_sum

    def test_keeps_its_name_and_documentation(self):
        assert isinstance(column_square_sum, Kernel)
        assert column_square_sum.__doc__.startswith("Sum of squares of every column.")
        assert repr(column_square_sum) == "<kernel neurms.compiled.reductions.column_square_sum>"

    def test_is_traced_through_by_a_users_compiled_function(self):
        @torch.compile(backend="aot_eager", fullgraph=True)
        def users(x):
            return column_square_sum(x) + 1

        assert users(torch.ones(4, 2)).tolist() == [5.0, 5.0]

    def test_torchscript_is_silent(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert kernel(failing.eager).on("torchscript")(ONE) == 2


class TestMissingCompiler:
    @pytest.fixture
    def without_compiler(self, monkeypatch):
        monkeypatch.setattr(_forms, "has_cpp_compiler", lambda: False)
        monkeypatch.setattr(_forms, "_warned_no_compiler", threading.Event())

    @pytest.mark.usefixtures("without_compiler")
    def test_warns_once_with_the_cure_and_runs_eager(self):
        with pytest.warns(RuntimeWarning, match=r"C\+\+ compiler.*g\+\+.*CXX.*backend='eager'"):
            first = doubled_.on("inductor")(torch.ones(2))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            second = row_sums.on("inductor")(torch.ones(2, 3))
        assert first.tolist() == [2.0, 2.0]
        assert second.tolist() == [3.0, 3.0]

    def test_is_detected(self, monkeypatch):
        from torch._inductor import cpp_builder
        from torch._inductor.exc import InvalidCxxCompiler

        def none_found():
            raise InvalidCxxCompiler

        monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none_found)
        assert _forms.has_cpp_compiler.__wrapped__() is False

    @inductor
    def test_no_other_failure_is_swallowed(self, monkeypatch):
        def broken(graph, inputs):
            raise OSError("no space left")

        monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", broken)
        with pytest.raises(Exception, match="no space left"):
            failing.on("inductor")(torch.ones(2))


@inductor
class TestCompilations:
    def test_schedules_never_recompile(self):
        w, g, s, c = torch.ones(6, 5), torch.full((6, 5), 1e-3), torch.ones(6), torch.ones(5)
        update, factors = apply_updates_.on("inductor"), moment_factors.on("inductor")
        inner = update_module._move, moments_module._factors
        before = None
        for step in range(1000):
            rate = 0.1 / (1 + step)
            update([w], [g], [w.clone()], [s], [c], [rate], [1 - 0.01 * rate], 1 - rate, rate)
            factors([s], [1 - 0.9 ** (step + 1)], 1e-8, 1e-12, 0.0, 100.0)
            if step == 0:
                before = [compilations(kernel) for kernel in inner]
        assert min(before) > 0
        assert [compilations(kernel) for kernel in inner] == before

    def test_a_batch_size_recompiles_at_most_once(self):
        counted = kernel(column_square_sum.eager)
        for rows in (16, 7, 16, 3, 128, 33, 2):
            x = torch.full((rows, 5), 2.0)
            assert counted.on("inductor")(x).tolist() == [4.0 * rows] * 5
        assert 1 <= compilations(counted) <= 2

    def test_many_layers_share_a_few_graphs(self):
        counted = update_module._move
        before = compilations(counted)
        for m, n in [(8, 8), (4, 9), (16, 2), (9, 4), (32, 32), (5, 7), (6, 11), (3, 13), (2, 17)]:
            w = nn.Parameter(torch.zeros(m, n))
            item = [w], [torch.ones(m, n)], [None], [torch.ones(m)], [None], [1.0], [1.0]
            apply_updates_.on("inductor")(*item)
            assert bool((w == -1).all())
        assert compilations(counted) <= before + 3

    @pytest.mark.slow
    def test_more_kinds_of_calls_than_torchs_bound(self):
        counted = kernel(doubled_.eager)
        dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
        for dims in (1, 2, 3):
            for dtype in dtypes:
                x = torch.ones((3,) * dims, dtype=dtype)
                assert bool((counted.on("inductor")(x) == 2).all())
        assert compilations(counted) == 12 > torch._dynamo.config.recompile_limit

    def test_grad_mode_does_not_matter(self):
        counted = kernel(column_square_sum.eager)
        x = torch.ones(4, 3, requires_grad=True)
        result = counted.on("inductor")(x)
        assert not result.requires_grad
        with torch.no_grad():
            counted.on("inductor")(x.detach())
        assert compilations(counted) == 1

    def test_inside_a_double_backward(self):
        counted = kernel(column_square_sum.eager)
        layer, x = nn.Linear(3, 4), torch.ones(5, 3, requires_grad=True)
        sums = []
        z = layer(x)
        z.register_hook(lambda d: sums.append(counted.on("inductor")(d)) or d)
        (slope,) = torch.autograd.grad(z.square().sum(), x, create_graph=True)
        slope.square().sum().backward()
        torch.testing.assert_close(sums[0], (2 * z).detach().square().sum(0))
        assert 1 <= compilations(counted) <= 2

    def test_threads_compile_once_and_agree(self):
        counted = kernel(column_square_sum.eager)
        x = torch.arange(12.0).reshape(4, 3)
        with ThreadPoolExecutor(8) as pool:
            sums = list(pool.map(lambda _: counted.on("inductor")(x), range(64)))
        for result in sums:
            torch.testing.assert_close(result, x.square().sum(0))
        assert compilations(counted) == 1

    def test_the_wait_is_announced(self, caplog):
        counted = kernel(row_sums.eager)
        with caplog.at_level(logging.INFO, logger="neurms.compiled"):
            counted.on("inductor")(torch.ones(2, 3))
            first = list(caplog.messages)
            counted.on("inductor")(torch.ones(2, 3))
        assert any(message.startswith("compiling row_sums") for message in first)
        assert any(message.startswith("compiled row_sums in") for message in first)
        assert caplog.messages == first


@pytest.mark.parametrize("backend", ["auto", PROMPT])
def test_native_forms_serve_calls_that_leave_arguments_out(backend):
    seen = []

    def plus(x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        return x if y is None else x + y

    own = kernel(plus)
    own._native = lambda x, y: seen.append(y) or plus(x, y)
    own._suits = own._fits = lambda x, y: True
    form = own.on(backend)
    form(ONE)
    form(ONE, ONE)
    form(ONE, None)
    assert len(seen) == 3
