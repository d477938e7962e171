"""Objectives: pure functions of embeddings, logit scale and shard, one per file."""

from mmcl.losses.dcl import dcl as dcl
from mmcl.losses.hn_nce import hn_nce as hn_nce
from mmcl.losses.infonce import info_nce as info_nce
from mmcl.losses.mixup import mix as mix
from mmcl.losses.mixup import mixup as mixup
from mmcl.losses.modular import modular as modular
from mmcl.losses.multi_positive import multi_positive as multi_positive
from mmcl.losses.rows import HardNegatives as HardNegatives
from mmcl.losses.rows import Positives as Positives
