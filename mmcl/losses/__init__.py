"""Objectives: pure functions of embeddings, logit scale and shard, one per file."""

from mmcl.losses.dcl import dcl as dcl
from mmcl.losses.global_contrast import Estimates as Estimates
from mmcl.losses.global_contrast import global_contrast as global_contrast
from mmcl.losses.global_contrast import individual_contrast as individual_contrast
from mmcl.losses.hn_nce import hn_nce as hn_nce
from mmcl.losses.infonce import info_nce as info_nce
from mmcl.losses.mixup import mix as mix
from mmcl.losses.mixup import mixup as mixup
from mmcl.losses.modular import modular as modular
from mmcl.losses.multi_positive import multi_positive as multi_positive
from mmcl.losses.multi_view import mv_dhel as mv_dhel
from mmcl.losses.multi_view import mv_info_nce as mv_info_nce
from mmcl.losses.rows import HardNegatives as HardNegatives
from mmcl.losses.rows import Positives as Positives
from mmcl.losses.sigmoid import sigmoid as sigmoid
