"""Megatron-Energon, with what its users write around it: PIL and torchvision's transforms, bytes as ours."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from comparing import rows_of, thumbnails
from open_clip.tokenizer import SimpleTokenizer
from serving import Rows, options, serve
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize


def prepared(tars: list[str], folder: Path) -> Path:
    """A data set of links to the shards, since its index lies beside them."""
    folder.mkdir()
    for tar in tars:
        (folder / Path(tar).name).symlink_to(tar)
    command = [str(Path(sys.executable).with_name("energon")), "prepare", str(folder), "--non-interactive"]
    command += ["--no-progress", "--num-workers", "1", "--split-parts", r"train:.*\.tar"]
    command += ["--sample-type", "CaptioningSample", "--field-map", '{"image": "jpg", "caption": "txt"}']
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


def main() -> None:
    """Answer."""
    asked = options()
    torch.set_num_threads(1)
    energon: Any = import_module("megatron.energon")
    side = asked["spec"]["image_size"]
    transform = Compose([Resize(side, interpolation=InterpolationMode.BICUBIC), CenterCrop(side), PILToTensor()])
    tokenizer = SimpleTokenizer(context_length=asked["spec"]["context_length"])

    class Encoder(energon.DefaultTaskEncoder):
        """Images and captions to tensors, in a worker."""

        decoder = energon.SampleDecoder(image_decode="pil")

        def encode_sample(self, sample: Any) -> Any:
            return {"image": transform(sample.image.convert("RGB")), "text": tokenizer(sample.caption)[0]}

        def batch(self, samples: list[Any]) -> Any:
            return {name: torch.stack([sample[name] for sample in samples]) for name in ("image", "text")}

    dataset = energon.get_train_dataset(
        prepared(asked["tars"], Path(asked["folder"])),
        batch_size=asked["batch_size"],
        shuffle_buffer_size=200,
        max_samples_per_sequence=100,
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=asked["workers"]),
        task_encoder=Encoder(),
    )
    serve(iter(energon.get_loader(dataset)), lambda batch: len(batch["image"]), look)


def look(batch: Any) -> Rows:
    """Its captions, with images."""
    return rows_of(batch["text"], thumbnails(batch["image"]))


if __name__ == "__main__":
    main()
