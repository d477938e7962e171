"""The corpora that `mmcl data build` knows. A new one is a module here with a `Corpus`, and a line below."""

from mmcl_data.build.corpora.coco import Coco
from mmcl_data.build.corpora.folder import Folder
from mmcl_data.build.corpora.hf_datasets import HfDatasets
from mmcl_data.build.corpora.labelled import Esc50, ImageFolder, UrbanSound8K
from mmcl_data.build.corpora.manifest import Manifest
from mmcl_data.build.corpora.sounds import AudioCaps, AudioSetStrong, Clotho
from mmcl_data.build.corpus import Corpus

CORPORA: dict[str, type[Corpus]] = {
    "folder": Folder,
    "manifest": Manifest,
    "imagefolder": ImageFolder,
    "coco": Coco,
    "audiocaps": AudioCaps,
    "clotho": Clotho,
    "esc50": Esc50,
    "urbansound8k": UrbanSound8K,
    "audioset-strong": AudioSetStrong,
    "datasets": HfDatasets,
}
