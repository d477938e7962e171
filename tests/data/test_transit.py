"""What a worker packs arrives as it was, however often its blocks are used again."""

from dataclasses import fields
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from data_cases import SPEC, digest

from mmcl.types import Batch
from mmcl_data.samples import Row, collate
from mmcl_data.transit import Packer, Packet, Unpacker


def batch(start: int, rows: int = 3, *, sounds: bool = True) -> Batch:
    def row(number: int) -> Row:
        image = torch.full((3, 8, 8), number, dtype=torch.uint8) if number % 2 else None
        return Row(f"s#{number}", image, torch.full((80,), number / 100) if sounds else None, f"number {number}")

    return collate([row(start + number) for number in range(rows)], SPEC, skipped=start)


def with_roles() -> Batch:
    rows = [Row("s#0", caption="a dog", wrong=["a cat", "a cow"], right=["the dog"]), Row("s#1", caption="a cup")]
    return collate(rows, SPEC, beside=True)


def travel(packet: Packet) -> Packet:
    """Through a pipe."""
    return ForkingPickler.loads(ForkingPickler.dumps(packet))


@pytest.mark.parametrize("given", [batch(5), batch(4, 1), batch(1, 7, sounds=False)], ids=["all", "one", "no sounds"])
def test_a_batch_arrives_as_it_was_with_what_goes_along(given):
    arrived, beside = Unpacker().unpack(travel(Packer().pack(given, ["beside"])))
    assert digest(arrived) == digest(given)
    assert arrived.keys == given.keys
    assert beside == ["beside"]


def test_every_field_arrives_that_a_batch_has():
    given = with_roles()
    arrived, _ = Unpacker().unpack(travel(Packer().pack(given, None)))
    for field in fields(Batch):
        before, after = getattr(given, field.name), getattr(arrived, field.name)
        if isinstance(before, torch.Tensor):
            assert torch.equal(before, after), field.name
        elif isinstance(before, dict):
            assert before.keys() == after.keys()
            assert all(torch.equal(before[name], after[name]) for name in before), field.name
        else:
            assert before == after, field.name
    assert arrived.roles["text"].tolist() == [0, 1, 1, 2, 0]


def test_a_block_is_used_again_once_its_rows_are_out_and_they_stay_as_they_are():
    packer, unpacker = Packer(), Unpacker()
    first, _ = unpacker.unpack(travel(packer.pack(batch(0), None)))
    second, _ = unpacker.unpack(travel(packer.pack(batch(50), None)))
    assert len(packer.blocks) == 1
    assert (digest(first), digest(second)) == (digest(batch(0)), digest(batch(50)))


def test_a_block_whose_rows_are_still_on_their_way_is_left_alone():
    packer, unpacker = Packer(), Unpacker()
    packets = [travel(packer.pack(batch(number), None)) for number in (0, 10, 20)]
    assert len(packer.blocks) == 3
    assert [digest(unpacker.unpack(packet)[0]) for packet in packets] == [digest(batch(n)) for n in (0, 10, 20)]


def test_a_batch_too_large_for_a_free_block_gets_another():
    packer, unpacker = Packer(), Unpacker()
    for rows in (1, 40, 1, 40):
        arrived, _ = unpacker.unpack(travel(packer.pack(batch(0, rows), None)))
        assert digest(arrived) == digest(batch(0, rows))
    assert len(packer.blocks) == 2


def test_blocks_of_two_workers_are_told_apart():
    packers, unpacker = (Packer(), Packer()), Unpacker()
    for number in range(4):
        packet = packers[number % 2].pack(batch(number), None)._replace(worker=number % 2)
        assert digest(unpacker.unpack(travel(packet))[0]) == digest(batch(number))


def test_without_shared_memory_the_bytes_go_along(monkeypatch):
    def full(size: int) -> Any:
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", full)
    packer, unpacker = Packer(), Unpacker()
    for number in (0, 10):
        arrived, _ = unpacker.unpack(travel(packer.pack(batch(number), None)))
        assert digest(arrived) == digest(batch(number))
    assert packer.blocks == []
