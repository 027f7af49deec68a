import pytest
import torch

from neurms.compiled.backends import PROMPT, use_backend
from neurms.compiled.update import apply_updates_, scale_gradients_

SHAPES = {"bias": (7,), "matrix": (7, 5), "blocks": (2, 3, 4, 5), "depthwise": (6, 1, 1, 9)}
ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def scales(shape, features=True):
    """Scales as the kernels take them (m,), (n,), and the same as they broadcast in float64."""
    if len(shape) == 4:
        groups, units, inputs, _ = shape
        s, c = torch.rand(groups * units) + 0.1, torch.rand(groups * inputs) + 0.1
        full = s.double().view(groups, units, 1, 1), c.double().view(groups, 1, inputs, 1)
    else:
        s, c = torch.rand(shape[0]) + 0.1, torch.rand(shape[-1]) + 0.1
        full = s.double().view(-1, *[1] * (len(shape) - 1)), c.double()
    if len(shape) == 1 or not features:
        return s, None, full[0], 1.0
    return s, c, *full


def assert_moved(w, truth, size, rtol):
    """Rounding is relative to what was added, not to what cancelled."""
    error = (w.double() - truth).abs()
    assert bool((error <= rtol * size).all()), f"{(error / size).max():.2e} > {rtol:.1e}"


def move(form, w, g, s, c, rate=1.0, decay=1.0, velocity=None, **more):
    return form([w], [g], [velocity], [s], [c], [rate], [decay], **more)


def check_update(form, shape, *, dtype=torch.float32, features=True, size=1.0, decayed=True):
    w = (torch.randn(shape) * size).to(dtype)
    g = (torch.randn(shape) * size).to(dtype)
    start, gradient = w.clone().double(), g.clone()
    s, c, s_full, c_full = scales(shape, features)
    move(form, w, g, s, c, 0.05, 0.9 if decayed else 1.0)
    step = 0.05 * s_full * gradient.double() * c_full
    truth = (0.9 if decayed else 1.0) * start - step
    assert torch.equal(g, gradient)
    assert_moved(w, truth, start.abs() + step.abs(), ROUNDING[dtype])


class TestScaledUpdate:
    @pytest.mark.parametrize("features", [False, True])
    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    def test_against_float64(self, backend, shape, features):
        check_update(apply_updates_.on(backend), shape, features=features)

    @pytest.mark.parametrize("dtype", ROUNDING)
    @pytest.mark.parametrize("shape", [(7, 5), (2, 3, 4, 5)])
    def test_dtypes_round_once(self, patient_backend, dtype, shape):
        check_update(apply_updates_.on(patient_backend), shape, dtype=dtype)
        check_update(apply_updates_.on(patient_backend), shape, dtype=dtype, decayed=False)

    @pytest.mark.parametrize("size", [1e-30, 1e30])
    def test_extreme_scales(self, backend, size):
        check_update(apply_updates_.on(backend), (7, 5), size=size)

    def test_denormals(self, backend):
        w, g = torch.zeros(3, 2), torch.full((3, 2), 1e-40)
        move(apply_updates_.on(backend), w, g, torch.full((3,), 100.0), None)
        torch.testing.assert_close(w, torch.full((3, 2), -1e-38), rtol=1e-5, atol=0)

    @pytest.mark.parametrize("shape", [(33, 7), (1, 100), (1, 40, 3, 2), (40, 1, 3, 2), (70,)])
    @pytest.mark.parametrize("features", [False, True])
    @pytest.mark.usefixtures("small_tiles")
    def test_tiles(self, shape, features):
        check_update(apply_updates_.eager, shape, features=features)

    def test_a_large_weight(self, patient_backend):
        check_update(apply_updates_.on(patient_backend), (1201, 1003))

    def test_views_reach_the_parameter(self, patient_backend):
        conv = torch.nn.Conv2d(4, 6, 3, groups=2).to(memory_format=torch.channels_last)
        weight = conv.weight.detach()
        before, g = weight.clone(), torch.randn_like(weight)
        s, c = torch.rand(6), torch.rand(4)
        move(
            apply_updates_.on(patient_backend),
            weight.view(2, 3, 2, 3, 3).movedim(2, 2).flatten(3)
            if weight.is_contiguous()
            else weight.unflatten(0, (2, 3)).flatten(3),
            g.unflatten(0, (2, 3)).flatten(3),
            s,
            c,
            0.5,
        )
        per_input = torch.stack([c[:2]] * 3 + [c[2:]] * 3)[:, :, None, None]
        truth = before - 0.5 * s.view(6, 1, 1, 1) * g * per_input
        torch.testing.assert_close(conv.weight.detach(), truth)

    def test_transposed_weight(self, patient_backend):
        kernel = torch.zeros(5, 7)
        g, s = torch.randn(5, 7), torch.rand(7)
        move(apply_updates_.on(patient_backend), kernel.t(), g.t(), s, None)
        torch.testing.assert_close(kernel, -g * s)

    def test_zero_rows_and_empty_weights(self, backend):
        w, g = torch.ones(2, 3), torch.randn(2, 3)
        move(apply_updates_.on(backend), w, g, torch.tensor([0.0, 1.0]), None)
        assert w[0].tolist() == [1.0] * 3
        empty = torch.ones(0, 3)
        move(apply_updates_.on(backend), empty, empty.clone(), torch.ones(0), None)

    @pytest.mark.parametrize("nesterov", [False, True])
    def test_without_scales_is_torchs_sgd(self, backend, nesterov):
        w = torch.randn(9, 4)
        theirs = torch.nn.Parameter(w.clone())
        sgd = torch.optim.SGD([theirs], lr=0.03)
        for _ in range(20):
            theirs.grad = torch.randn(9, 4)
            move(apply_updates_.on(backend), w, theirs.grad, None, None, 0.03)
            sgd.step()
        torch.testing.assert_close(w, theirs.detach(), rtol=1e-7 * 20, atol=1e-7)

    @pytest.mark.parametrize("bad", ["s", "c", "g", "bias"])
    @pytest.mark.parametrize("form", [apply_updates_.eager, apply_updates_.on(PROMPT)])
    def test_what_does_not_fit_is_refused_before_anything_changes(self, form, bad):
        w, g, s, c = torch.ones(4, 3), torch.ones(4, 3), torch.ones(4), torch.ones(3)
        match bad:
            case "s":
                s, message = torch.ones(3), r"s of shape .*3.* every unit of w"
            case "c":
                c, message = torch.ones(4), r"c of shape .*4.* every feature of w"
            case "g":
                g, message = torch.ones(3), r"gradient of shape .*3.* shape of w"
            case "bias":
                w, g, message = torch.ones(4), torch.ones(4), r"c of shape .*3"
        first = torch.ones(2)
        with pytest.raises(ValueError, match=message):
            form(
                *([first, w], [torch.ones(2), g], [None] * 2, [None, s], [None, c]),
                *([1.0] * 2, [0.5] * 2),
            )
        assert bool((w == 1).all())
        assert bool((first == 1).all())


