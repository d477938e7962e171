"""Modules that turn one modality into a vector each; what they share is only the size of that vector."""

from mmcl.towers.audio import AudioConfig as AudioConfig
from mmcl.towers.audio import AudioTower as AudioTower
from mmcl.towers.image import ImageTower as ImageTower
from mmcl.towers.text import TextTower as TextTower
