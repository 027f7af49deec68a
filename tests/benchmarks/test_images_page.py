from benchmarks.autoencoder import TIMES
from benchmarks.tables import images
from benchmarks.tables.ablations import ablations
from benchmarks.tables.autoencoder import EVERY_STEP, PUBLISHED, autoencoder
from benchmarks.tables.cifar import cifar

ENVIRONMENT = {"commit": "abc", "versions": {"torch": "2"}, "machine": "some"}


def content(runs: dict, **more: object) -> dict:
    made = {"command": "neurms bench some --seeds 3", "environment": ENVIRONMENT}
    return {"runs": runs, "settings": {"steps": 300, "trials": 4}, **made, **more}


def timing(ms: float) -> dict[str, float]:
    return {"ms": ms, "ratio": ms / 2, "low": ms / 2, "high": ms / 2}


def perceptrons(**scores: list[float]) -> dict:
    runs: dict = {}
    for method, series in scores.items():
        name = method.replace("_", "-")
        start = f"mnist/4-2/1 s/{name}"
        runs[f"{start}/search/lr 0.1"] = {"accuracy": 0.5}
        for seed, accuracy in enumerate(series):
            key = f"{start}/steps 500/lr 0.1/seed {seed}"
            runs[key] = {"accuracy": accuracy, "state_bytes": 2000}
    times = {name.replace("_", "-"): timing(2.0) for name in scores}
    return {
        "perceptrons": content(runs),
        "step_times": content({"4-2 batch 128 threads 1": times}),
    }


AHEAD, BEHIND = [0.95, 0.951, 0.953], [0.90, 0.902, 0.903]


def test_answer_names_the_winner() -> None:
    won = images.page(perceptrons(NeuRMS_U=AHEAD, AdamW=BEHIND))
    lost = images.page(perceptrons(NeuRMS_U=BEHIND, AdamW=AHEAD))
    tied = images.page(perceptrons(NeuRMS_U=AHEAD, AdamW=[0.951, 0.950, 0.953]))
    assert "NeuRMS is significantly ahead of the best other method in 1 of 1" in won
    assert "significantly ahead of every other method tried in mnist 4-2 1 s." in won
    assert "significantly ahead of AdamW" in won
    assert "another method is significantly ahead of NeuRMS" in lost
    assert "significantly behind AdamW" in lost
    assert "cannot be told apart" in tied
    assert "| **NeuRMS-U** | 0.1 | 1 | 500 | 0.5000 | 0.9513 |" in won
    assert "| NeuRMS-U | 0.1 | 1 | 500 | 0.5000 | 0.9017 |" in lost


def test_epoch_is_steps_times_step_time() -> None:
    page = images.page(perceptrons(NeuRMS_U=AHEAD, AdamW=BEHIND))
    assert f"| AdamW | 2.00 | 1.00 (1.00..1.00) | {468 * 0.002:.2f} |" in page


def test_ablations_say_what_differs() -> None:
    runs = {}
    for name, series in {"U": AHEAD, "F": BEHIND, "beta .9": [0.951, 0.95, 0.953]}.items():
        runs[f"{name}/search/lr 0.1"] = {"accuracy": 0.5}
        for seed, accuracy in enumerate(series):
            runs[f"{name}/lr 0.1/seed {seed}"] = {"accuracy": accuracy}
    runs["rho/U/60 steps"] = {"every": 30, "rho": {"0": [0.1, 0.2, 0.25]}}
    text = ablations(content(runs))
    assert "differ from U significantly: F." in text
    assert "| F | 0.1 | 0.9017 | 0.0015 | -4.97 |" in text
    assert "| U, layer 0 | 0.10 | 0.20 | 0.25 |" in text


def test_cifar_compares_with_adamw() -> None:
    runs = {
        "small/AdamW/search, 5 steps, 90 images/lr 0.1": {"accuracy": 0.9},
        "small/Muon/search, 5 steps, 90 images/lr 0.1": {"accuracy": 0.5},
        "small/Muon/search, 5 steps, 90 images/lr 0.2": {"accuracy": 0.4},
        # Of another rate's run, or longer than this one.
        "small/Muon/search, 7 steps, 90 images/lr 0.2": {"accuracy": 0.6},
        "small/Muon/search, 10 steps, 90 images/lr 0.1": {"accuracy": 0.7},
    }
    found = {"AdamW": BEHIND, "Muon": AHEAD, "NeuRMS-U": [0.902, 0.903, 0.903]}
    for method, series in found.items():
        for seed, accuracy in enumerate(series):
            runs[f"small/{method}/9 steps, 100 images/lr 0.1/seed {seed}"] = {"accuracy": accuracy}
    text = cifar(content(runs))
    assert "Muon | 0.1 | 0.500, 5 steps | 0.9513 | 0.0015 | 3 | +4.97 |" in text
    assert "NeuRMS-U | 0.1 |  | 0.9027 |" in text
    assert text.index(": Muon |") < text.index(": AdamW |")
    assert "the best NeuRMS, NeuRMS-U, is -4.87 points from the best of the others, Muon" in text


def test_autoencoder_sets_the_paper_s_figures_beside_ours() -> None:
    runs, times = {}, {EVERY_STEP: {"seconds": 1.0}}
    for method, (loss, seconds, _) in PUBLISHED.items():
        for seed, noise in enumerate((0.0, 0.2 if method == "Adam" else 0.0, -0.1)):
            run = {"loss": loss + 10 + noise, "steps": 20, "curve": [9.0], "state_bytes": 3_000_000}
            runs[f"{method}/20 steps/lr 0.1/seed {seed}"] = run
        runs[f"{method}/search, 5 of 20 steps/lr 0.1"] = {"loss": 99.0, "steps": 5}
        times[method] = {"seconds": seconds / 500}
    long = {"loss": 50.0, "steps": 60, "curve": [9.0], "state_bytes": 3_000_000}
    runs["SharedBasis/60 steps/lr 0.2/seed 0"] = long
    text = autoencoder(content({**runs, f"{TIMES}1": times}))
    assert "| loss, 20 steps, 3 seeds | p | lr | loss, 60 steps, 1 seed |" in text
    assert "| SharedBasis | 0.1 | 61.5 (0.1) | .002 | 0.2 | 50.0 | 0.28 | 2.80 | 3.0 |" in text
    assert "SharedBasis's train loss is below Adam's (61.5 against 64.7, p = .002)" in text
    assert "takes 0.28 of the time of Shampoo(1000)'s with roots in every step and 0.25" in text