def momentum_truth(w, gradients, s, c, scale_velocity, nesterov):
    w, velocity = w.double(), torch.zeros(w.shape, dtype=torch.float64)
    for g in gradients:
        entering = s * g.double() * c
        velocity = 0.9 * velocity + entering
        moving = 0.9 * velocity + entering if nesterov else velocity
        w = 0.99 * w - 0.05 * (s * moving * c if scale_velocity else moving)
    return w, velocity


def check_momentum(
    form, shape, *, dtype=torch.float32, scale_velocity=False, features=True, nesterov=False
):
    w, velocity = torch.randn(shape).to(dtype), torch.zeros(shape).to(dtype)
    gradients = [torch.randn(shape).to(dtype) for _ in range(3)]
    s, c, s_full, c_full = scales(shape, features)
    truth, v_truth = momentum_truth(w, gradients, s_full, c_full, scale_velocity, nesterov)
    for g in gradients:
        kept = g.clone()
        more = {"momentum": 0.9, "scale_velocity": scale_velocity, "nesterov": nesterov}
        move(form, w, g, s, c, 0.05, 0.99, velocity, **more)
        assert torch.equal(g, kept)
    rtol = ROUNDING[dtype] * 3
    torch.testing.assert_close(w.double(), truth, rtol=rtol, atol=rtol)
    torch.testing.assert_close(velocity.double(), v_truth, rtol=rtol, atol=rtol)


