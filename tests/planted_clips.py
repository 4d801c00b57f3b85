"""Drawn clips whose class depends on one frame, and a tiny 3-D network trained on them in seconds.

Every frame is grey noise with a bar that moves and says nothing. In one frame, at a random time and place,
stands a square: red in class 0, blue in class 1, none in others. The network has one sigmoid a class, so
that a logit can only rise by its square.
"""

import torch
from torch import nn
from torch.nn import functional as F

FRAMES, SIDE, SQUARE = 8, 16, 5


def drawn(count, seed, classes=3):
    """Clips (N, 3, T, H, W) in [0, 1], classes (N,), and where the square is, bool (N, T, H, W)."""
    draw = torch.Generator().manual_seed(seed)
    clips = 0.5 + 0.05 * torch.randn(count, 3, FRAMES, SIDE, SIDE, generator=draw)
    labels = torch.randint(classes, (count,), generator=draw)
    truth = torch.zeros(count, FRAMES, SIDE, SIDE, dtype=torch.bool)
    for i, label in enumerate(labels.tolist()):
        t, left = (int(torch.randint(n, (), generator=draw)) for n in (FRAMES, SIDE))
        y, x = (int(n) for n in torch.randint(SIDE - SQUARE + 1, (2,), generator=draw))
        for s in range(FRAMES):
            clips[i, :, s, :, (left + 2 * s) % SIDE] = 0.7
        if label < 2:
            truth[i, t, y : y + SQUARE, x : x + SQUARE] = True
            clips[i, :, truth[i]] = torch.tensor([[0.9, 0.2, 0.2], [0.2, 0.2, 0.9]])[label][:, None]
    return clips.clamp(0, 1), labels, truth


def trained(steps=100, seed=0):
    """The network, in eval mode, for clips less 0.5 and divided by 0.25."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv3d(3, 8, (1, 3, 3), (1, 2, 2), padding=(0, 1, 1)), nn.ReLU(),
        nn.Conv3d(8, 16, 3, padding=1), nn.ReLU(),
        nn.Conv3d(16, 16, (1, 3, 3), padding=(0, 1, 1)), nn.ReLU(),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(16, 2),
    )  # fmt: skip
    clips, labels, _ = drawn(128, seed + 1)
    x = (clips - 0.5) / 0.25
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for step in range(steps):
        chosen = torch.arange(16) + 16 * (step % 8)
        wanted = F.one_hot(labels[chosen], 3)[:, :2].float()
        loss = F.binary_cross_entropy_with_logits(net(x[chosen]), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()
