"""A few numbers for every sample of the data, kept from step to step by the number of the sample.

All ranks keep the same table, on the CPU: a step reads the rows of its own samples and is told those of all ranks. A
table grows to the largest number that it was told, so that nobody has to say how many samples there are.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmcl.dist import Shard
from mmcl.errors import CheckpointError, ConfigError


class SampleTable:
    """Rows of float32 numbers, `fill` where a sample was never told of."""

    def __init__(self, fill: Sequence[float]) -> None:
        self.fill = torch.tensor(fill, dtype=torch.float32)
        self.values = self.fill.new_zeros(0, len(fill))

    def read(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "n k"]:
        """What is kept of some samples, on the device of `ids`: waits for it.

        Raises:
            ConfigError: a sample without a number.
        """
        numbers = ids.cpu()
        if len(numbers) and int(numbers.min()) < 0:
            raise ConfigError(
                "a row without a sample number: an objective that keeps something of every sample needs a stream that "
                "numbers them (Batch.ids, column `sample`)"
            )
        self._grow(int(numbers.max()) + 1 if len(numbers) else 0)
        return self.values[numbers].to(ids.device)

    def write(self, ids: Int[Tensor, " n"], rows: Float[Tensor, "n k"], counts: Sequence[int], shard: Shard) -> None:
        """Keep this of samples of this rank, and what other ranks say of theirs. Collective.

        Of a sample that is twice in a batch the mean is kept.
        """
        every = shard.gather_like(ids, counts).cpu()
        told = shard.gather_like(rows.float(), counts).cpu()
        if not len(every):
            return
        self._grow(int(every.max()) + 1)
        different, place, times = every.unique(return_inverse=True, return_counts=True)
        total = torch.zeros(len(different), told.shape[1], dtype=torch.float64).index_add(0, place, told.double())
        self.values[different] = (total / times[:, None]).float()

    def load(self, values: Tensor) -> None:
        """Back to saved values.

        Raises:
            CheckpointError: they are of another kind of table.
        """
        if values.ndim != 2 or values.shape[1:] != self.fill.shape:
            raise CheckpointError(
                f"a table of {len(self.fill)} numbers for each sample was expected, found shape {tuple(values.shape)}: "
                "resume with the objective that was saved"
            )
        self.values = values.float().clone()

    def _grow(self, size: int) -> None:
        if size > len(self.values):
            size = 1 << (size - 1).bit_length()  # few reallocations
            self.values = torch.cat([self.values, self.fill.expand(size - len(self.values), -1)])
