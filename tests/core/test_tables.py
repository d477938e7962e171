"""What is kept of every sample: by its number, the same on all ranks, as large as it has to be."""

import math

import pytest
import torch
from loss_oracle import pool

from mmcl.dist import ONE_PROCESS, Shard
from mmcl.errors import CheckpointError, ConfigError
from mmcl.tables import SampleTable


def test_a_sample_that_was_never_told_of_has_the_fill():
    table = SampleTable([-math.inf, 2.0])
    assert table.read(torch.tensor([5, 0])).tolist() == [[-math.inf, 2.0]] * 2
    table.write(torch.tensor([3]), torch.tensor([[1.0, 7.0]]), [1], ONE_PROCESS)
    assert table.read(torch.tensor([3, 4])).tolist() == [[1.0, 7.0], [-math.inf, 2.0]]


def test_it_grows_to_the_largest_number():
    table = SampleTable([0.0])
    for number in (0, 9, 1000, 3):
        table.write(torch.tensor([number]), torch.tensor([[float(number)]]), [1], ONE_PROCESS)
    assert 1000 < len(table.values) <= 2048
    assert table.read(torch.tensor([0, 9, 1000, 3, 4])).flatten().tolist() == [0, 9, 1000, 3, 0]


def test_of_a_sample_that_is_twice_in_a_batch_the_mean_is_kept():
    table = SampleTable([0.0])
    table.write(torch.tensor([2, 1, 2]), torch.tensor([[1.0], [5.0], [4.0]]), [3], ONE_PROCESS)
    assert table.values[:3].flatten().tolist() == [0.0, 5.0, 2.5]


def test_a_row_without_a_number_is_refused():
    with pytest.raises(ConfigError, match="sample number"):
        SampleTable([0.0]).read(torch.tensor([3, -1]))


@pytest.mark.parametrize("saved", [torch.zeros(4), torch.zeros(4, 3)])
def test_another_table_is_refused(saved):
    with pytest.raises(CheckpointError, match="2 numbers"):
        SampleTable([0.0, 0.0]).load(saved)


def told(numbers: list[int], splits: list[int], shard: Shard) -> torch.Tensor:
    table = SampleTable([0.0])
    own = torch.tensor(numbers).split(splits)[shard.rank]
    table.read(own)
    table.write(own, own[:, None].float() ** 2, splits, shard)
    return table.values


@pytest.mark.parametrize("splits", [[3, 2], [5, 0], [1, 1, 0, 3]])
def test_every_rank_keeps_what_all_ranks_tell(splits):
    numbers = [7, 2, 12, 0, 3]
    expected = told(numbers, [5], ONE_PROCESS)
    assert expected[12] == 144
    for found in pool(len(splits)).run(told, numbers, splits):
        assert torch.equal(found, expected)