class TestScaledMomentumUpdate:
    @pytest.mark.parametrize("nesterov", [False, True])
    @pytest.mark.parametrize("scale_velocity", [False, True])
    @pytest.mark.parametrize("shape", [(7, 5), (2, 3, 4, 5)])
    def test_against_float64(self, backend, shape, scale_velocity, nesterov):
        how = {"scale_velocity": scale_velocity, "nesterov": nesterov}
        check_momentum(apply_updates_.on(backend), shape, **how)

    @pytest.mark.parametrize("features", [False, True])
    @pytest.mark.parametrize("scale_velocity", [False, True])
    @pytest.mark.parametrize("shape", [(7,), (33, 70), (2, 30, 4, 5), (300, 250)])
    def test_nesterovs_step_in_native_form(self, shape, scale_velocity, features):
        how = {"scale_velocity": scale_velocity, "features": features, "nesterov": True}
        check_momentum(apply_updates_.on(PROMPT), shape, **how)

    @pytest.mark.parametrize("scale_velocity", [False, True])
    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    def test_unit_scales_only(self, patient_backend, shape, scale_velocity):
        form = apply_updates_.on(patient_backend)
        check_momentum(form, shape, scale_velocity=scale_velocity, features=False)

    @pytest.mark.parametrize("nesterov", [False, True])
    @pytest.mark.parametrize("dtype", ROUNDING)
    def test_dtypes(self, patient_backend, dtype, nesterov):
        form = apply_updates_.on(patient_backend)
        check_momentum(form, (7, 5), dtype=dtype, nesterov=nesterov)

    @pytest.mark.parametrize("nesterov", [False, True])
    @pytest.mark.parametrize("shape", [(33, 7), (1, 40, 3, 2), (40, 1, 3, 2)])
    @pytest.mark.parametrize("scale_velocity", [False, True])
    @pytest.mark.usefixtures("small_tiles")
    def test_tiles(self, shape, scale_velocity, nesterov):
        how = {"scale_velocity": scale_velocity, "nesterov": nesterov}
        check_momentum(apply_updates_.eager, shape, **how)

    def test_a_large_weight(self, patient_backend):
        check_momentum(apply_updates_.on(patient_backend), (1201, 1003))

    @pytest.mark.parametrize("nesterov", [False, True])
    def test_without_scales_is_torchs_sgd(self, backend, nesterov):
        w = torch.randn(9, 4)
        velocity = torch.zeros(9, 4)
        theirs = torch.nn.Parameter(w.clone())
        sgd = torch.optim.SGD([theirs], lr=0.03, momentum=0.9, nesterov=nesterov)
        for _ in range(20):
            theirs.grad = torch.randn(9, 4)
            form = apply_updates_.on(backend)
            how = {"momentum": 0.9, "nesterov": nesterov}
            move(form, w, theirs.grad, None, None, 0.03, 1.0, velocity, **how)
            sgd.step()
        torch.testing.assert_close(w, theirs.detach(), rtol=1e-7 * 20, atol=2e-7)

    def test_what_does_not_fit_is_refused_before_anything_changes(self):
        w, velocity, g = torch.ones(4, 3), torch.ones(4, 3), torch.ones(4, 3)
        with pytest.raises(ValueError, match="s of shape"):
            move(apply_updates_, w, g, torch.ones(3), None, velocity=velocity)
        with pytest.raises(ValueError, match="velocity of shape"):
            move(apply_updates_, w, g, None, None, velocity=torch.ones(3))
        assert bool((velocity == 1).all())
        assert bool((w == 1).all())


def scale(backend, g, s, c):
    with use_backend(backend):
        scale_gradients_([g], [s], [c])


class TestScaleGradients:
    @pytest.mark.parametrize("shape", [(7, 5), (2, 3, 4, 5), (300, 200)])
    def test_against_float64(self, backend, shape):
        for form in (backend, "auto"):
            g = torch.randn(shape)
            s, c, s_full, c_full = scales(shape)
            truth = s_full * g.double() * c_full
            scale(form, g, s, c)
            torch.testing.assert_close(g.double(), truth, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("dtype", ROUNDING)
    def test_dtypes_round_once(self, patient_backend, dtype):
        g = torch.randn(7, 5).to(dtype)
        s, c, s_full, c_full = scales((7, 5))
        truth = s_full * g.double() * c_full
        scale(patient_backend, g, s, c)
        torch.testing.assert_close(g.double(), truth, rtol=ROUNDING[dtype], atol=0)

    def test_one_side_or_none(self, patient_backend):
        g = torch.ones(2, 3)
        scale(patient_backend, g, None, None)
        assert torch.equal(g, torch.ones(2, 3))
        scale(patient_backend, g, None, torch.tensor([1.0, 2.0, 3.0]))
        scale(patient_backend, g, torch.tensor([1.0, 10.0]), None)
        assert g.tolist() == [[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]]
        bias = torch.ones(2)
        scale(patient_backend, bias, torch.tensor([1.0, 10.0]), None)
        assert bias.tolist() == [1.0, 10.0]

    def test_an_infinity_stays_one(self, patient_backend):
        for shape in ((2, 3), (200, 300)):
            g = torch.full(shape, torch.inf)
            scale("auto" if shape[0] == 200 else patient_backend, g, torch.ones(shape[0]), None)
            assert bool((g == torch.inf).all())

    @pytest.mark.usefixtures("small_tiles")
    def test_tiles(self):
        for shape in [(33, 7), (1, 40, 3, 2), (40, 1, 3, 2)]:
            g = torch.randn(shape)
            s, c, s_full, c_full = scales(shape)
            truth = s_full * g.double() * c_full
            scale("eager", g, s, c)
            torch.testing.assert_close(g.double(), truth, rtol=1e-6, atol=0)
