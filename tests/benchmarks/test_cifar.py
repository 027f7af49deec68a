import io

import numpy as np
import pytest
import torch
from PIL import Image

import neurms
from benchmarks import cifar


def test_resnet20_is_the_published_network() -> None:
    model = cifar.resnet20()
    # He et al., 2016: 0.27 M parameters, 20 layers with weights.
    layers = [m for m in model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert len(layers) == 20
    assert sum(p.numel() for p in model.parameters()) == 269_722
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_a_wider_block_subsamples_and_keeps_its_shortcut() -> None:
    block = cifar.Block(4, 8).eval()
    for layer in block.layers:
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.zeros_(layer.weight)
    inputs = torch.rand(1, 4, 6, 6)
    outputs = block(inputs)
    torch.testing.assert_close(outputs[:, :4], inputs[:, :, ::2, ::2])
    assert outputs[:, 4:].abs().max() == 0


def test_flip_mirrors_some_and_changes_no_other() -> None:
    inputs = torch.rand(64, 3, 4, 4)
    flipped = cifar.flip(inputs, torch.Generator().manual_seed(0))
    same = (flipped == inputs).flatten(1).all(1)
    mirrored = (flipped == inputs.flip(3)).flatten(1).all(1)
    assert bool((same ^ mirrored).all())
    assert 16 < int(mirrored.sum()) < 48


def test_images_are_decoded_and_standardised(tmp_path, monkeypatch) -> None:
    stream, offsets = io.BytesIO(), [0]
    for value in (0, 255, 128):
        Image.new("RGB", (32, 32), (value, value, value)).save(stream, "JPEG")
        offsets.append(stream.tell())
    labels = np.array([3, 1, 2], dtype=np.uint8)
    data = np.frombuffer(stream.getvalue(), dtype=np.uint8)
    arrays = {"jpg_train": data, "off_train": np.array(offsets), "y_train": labels}
    np.savez(tmp_path / "cifar10_jpeg.npz", **arrays)
    monkeypatch.setenv("NEURMS_DATA", str(tmp_path))
    cifar.images.cache_clear()
    split = cifar.images("train", 2)
    cifar.images.cache_clear()
    assert split.inputs.shape == (2, 3, 32, 32)
    assert split.labels.tolist() == [3, 1]
    torch.testing.assert_close(
        split.inputs[1, :, 0, 0], (1 - torch.tensor([0.4913, 0.4821, 0.4465])) / 0.25
    )


def test_missing_images_name_the_cure(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("NEURMS_DATA", str(tmp_path))
    cifar.images.cache_clear()
    with pytest.raises(SystemExit, match="NEURMS_DATA"):
        cifar.images("train", 2)


@pytest.mark.parametrize("name", cifar.CHOSEN)
def test_every_method_takes_convolutions(name: str) -> None:
    model = cifar.small()
    optimizer = cifar.chosen(name).make(model, 1e-3)
    # Biases before a batch norm have no gradient.
    weights = [p for p in model.parameters() if p.ndim > 1]
    before = [p.detach().clone() for p in weights]
    model(torch.rand(4, 3, 32, 32)).square().mean().backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, weights, strict=True))
    if isinstance(optimizer, neurms.NeuRMS):
        optimizer.detach()
