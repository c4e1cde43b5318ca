"""LoRA on any network: an MLP that reads handwritten digits learns to read them with colours inverted.

Run it with scikit-learn installed: python examples/digits.py
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lorafit import LoRAConfig, attach, detach, load, merge, save, set_scale, trainable_parameters, unmerge


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


def main() -> None:
    """Pretrain, adapt, scale, merge, save and load."""
    torch.manual_seed(0)
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    inverted = 1 - x
    test = slice(1400, None)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))

    def shown() -> str:
        upright, turned = accuracy(model, x[test], y[test]), accuracy(model, inverted[test], y[test])
        return f"upright digits {upright:.1%}, inverted {turned:.1%}"

    train(model, list(model.parameters()), x[:1400], y[:1400], epochs=60, lr=2e-3)
    print(f"base:      {shown()}")

    config = LoRAConfig(r=8, alpha=16)
    done = attach(model, config)
    print(f"adapter:   {done.trainable_params:,} trainable parameters beside {done.total_params:,} frozen ones")
    train(model, trainable_parameters(model), inverted[:1400], y[:1400], epochs=100, lr=3e-3)
    for scale in (0.0, 0.5, 1.0):
        set_scale(model, scale)
        print(f"scale {scale}: {shown()}")

    save(model, "digits-adapter", config)
    tuned = model(inverted[test])
    merge(model)
    print(f"merged:    the logits differ by {(model(inverted[test]) - tuned).abs().max():.0e} at most")
    unmerge(model)
    detach(model)
    print(f"detached:  {shown()}")
    load(model, "digits-adapter")
    print(f"loaded:    {shown()}")


if __name__ == "__main__":
    main()
