"""mmcl: contrastive pretraining over images, text and audio."""

__version__ = "0.1.0.dev0"
