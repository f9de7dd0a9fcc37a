"""A language in which depth pays, with known entropy: following the state of a random automaton.

A row begins with a state. Then come operations, drawn evenly; each moves the state by its own fixed permutation of
the states. After an operation the state itself follows with probability `reveal`, else the next operation; after a
state always an operation. With 8 states and 8 operations ids 0-7 are states and 8-15 operations:

    3  12 9  6  8  15 15 10  0  9 ...      state 3; operations 12, 9 lead to state 6; operations 8, 15, 15, 10 to 0; ...

Operations are noise that nobody can predict; a state follows exactly from the last one shown and the operations
since. So the entropy is known to the last digit, and what a model pays above it is what it does not know about the
state. The number of operations since the last shown state, the distance, is geometric: short distances are easy and
teach the step that longer ones repeat. One block composes an operation or two, and looking up d operations at once
takes a table of operations^d entries: a deep model repeats the step block by block, a shallow one has to give up.

    python benchmarks/depth_corpus.py            # a few rows, and the entropy
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stackwise.data.corpus import TokenSplit

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Automaton:
    """`states` states, `operations` permutations of them drawn by `seed`, shown with probability `reveal`."""

    states: int = 8
    operations: int = 8
    reveal: float = 0.25
    seed: int = 7

    @property
    def vocab_size(self) -> int:
        return self.states + self.operations

    @property
    def table(self) -> Ids:
        """[operations, states]: where an operation moves a state."""
        generator = np.random.default_rng(self.seed)
        return np.stack([generator.permutation(self.states) for _ in range(self.operations)])

    def rows(self, count: int, length: int, seed: int) -> Ids:
        """Rows of `length` tokens, [count, length]. The same arguments give the same rows."""
        generator, table = np.random.default_rng([self.seed, seed]), self.table
        tokens = np.empty((count, length), np.int64)
        state = tokens[:, 0] = generator.integers(0, self.states, count)
        shown = np.ones(count, bool)
        for t in range(1, length):
            shows = ~shown & (generator.random(count) < self.reveal)
            operation = generator.integers(0, self.operations, count)
            tokens[:, t] = np.where(shows, state, self.states + operation)
            state = np.where(shows, state, table[operation, state])
            shown = shows
        return tokens

    def split(self, count: int, length: int, seed: int, name: str = "train") -> TokenSplit:
        """`count` rows as the documents of a split, which `seq_len: length` cuts into one row each.

        One more is at the end, which packed rows leave out for want of a token after it.
        """
        rows = self.rows(count + 1, length, seed)
        return TokenSplit.from_arrays(rows.reshape(-1), np.arange(count + 1) * length, name=name)

    # --- what can be known -------------------------------------------------------------------------------------

    def entropy(self, length: int) -> float:
        """Nats per target of an endless supply of rows; the first token of a row is no target."""
        shown, total = 1.0, 0.0
        for _ in range(1, length):
            total += shown * self._after_state + (1 - shown) * self._after_operation
            shown = self.reveal * (1 - shown)
        return total / (length - 1)

    def floor(self, rows: Ids) -> float:
        """Nats per target that a model which knows everything pays on these very rows."""
        before, after = rows[:, :-1], rows[:, 1:]
        drawn = math.log(self.operations)
        cost = np.where(before < self.states, drawn, drawn - math.log(1 - self.reveal))
        return float(np.where(after < self.states, -math.log(self.reveal), cost).mean())

    @property
    def _after_state(self) -> float:
        return math.log(self.operations)

    @property
    def _after_operation(self) -> float:
        q = self.reveal
        return -q * math.log(q) - (1 - q) * math.log((1 - q) / self.operations)

    def distances(self, rows: Ids) -> Ids:
        """[count, length]: for a shown state the operations since the last one; 0 for operations and the first token."""
        found = np.zeros_like(rows)
        since = np.zeros(len(rows), np.int64)
        for t in range(1, rows.shape[1]):
            is_state = rows[:, t] < self.states
            found[:, t] = np.where(is_state, since, 0)
            since = np.where(is_state, 0, since + 1)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    options = parser.parse_args()
    language = Automaton()
    rows = language.rows(options.rows, options.length, seed=0)
    for row in rows:
        print(
            " ".join(
                str(token) if token < language.states else chr(97 + token - language.states) for token in row
            )
        )
    print(
        f"entropy {language.entropy(options.length):.4f} nats per token, of these rows {language.floor(rows):.4f}"
    )


if __name__ == "__main__":
    main()
