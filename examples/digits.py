"""LoRA on any network: an MLP and a convolutional network that read digits learn to read them with colours inverted.

Each is adapted in three ways: its last layer alone (the head), LoRA on all layers, and all weights.
Run it with scikit-learn installed: python examples/digits.py
"""

from copy import deepcopy

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lorafit import LoRAConfig, attach, detach, load, merge, save, set_scale, trainable_parameters, unmerge

CONFIG = LoRAConfig(r=8, alpha=16)
TRAIN, TEST = slice(1400), slice(1400, None)


def mlp() -> nn.Module:
    """Three linear layers."""
    hidden = nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(128, 10))


def cnn() -> nn.Module:
    """Two convolutions and a linear layer."""
    first = nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
    second = nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(128, 10))


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of images that are read right."""
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


def train(model: nn.Module, parameters: list[nn.Parameter], x: Tensor, y: Tensor, epochs: int, lr: float) -> None:
    """Plain PyTorch: nothing in here knows of LoRA."""
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()


def adapt(name: str, base: nn.Module, x: Tensor, inverted: Tensor, y: Tensor) -> None:
    """Train head, LoRA and all weights on inverted digits, from the same base; then scale, merge, save and load."""

    def show(what: str, model: nn.Module, parameters: list[nn.Parameter] | None = None) -> None:
        count = "" if parameters is None else f"{sum(p.numel() for p in parameters):,}"
        upright, turned = accuracy(model, x[TEST], y[TEST]), accuracy(model, inverted[TEST], y[TEST])
        print(f"  {what:18} {count:>9} {upright:9.1%} {turned:9.1%}")

    print(f"{name:20} trainable   upright  inverted")
    show("base", base, [])
    head, tuned, full = deepcopy(base), deepcopy(base), deepcopy(base)
    attach(tuned, CONFIG)  # any nn.Module: freezes it, adds the adapters
    ways = [
        ("head alone", head, list(head[-1].parameters()), 3e-3),
        ("LoRA", tuned, trainable_parameters(tuned), 1e-2),
        ("all weights", full, list(full.parameters()), 3e-3),
    ]
    for what, model, parameters, lr in ways:
        train(model, parameters, inverted[TRAIN], y[TRAIN], epochs=60, lr=lr)
        show(what, model, parameters)
    for scale in (0.0, 0.5, 1.0):
        set_scale(tuned, scale)  # 0 is the base, bitwise; 1 the tuned model
        show(f"LoRA, scale {scale}", tuned)

    save(tuned, f"digits-{name}", CONFIG)  # PEFT's format
    before = tuned(inverted[TEST])
    merge(tuned)  # no overhead; unmerge(model) restores it bitwise
    off = (tuned(inverted[TEST]) - before).abs().max()
    show("merged", tuned)
    unmerge(tuned)
    detach(tuned)  # the plain model again
    show("detached", tuned)
    load(tuned, f"digits-{name}")
    show("loaded", tuned)
    print(f"  merging moves the logits by {off:.0e} at most\n")


def main() -> None:
    """Pretrain both networks on upright digits, and adapt them."""
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    for name, make in (("mlp", mlp), ("cnn", cnn)):
        torch.manual_seed(0)
        model = make()
        train(model, list(model.parameters()), x[TRAIN], y[TRAIN], epochs=40, lr=2e-3)
        adapt(name, model, x, 1 - x, y)


if __name__ == "__main__":
    main()
