"""Gate statistics against a loop over tokens in numpy, and the history of all tasks on disk."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clmoe.methods.clmoe import GateCount, load_statistics, save_statistics
from tests.runs import same_bits

E = 5


def draw(rows: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """A gate ``[B, T, E]`` that sums to 1, and a right-padded mask ``[B, T]``."""
    generator = torch.Generator().manual_seed(seed)
    gate = torch.randn(rows, length, E, generator=generator).softmax(-1)
    lengths = torch.randint(1, length + 1, (rows,), generator=generator)
    return gate, (torch.arange(length) < lengths.unsqueeze(1)).long()


def loop(gate: Tensor, mask: Tensor, top_k: int) -> tuple[np.ndarray, np.ndarray, int]:
    total, picks, tokens = np.zeros(E), np.zeros(E, dtype=np.int64), 0
    for row in range(gate.shape[0]):
        for token in range(gate.shape[1]):
            if mask[row, token]:
                values = gate[row, token].numpy().astype(np.float64)
                total += values
                tokens += 1
                for expert in sorted(range(E), key=lambda i: (-values[i], i))[:top_k]:
                    picks[expert] += 1
    return total, picks, tokens


def test_counts_equal_a_loop_over_real_tokens() -> None:
    gate, mask = draw(6, 9, seed=0)
    gate[mask == 0] = torch.nn.functional.one_hot(torch.tensor(3), E).float()  # padding would favour expert 3
    total, picks, tokens = loop(gate, mask, 2)
    summary = GateCount.of(gate, mask, 2).summary()
    np.testing.assert_allclose(summary["gate_mean"].numpy(), total / tokens, rtol=1e-12)
    assert summary["topk_counts"].tolist() == picks.tolist()
    assert int(summary["tokens"]) == tokens
    assert summary["gate_mean"].dtype == torch.float64
    assert summary["topk_counts"].dtype == summary["tokens"].dtype == torch.int64


def test_equal_gates_pick_the_lower_index() -> None:
    flat = torch.full((2, 3, E), 1 / E)
    assert GateCount.of(flat, torch.ones(2, 3), 2).picks.tolist() == [6, 6, 0, 0, 0]
    tied = torch.tensor([[[0.1, 0.3, 0.1, 0.3, 0.2]]])
    assert GateCount.of(tied, torch.ones(1, 1), 1).picks.tolist() == [0, 1, 0, 0, 0]


def test_batches_pooled_are_one_batch() -> None:
    gate, mask = draw(8, 6, seed=1)
    whole = GateCount.of(gate, mask, 2)
    parts = [GateCount.of(gate[i : i + 3], mask[i : i + 3], 2) for i in range(0, 8, 3)]
    pooled = parts[0] + parts[1] + parts[2]
    torch.testing.assert_close(pooled.total, whole.total, rtol=1e-14, atol=0)
    assert pooled.picks.tolist() == whole.picks.tolist()
    assert int(pooled.tokens) == int(whole.tokens)
    assert pooled.total.dtype == torch.float64


def statistics(task: int) -> dict[str, dict[str, Tensor]]:
    """Values that tell the task; names with dots, as modules have them."""
    return {
        f"model.layers.{block}.mlp.up_proj": {
            "gate_mean": torch.tensor([task, block], dtype=torch.float64),
            "topk_counts": torch.tensor([task, 10 * block]),
            "tokens": torch.tensor(100 + task),
        }
        for block in (0, 1, 10)
    }


def test_history_keeps_its_order_beyond_ten_tasks(tmp_path: Path) -> None:
    previous = None
    for task in range(12):
        folder = tmp_path / f"{task:02}"
        folder.mkdir()
        returned = save_statistics(previous, folder / "statistics.safetensors", statistics(task))
        assert len(returned) == task + 1
        previous = folder
    history = load_statistics(tmp_path / "11" / "statistics.safetensors")
    for task, loaded in enumerate(history):
        expected = statistics(task)
        assert loaded.keys() == expected.keys()
        for name, values in expected.items():
            assert loaded[name].keys() == values.keys()
            assert all(same_bits(loaded[name][kind], value) for kind, value in values.items()), (task, name)
