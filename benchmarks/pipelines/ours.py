"""`ShardStream`. With `normalised` its images become, between two batches, what open_clip's pipeline gives.

That is floats with the mean and deviation of CLIP's images, here in one buffer that is written again and again.
"""

import logging

import torch
from comparing import MEAN, STD, rows_of, spectra, thumbnails
from serving import Rows, options, serve

from mmcl.types import Batch, InputSpec
from mmcl_data.stream import DataConfig, ShardStream, SourceConfig


def main() -> None:
    """Answer."""
    asked = options()
    torch.set_num_threads(1)
    logging.getLogger("mmcl").setLevel(logging.ERROR)  # of samples that are damaged on purpose
    config = DataConfig(
        sources={"data": SourceConfig(shards=asked["shards"])}, workers=asked["workers"], max_bad_share=1.0
    )
    stream = ShardStream(config, InputSpec(**asked["spec"]), asked["batch_size"], seed=0)

    floats = torch.empty(0)

    def size(batch: Batch) -> int:
        if asked.get("normalised"):
            torch.sub(batch.values["image"], MEAN * 255, out=floats.resize_(batch.values["image"].shape))
            floats.div_(STD * 255)
        return batch.size

    serve(stream.batches(), size, look)


def look(batch: Batch) -> Rows:
    """Its captions, with images or sounds."""
    images, waves = batch.values["image"], batch.values["audio"]
    return rows_of(batch.values["text"], thumbnails(images) if len(images) else spectra(waves))


if __name__ == "__main__":
    main()
