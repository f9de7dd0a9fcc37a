"""A classifier with multi-head latent grouped kernel attention: is a line of Python's sources code or prose?

Prose are the lines of docstrings; bytes are the tokens. The loop is plain PyTorch. Shows: the loss as it
falls, accuracy on lines that were held out beside that of always saying the commoner kind, and what the attention is.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import random
import statistics
import tarfile
from collections.abc import Sequence

import torch

from stackwise import MLGKATextClassifier

LENGTH = 48


def lines_with_kind() -> list[tuple[str, int]]:
    """(line, 1 for prose and 0 for code) of three modules, without short lines; as many of one kind as of the other."""
    code, prose = set(), set()
    for module in (argparse, tarfile, statistics):
        source = inspect.getsource(module)
        docstrings: set[int] = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
                docstrings |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
        for number, line in enumerate(map(str.strip, source.splitlines()), 1):
            if len(line) > 15 and not line.startswith("#"):
                (prose if number in docstrings else code).add(line)
    size = min(len(code), len(prose))
    pick = random.Random(0).sample
    return [(line, kind) for kind, lines in enumerate((code, prose)) for line in pick(sorted(lines), size)]


def tensors(rows: Sequence[tuple[str, int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids [B, T], their mask [B, T], kinds [B]."""
    texts = [line.encode()[:LENGTH] for line, _ in rows]
    ids = torch.tensor([list(text) + [0] * (LENGTH - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (LENGTH - len(text)) for text in texts])
    return ids, mask, torch.tensor([kind for _, kind in rows])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    steps = 6 if parser.parse_args(arguments).quick else 200

    rows = lines_with_kind()
    random.Random(0).shuffle(rows)
    held_out, rows = rows[: len(rows) // 5], rows[len(rows) // 5 :]
    model = MLGKATextClassifier(256, 64, 128, n_heads=4, n_kv_heads=1, n_layers=2, max_seq_len=LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    order = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        batch = [rows[i] for i in torch.randint(len(rows), (32,), generator=order).tolist()]
        ids, mask, kinds = tensors(batch)
        loss = model.loss(model(ids, mask), kinds)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(1, steps // 6) == 0:
            print(f"step {step:>3}  loss {loss.item():.3f}")

    model.eval()
    ids, mask, kinds = tensors(held_out)
    with torch.no_grad():
        said = model(ids, mask).argmax(-1)
    commoner = max(kinds.float().mean().item(), 1 - kinds.float().mean().item())
    print(
        f"accuracy {(said == kinds).float().mean():.1%} of {len(kinds)} lines; the commoner kind {commoner:.1%}"
    )
    for (line, _), kind in zip(held_out[:5], said[:5].tolist(), strict=True):
        print(f"  {'prose' if kind else 'code '}  {line[:70]}")
    print(model.get_attention_info())


if __name__ == "__main__":
    main()
