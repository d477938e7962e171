"""open_clip 3.3.0's own training pipeline, with its transform for evaluation so that crops are not drawn.

Its buffer for shuffling is made small, so that filling it is not what is timed.
"""

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from comparing import denormalised, rows_of, thumbnails
from serving import Rows, options, serve

ENDLESS = 10**9
"""Samples of an epoch."""


def main() -> None:
    """Answer."""
    asked = options()
    torch.set_num_threads(1)
    data: Any = import_module("open_clip_train.data")
    open_clip: Any = import_module("open_clip")
    data._SAMPLE_SHUFFLE_SIZE = data._SAMPLE_SHUFFLE_INITIAL = 200
    args = SimpleNamespace(
        train_data="::".join(asked["tars"]),
        train_num_samples=ENDLESS,
        train_data_upsampling_factors=None,
        dataset_resampled=True,
        seed=0,
        batch_size=asked["batch_size"],
        workers=asked["workers"],
        world_size=1,
    )
    transform = open_clip.image_transform(
        asked["spec"]["image_size"],
        is_train=False,
        mean=open_clip.OPENAI_DATASET_MEAN,
        std=open_clip.OPENAI_DATASET_STD,
    )
    tokenizer = open_clip.SimpleTokenizer(context_length=asked["spec"]["context_length"])
    info = data.get_wds_dataset(args, transform, is_train=True, tokenizer=tokenizer)
    serve(iter(info.dataloader), lambda batch: len(batch[0]), look)


def look(batch: Any) -> Rows:
    """Its captions, with images."""
    images, texts = batch
    return rows_of(texts, thumbnails(denormalised(images)))


if __name__ == "__main__":
    main()
