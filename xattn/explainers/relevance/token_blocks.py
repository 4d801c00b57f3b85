"""The blocks of a ViT-like network, and the tokens that pass between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from xattn.backbone import Backbone


def token_blocks(backbone: Backbone, count: int | None = None) -> list[nn.Module]:
    """The network's blocks, first to last: its ``blocks``, or its outermost list of ``count`` modules.

    Raises:
        ValueError: there is no such list.
    """
    own = getattr(backbone.model, "blocks", None)
    lists = [own, *(backbone.model.modules() if count else ())]
    for found in lists:
        if isinstance(found, nn.Sequential | nn.ModuleList) and len(found) == (count or len(found)):
            return list(found)
    wanted = f"list of {count} blocks" if count else "list 'blocks'"
    raise ValueError(f"backbone: {backbone.name} has no {wanted} whose tokens could be read")


@contextmanager
def block_outputs(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Context manager that collects the output tokens (B, N, C) of the blocks, in the order of their
    calls."""
    found: list[Tensor] = []
    with ExitStack() as hooks:
        for block in blocks:
            hooks.enter_context(
                block.register_forward_hook(lambda m, args, output: found.append(_tokens(output)))
            )
        yield found


@contextmanager
def block_inputs(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Context manager that collects the input tokens (B, N, C) of the blocks. The first block's input is
    detached from the graph, and the tokens require a gradient."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        tokens = args[0] if found else args[0].detach().requires_grad_()
        found.append(tokens)
        return (tokens, *args[1:])

    with ExitStack() as hooks:
        for block in blocks:
            hooks.enter_context(block.register_forward_pre_hook(keep))
        yield found


@contextmanager
def output_changed(block: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Context manager in which ``change`` is applied to the tokens that ``block`` outputs."""

    def replace(module: nn.Module, args: Any, output: Any) -> Any:
        tokens = change(_tokens(output))
        return tokens if isinstance(output, Tensor) else (tokens, *output[1:])

    with block.register_forward_hook(replace):
        yield


def _tokens(output: Any) -> Tensor:
    """A block's tokens: its output, or the first of several."""
    return output if isinstance(output, Tensor) else output[0]
