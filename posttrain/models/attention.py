"""Proves on the live model that packed documents do not see each other."""

from __future__ import annotations

import torch

from posttrain.errors import StageError

_LENGTHS = (7, 9)
_TOLERANCE = 1e-6  # the same computation on the same shapes: kernels give the same bits, or nearly


@torch.no_grad()
def check_isolation(model: torch.nn.Module, vocabulary: int) -> float:
    """Changes the first document of a packed row and looks whether the second one's logits move.

    Args:
        vocabulary: ids below it are valid.

    Returns:
        The largest move, relative to the largest logit.

    Raises:
        StageError: the attention backend lets packed documents see each other.
    """
    device = next(model.parameters()).device
    training = {module: module.training for module in model.modules()}
    model.train()  # 4-bit layers use other kernels in eval mode
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    generator = torch.Generator().manual_seed(0)
    one, other, second = (torch.randint(0, vocabulary, (1, n), generator=generator) for n in (*_LENGTHS[:1] * 2, 9))
    positions = torch.cat([torch.arange(n) for n in _LENGTHS])[None].to(device)
    logits = []
    for first in (one, other):
        ids = torch.cat([first, second], dim=1).to(device)
        with torch.random.fork_rng():  # dropout inside attention falls alike in both passes
            output = model(input_ids=ids, position_ids=positions, use_cache=False)
        logits.append(output.logits[:, _LENGTHS[0] :].float())
    for module, mode in training.items():
        module.training = mode
    moved = ((logits[0] - logits[1]).abs().max() / logits[0].abs().max().clamp(min=1e-6)).item()
    if not moved <= _TOLERANCE:
        raise StageError(
            "attention",
            f"packed documents see each other (logits move by {moved:.2g} of their size)",
            "set runtime.attn_implementation to sdpa or eager",
        )
    return moved
