"""The introductory notebook's training loop, written anew from its facts: the baseline of speed.py.

torchvision's MNIST with ToTensor, a DataLoader, SGD at 0.05; after each epoch the training and the
validation set are evaluated, at the end the test set. Usage: tutorial_loop.py FOLDER linear|mlp EPOCHS,
where FOLDER holds MNIST/raw with unpacked files, as torchvision wants them.
"""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, random_split
from torchvision.datasets import MNIST
from torchvision.transforms import ToTensor


def make(name: str) -> nn.Module:
    if name == "linear":
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 50), nn.ReLU(), nn.Dropout(0.2),
        nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, 10),
    )  # fmt: skip


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader, loss_function: nn.Module) -> tuple[float, float]:
    model.eval()
    loss = correct = 0.0
    for images, labels in loader:
        logits = model(images)
        loss += loss_function(logits, labels).item()
        correct += (logits.argmax(1) == labels).sum().item()
    return loss / len(loader), 100 * correct / len(loader.dataset)


def main() -> None:
    folder, name, epochs = sys.argv[1], sys.argv[2], int(sys.argv[3])
    torch.manual_seed(0)
    training = MNIST(folder, train=True, transform=ToTensor())
    test = MNIST(folder, train=False, transform=ToTensor())
    training, validation = random_split(training, [48_000, 12_000])
    train_loader = DataLoader(training, batch_size=128, shuffle=True)
    val_loader = DataLoader(validation, batch_size=128)
    test_loader = DataLoader(test, batch_size=128)
    model = make(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loss_function = nn.CrossEntropyLoss()
    for epoch in range(epochs):
        model.train()
        for images, labels in train_loader:
            loss = loss_function(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        train, val = (evaluate(model, x, loss_function) for x in (train_loader, val_loader))
        print(f"epoch {epoch + 1}: train {train[0]:.4f} {train[1]:.2f} % val {val[0]:.4f} {val[1]:.2f} %")
    loss, accuracy = evaluate(model, test_loader, loss_function)
    print(f"test  {loss:.4f} {accuracy:.2f} %")


if __name__ == "__main__":
    main()
